"""Presets have the published shapes: parameters counted by formula, by building on meta, and by the papers."""

from __future__ import annotations

import pytest
import torch

from megalith.errors import ConfigError
from megalith.models import presets
from megalith.models.config import num_parameters
from megalith.models.family import FAMILIES

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
    "bert-base-uncased": 110_106_428,  # with the heads that it was trained with
    "bert-large-uncased": 336_226_108,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "t5-v1.1-small": 76_961_152,
    "t5-v1.1-base": 247_577_856,
    "t5-v1.1-large": 783_150_080,
    "t5-v1.1-xl": 2_849_757_184,
    "t5-v1.1-xxl": 11_135_332_352,
    "bart-base": 139_420_416 - 2 * 2 * 768,  # published tables of positions have two rows that no token reads
    "bart-large": 406_291_456 - 2 * 2 * 1024,
}
ROUNDED = {"bert-110m": 110e6, "bert-345m": 336e6, "bert-1.3b": 1.3e9, "bert-3.9b": 3.9e9, "t5-220m": 220e6}
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


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family in FAMILIES for name in presets.names(family)]
)
def test_formula_counts_the_built_model(family, name):
    config = presets.get(name)
    model_class, config_class = FAMILIES[family]
    assert type(config) is config_class
    with torch.device("meta"):
        model = model_class(config)
    assert sum(p.numel() for p in model.parameters()) == num_parameters(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name):
    assert num_parameters(presets.get(name), padded=False) == PUBLISHED[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_published_sizes(name):
    """Megatron's, which are given in words; its paper calls the second 336 million, its checkpoint 345."""
    assert abs(num_parameters(presets.get(name), padded=False) / ROUNDED[name] - 1) < 0.03


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
