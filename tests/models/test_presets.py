"""Presets have the published shapes: parameters counted by formula, by building on meta, and by the papers."""

from __future__ import annotations

import pytest
import torch

from megalith.errors import ConfigError
from megalith.models import presets
from megalith.models.config import num_parameters
from megalith.models.gpt import GPT

PUBLISHED = {  # exact where the published weights have so many numbers
    "gpt2-124m": 124_439_808,
    "gpt2-345m": 354_823_168,
    "gpt2-762m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
}
GPT3 = {
    "125m": 125,
    "350m": 350,
    "760m": 760,
    "1.3b": 1300,
    "2.7b": 2700,
    "6.7b": 6700,
    "13b": 13000,
    "175b": 175000,
}


@pytest.mark.parametrize("name", presets.names())
def test_formula_counts_the_built_model(name):
    config = presets.get(name)
    with torch.device("meta"):
        model = GPT(config)
    assert sum(p.numel() for p in model.parameters()) == num_parameters(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name):
    assert num_parameters(presets.get(name), padded=False) == PUBLISHED[name]


@pytest.mark.parametrize("size", GPT3)
def test_gpt3_table(size):
    count = num_parameters(presets.get(f"gpt3-{size}"), padded=False)
    assert abs(count / (GPT3[size] * 1e6) - 1) < 0.03


def test_heads():
    heads = {n: (presets.get(n).num_attention_heads, presets.get(n).head_dim) for n in presets.names()}
    assert heads["gpt2-345m"] == (16, 64)
    assert heads["gpt2-1.5b"] == (25, 64)
    assert heads["gpt3-2.7b"] == (32, 80)
    assert heads["gpt3-760m"] == (16, 96)
    assert heads["gpt3-175b"] == (96, 128)
    assert presets.get("llama2-70b").kv_heads == 8


def test_changes_and_unknown_names():
    assert presets.get("gpt2-124m", vocab_size=100).vocab_size == 100
    with pytest.raises(ConfigError, match="gpt2-124m"):
        presets.get("gpt2-124")
