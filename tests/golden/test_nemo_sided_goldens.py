"""NeMo's archives of BERT, T5 and BART compute what `transformers` does; of a task's model, what its encoder does."""

from __future__ import annotations

import json

import pytest
import torch

from megalith.checkpoint.foreign import open_foreign
from megalith.errors import CheckpointError
from megalith.generate.loading import load_model
from tests.golden import tiny, tiny_sides
from tests.golden.nemo_files import GPT, Layout
from tests.golden.nemo_sided_files import keys, sectioned, write, write_task
from tests.golden.sides import Sides, from_megatron_bert, from_pegasus

Made = tuple[Sides, tuple[torch.Tensor, ...]]


@pytest.fixture(scope="module")
def bert() -> Made:
    model = tiny_sides.megatron_bert()
    return from_megatron_bert(model), tiny_sides.answers(model)


@pytest.fixture(scope="module")
def t5() -> Made:
    model, table = tiny_sides.megatron_t5()
    return from_pegasus(model, table), tiny_sides.answers(model)


def assert_same(path, family: str, theirs: tuple[torch.Tensor, ...]) -> None:
    loaded = load_model(path, device="cpu", precision="64")
    assert loaded.state["architecture"]["family"] == family
    for mine, other in zip(tiny_sides.ours(loaded.model), theirs, strict=True):
        assert (mine[..., : other.shape[-1]] - other).abs().max() <= 1e-10


@pytest.mark.parametrize(("tp", "pp", "container"), [(1, 1, "gzip"), (2, 1, "tar"), (2, 2, "folder")])
def test_bert(tmp_path, bert, tp, pp, container):
    whole, theirs = bert
    assert_same(write(tmp_path / "a.nemo", whole, Layout(tp, pp, container), keys("bert")), "bert", theirs)


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize(("tp", "pp", "split"), [(1, 1, 1), (2, 1, 1), (2, 3, 1)])
def test_encoder_decoder(tmp_path, t5, family, tp, pp, split):
    whole, theirs = t5
    assert_same(write(tmp_path / "a.nemo", whole, Layout(tp, pp), keys(family), split), family, theirs)


def test_a_section_for_each_side(tmp_path, t5):
    whole, theirs = t5
    assert_same(write(tmp_path / "a.nemo", whole, Layout(), sectioned("t5")), "t5", theirs)


@pytest.mark.parametrize(("version", "tp"), [(0, 2), (1.0, 1), (3.0, 2)])
def test_the_listing_of_the_original_documents(tmp_path, version, tp):
    model = tiny_sides.megatron_bert("gelu")  # NeMo of that time did not fuse it
    whole = from_megatron_bert(model)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(86))]
    artifacts = {
        "tokenizer.vocab_file": "\n".join(vocabulary).encode(),
        "tokenizer_vocab_dict.json": json.dumps({token: i for i, token in enumerate(vocabulary)}).encode(),
    }
    path = write_task(tmp_path / "text_class_350m.nemo", whole, Layout(tp, artifacts=artifacts), version)
    loaded = load_model(path, device="cpu", precision="64")
    encoder = model.bert(
        tiny.tokens(),
        token_type_ids=tiny_sides.types(),
        attention_mask=(torch.arange(17) < tiny_sides.LENGTHS[:, None]).long(),
    )
    real = torch.arange(17) < tiny_sides.LENGTHS[:, None]
    (ours,) = tiny_sides.ours(loaded.model, encoder=True)
    assert (ours - encoder.last_hidden_state[real]).abs().max() <= 1e-10
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.encode("w3 w85") == [8, 90]
    assert any("classifier.mlp.layer0.weight" in notice for notice in loaded.notices)


def test_only_the_dictionary_of_the_vocabulary(tmp_path, bert):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(86))]
    dictionary = {"tokenizer_vocab_dict.json": json.dumps({t: i for i, t in enumerate(tokens)}).encode()}
    path = write_task(tmp_path / "a.nemo", bert[0], Layout(artifacts=dictionary), 3.0)
    tokenizer = load_model(path, device="cpu").tokenizer
    assert tokenizer is not None
    assert tokenizer.encode("w3 w85") == [8, 90]


def test_a_target_that_the_tensors_are_not(tmp_path, bert):
    path = write(tmp_path / "a.nemo", bert[0], Layout(), keys("bert", target=GPT))
    with pytest.raises(
        CheckpointError, match=r"it is a BERT by its tensors, .*MegatronGPTModel by its target"
    ):
        open_foreign(path)
