"""Conversions of BERT and of encoder-decoders through the files: what comes back, what is refused, what the certificate tries."""

from __future__ import annotations

import json
import random

import pytest
import torch

from megalith.checkpoint.convert.certificate import Failed
from megalith.checkpoint.convert.convert import Plan, convert
from megalith.checkpoint.convert.passage import PASSAGE, choose_tokens, passage_loss
from megalith.checkpoint.convert.to_megatron import Sizes
from megalith.checkpoint.foreign import open_foreign
from megalith.checkpoint.native import Checkpointer
from megalith.checkpoint.reading import read_tensors
from megalith.errors import CheckpointError
from megalith.models.bert_config import BertConfig
from megalith.models.encdec_config import EncoderDecoderConfig
from megalith.models.family import describe
from megalith.tokenizers.load import load_tokenizer
from megalith.topology.topology import Topology
from tests.checkpoint.foreign_files import (
    BART_LIKE,
    BERT_LIKE,
    POST_LN_LIKE,
    SIDED_LIKE,
    T5_LIKE,
    hugging_face,
    random_model,
)

CONFIGS = {
    "megatron-bert": BertConfig(**BERT_LIKE),
    "bert": BertConfig(**POST_LN_LIKE),
    "megatron-t5": EncoderDecoderConfig(**SIDED_LIKE),
    "t5": EncoderDecoderConfig(**T5_LIKE),
    "bart": EncoderDecoderConfig(**BART_LIKE),
}


def native(root, name, config=None):
    """A step folder with random weights in float64."""
    config = config or CONFIGS[name]
    tensors = {f"model.{n}": p.detach() for n, p in random_model(config).named_parameters()}
    family = "bert" if isinstance(config, BertConfig) else "bart" if name == "bart" else "t5"
    return Checkpointer(root, Topology.single()).save(80, tensors, describe(family, config), config_yaml="")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name → a step folder of our own."""
    return {name: native(tmp_path_factory.mktemp(name), name) for name in CONFIGS}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """What transformers makes of a folder is the golden tests' to say."""
    monkeypatch.setattr("megalith.checkpoint.convert.compare.ask_transformers", lambda *_: None)


def weights(folder):
    return {lazy.name.removeprefix("model."): lazy.read() for lazy in read_tensors(folder)}


def assert_same(one, other, vocabulary=29):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        padded = name in ("token_embedding.weight", "head.weight", "output_bias.bias")
        rows = vocabulary if padded else len(tensor)
        assert torch.equal(tensor[:rows], other[name][:rows]), name


EVERY = [
    (name, version, ranks, stages)
    for name in ("megatron-bert", "megatron-t5")
    for version in range(4)
    for ranks in (1, 2, 4)
    for stages in (1, 2)
]


def sample():
    """Of each family and version one, in sizes that change with them."""
    draw, chosen = random.Random(3), {}
    for case in EVERY:
        chosen.setdefault(case[:2], []).append(case)
    return [draw.choice(cases) for cases in chosen.values()]


def there_and_back(folder, root, case):
    _, version, ranks, stages = case
    there = convert(folder, root / "there", Plan("megatron", Sizes(ranks, stages), megatron_version=version))
    assert there.certificate["max_abs_logit_error"] == 0
    assert_same(weights(folder), weights(convert(there.folder, root / "back", Plan("native")).folder))


@pytest.mark.parametrize("case", sample(), ids=str)
def test_import_of_an_export_is_the_same(tmp_path, folders, case):
    there_and_back(folders[case[0]], tmp_path, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_import_of_every_export_is_the_same(tmp_path, folders, case):
    there_and_back(folders[case[0]], tmp_path, case)


@pytest.mark.parametrize("name", ["megatron-bert", "bert", "t5", "bart"])
def test_folders_of_transformers_and_back(tmp_path, folders, name):
    there = convert(folders[name], tmp_path / "there", Plan("huggingface", shard=20_000))
    assert len(list(there.folder.glob("model-*.safetensors"))) > 1
    said = json.loads((there.folder / "config.json").read_text())
    assert said["model_type"] == name
    back = convert(there.folder, tmp_path / "back", Plan("native"))
    assert back.certificate["max_abs_logit_error"] == 0
    assert_same(weights(folders[name]), weights(back.folder))


REFUSED = {
    "post-ln": ("bert", {}, Plan("megatron"), "has no place for norm_embedding.bias"),
    "relative": ("t5", {}, Plan("megatron"), "has no place for decoder.relative_bias.weight"),
    "two tables": ("bart", {}, Plan("megatron"), "has no place for decoder.norm_embedding.bias"),
    "own head": (
        "megatron-bert",
        {"share_embeddings_and_output_weights": False},
        Plan("megatron"),
        "has no place for head.weight",
    ),
    "bend of the head": (
        "megatron-bert",
        {"activation": "gelu_tanh"},
        Plan("huggingface"),
        "model.lm_head_activation: gelu_erf, a megatron-bert of transformers has gelu_tanh",
    ),
    "no types": ("bert", {"num_tokentypes": 0}, Plan("huggingface"), "transformers' BERT has one at least"),
    "wiring": ("megatron-t5", {}, Plan("huggingface"), "model.transformer_block_type: pre_ln, a bart of transformers has"),
    "bias of the logits": ("t5", {"output_bias": True}, Plan("huggingface"), "model.output_bias: True"),
    "virtual stages": ("megatron-t5", {}, Plan("megatron", Sizes(1, 2, 2)), "no virtual stages in Megatron"),
    "stages": ("megatron-t5", {}, Plan("megatron", Sizes(1, 8)), "layers do not divide into"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_has_nothing_like_is_named(tmp_path, folders, case):
    name, changes, plan, said = REFUSED[case]
    folder = folders[name]
    if changes:
        folder = native(tmp_path / "run", name, CONFIGS[name].model_copy(update=changes))
    with pytest.raises(CheckpointError) as caught:
        convert(folder, tmp_path / "out", plan)
    assert said in str(caught.value)
    assert caught.value.problem.where or caught.value.problem.fix or plan.to == "huggingface"
    assert not (tmp_path / "out").exists()


def test_a_stage_in_the_wrong_order_is_noticed(tmp_path, folders, monkeypatch):
    """Keys and values of a decoder in the order of version 0, in a file that says 3."""
    from megalith.checkpoint.convert import to_megatron
    from megalith.checkpoint.formats.megatron_tables import legacy

    monkeypatch.setattr(to_megatron, "legacy", lambda version, family: legacy(0, family))
    for name in ("megatron-bert", "megatron-t5"):
        with pytest.raises(Failed, match="does not compute what the source does"):
            convert(folders[name], tmp_path / "out", Plan("megatron"))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def word_pieces(tmp_path_factory):
    """A folder with a vocab.txt of the passage's words."""
    folder = tmp_path_factory.mktemp("vocabulary")
    words = sorted(set(PASSAGE.lower().replace(",", " ,").replace(".", " .").replace(":", " :").split()))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join(special + words) + "\n")
    return folder


def test_a_bert_is_tried_on_what_it_was_taught(tmp_path, word_pieces):
    tokenizer = load_tokenizer(word_pieces)
    config = BertConfig(**{**BERT_LIKE, "vocab_size": tokenizer.vocab_size, "max_position_embeddings": 40})
    tokens = choose_tokens(config, tokenizer)
    asked = tokens.guessed >= 0
    assert (tokens.ids[0], tokens.ids[-1]) == (tokenizer.cls, tokenizer.sep)
    assert (tokens.ids[asked] == tokenizer.mask).all()
    assert tokenizer.decode(tokens.guessed[asked][:2].tolist()) == "little time"
    sure = torch.full((len(tokens.ids), config.vocab_size), -30.0)
    sure[torch.arange(len(sure)), tokens.guessed.clamp(min=0)] = 30.0
    assert passage_loss(sure, tokens) < 1e-9

    folder = hugging_face(tmp_path / "in", random_model(config))
    (folder / "vocab.txt").write_bytes((word_pieces / "vocab.txt").read_bytes())
    with pytest.raises(Failed, match="its loss on English text is"):
        convert(folder, tmp_path / "out", Plan("native"))
    done = convert(folder, tmp_path / "out", Plan("native", untrained=True))
    passage = done.certificate["passage"]
    assert (passage["scored"], passage["tokens"]) == (True, 40)
    assert (done.folder / "tokenizer/vocab.txt").is_file()
    assert load_tokenizer(done.folder / "tokenizer").hash() == tokenizer.hash()


def test_an_encoder_alone_and_an_encoder_decoder_are_not_tried(tmp_path, folders, word_pieces):
    folder = hugging_face(tmp_path / "in", random_model(CONFIGS["bert"]))
    from megalith.checkpoint.tensor_files import open_tensors, write_tensors

    file = folder / "model.safetensors"
    body = {lazy.name: lazy.read() for lazy in open_tensors(file) if not lazy.name.startswith("cls.")}
    file.unlink()
    write_tensors(file, body)
    assert open_foreign(folder).drawn
    done = convert(folder, tmp_path / "native", Plan("native"))
    assert done.certificate["passage"] == {"scored": False, "why": "lm_head, output_bias begin anew"}
    assert any("begin anew" in notice for notice in done.certificate["notices"])
    config = EncoderDecoderConfig(**{**T5_LIKE, "vocab_size": load_tokenizer(word_pieces).vocab_size})
    assert "depends on what it was taught" in choose_tokens(config, load_tokenizer(word_pieces)).why
