"""The fingerprint of a base model: one for every format and layout of it, another for every other model."""

from __future__ import annotations

import pytest
import torch

from megalith.adapt.fingerprint import fingerprint, fingerprint_of
from megalith.checkpoint.convert.convert import Plan, convert
from megalith.checkpoint.convert.to_megatron import Sizes
from megalith.checkpoint.open import resolve
from megalith.checkpoint.reading import read_tensors
from megalith.generate.loading import load_model
from tests.generate.tiny import VARIANTS, save_tiny


class Changed:
    """A lazy tensor with other numbers."""

    def __init__(self, lazy, change):
        self.lazy, self.change, self.shape = lazy, change, lazy.shape

    def rows(self, start, stop):
        return self.change(self.lazy.rows(start, stop))


def tensors_of(run):
    return {lazy.name.removeprefix("model."): lazy for lazy in read_tensors(resolve(run))}


@pytest.mark.parametrize("variant", ["gpt2", "llama"])
def test_the_same_in_every_format_and_dtype(tmp_path, variant):
    run = save_tiny(tmp_path / "run", **VARIANTS[variant])
    expected = fingerprint_of(run)
    assert len(expected) == 64
    plans = {
        "hf": Plan("huggingface", untrained=True),
        "bf16": Plan("huggingface", dtype="bf16", untrained=True),
        "megatron": Plan("megatron", Sizes(ranks=2, stages=2), untrained=True),
    }
    if variant == "gpt2":
        plans["model.nemo"] = Plan("nemo", Sizes(ranks=2), untrained=True)
    for name, plan in plans.items():
        convert(run, tmp_path / name, plan)
        assert fingerprint_of(tmp_path / name, tokenizer=run / "tokenizer") == expected, name
    assert load_model(run).base.fingerprint == expected
    assert load_model(tmp_path / "hf").base.fingerprint == expected


def test_another_for_any_change_that_counts(tmp_path):
    run = save_tiny(tmp_path / "run")
    config, tensors = load_model(run).model.config, tensors_of(run)
    known = fingerprint("gpt", config, tensors)
    seen = {known}
    for name in (
        "token_embedding.weight",
        "position_embedding.weight",
        "blocks.1.mlp.down.weight",
        "blocks.0.attention.qkv.bias",
    ):
        changed = Changed(tensors[name], lambda rows: rows + 0.1)
        seen.add(fingerprint("gpt", config, {**tensors, name: changed}))
    for fields in ({"activation": "relu"}, {"layernorm_epsilon": 1e-6}, {"max_position_embeddings": 47}):
        seen.add(fingerprint("gpt", config.model_copy(update=fields), tensors))
    seen.add(fingerprint("bart", config, tensors))
    assert len(seen) == 9


def test_the_same_for_changes_that_do_not_count(tmp_path):
    run = save_tiny(tmp_path / "run")
    config, tensors = load_model(run).model.config, tensors_of(run)
    known = fingerprint("gpt", config, tensors)
    training = {
        "hidden_dropout": 0.3,
        "init_method_std": 1.0,
        "make_vocab_size_divisible_by": 8,
        "vocab_size": 384,
        "attention_core": "eager",
    }
    assert fingerprint("gpt", config.model_copy(update=training), tensors) == known
    table = tensors["token_embedding.weight"]
    beside = {"prompts.tables.0.tokens": table}
    assert fingerprint("gpt", config, {**tensors, **beside}) == known
    rounded = {name: Changed(lazy, lambda rows: rows.to(torch.bfloat16)) for name, lazy in tensors.items()}
    assert fingerprint("gpt", config, rounded) == known
