"""A model's config refuses the impossible with every reason at once, and survives JSON and YAML."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml
from pydantic import ValidationError

from megalith.models.config import ModelConfig, RotaryScalingConfig, divisors
from megalith.models.gpt import GPT

SCALING = {"type": "llama3", "factor": 8.0, "original_max_position_embeddings": 4096}

IMPOSSIBLE = {
    "heads": (
        {"hidden_size": 30, "num_attention_heads": 4},
        "num_attention_heads ∈ [1, 2, 3, 5, 6, 10, 15, 30]",
    ),
    "groups": ({"num_query_groups": 5}, "num_query_groups ∈ [1, 2, 3, 4, 6, 12]"),
    "odd rotary": (
        {"position_embedding_type": "rope", "kv_channels": 10, "rotary_percentage": 0.5},
        "turns 5",
    ),
    "no rotary": ({"position_embedding_type": "rope", "kv_channels": 8, "rotary_percentage": 0.1}, "turns 0"),
    "scaling without rope": ({"rotary_scaling": SCALING}, "learned_absolute"),
    "scaling upside down": (
        {"position_embedding_type": "rope", "rotary_scaling": {**SCALING, "low_freq_factor": 4.0}},
        "not below",
    ),
    "short distance": (
        {"position_embedding_type": "relative", "relative_attention_max_distance": 16},
        "at least 17",
    ),
    "wiring": (
        {"transformer_block_type": "post_ln", "apply_residual_connection_post_layernorm": True},
        "post_ln has one wiring",
    ),
    "dropout in sdpa": (
        {"attention_dropout": 0.1, "attention_core": "sdpa"},
        "cannot drop attention probabilities",
    ),
    "dropout in flex": (
        {"attention_dropout": 0.1, "attention_core": "flex"},
        "cannot drop attention probabilities",
    ),
    "bias in flex": ({"position_embedding_type": "relative", "attention_core": "flex"}, "relative bias"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible(name):
    fields, said = IMPOSSIBLE[name]
    with pytest.raises(ValidationError) as caught:
        ModelConfig(vocab_size=10, **fields)
    assert said in str(caught.value)


def test_all_at_once():
    with pytest.raises(ValidationError) as caught:
        ModelConfig(
            vocab_size=10,
            hidden_size=30,
            num_attention_heads=4,
            num_query_groups=3,
            rotary_scaling=SCALING,
            attention_dropout=0.1,
            attention_core="sdpa",
        )
    text = str(caught.value)
    for word in ("hidden_size", "num_query_groups", "rotary_scaling", "attention_core"):
        assert word in text


@pytest.mark.parametrize(
    "fields", [{"activation": "gelo"}, {"layers": 3}, {"hidden_dropout": 1.0}, {"num_layers": 0}]
)
def test_wrong_values_and_unknown_keys(fields):
    with pytest.raises(ValidationError):
        ModelConfig(vocab_size=10, **fields)


def test_survives_json_and_yaml():
    config = ModelConfig(
        vocab_size=1000,
        position_embedding_type="rope",
        rotary_scaling=RotaryScalingConfig(**SCALING),
        activation="swiglu",
        qkv_bias=True,
        attention_scale=0.25,
        layernorm_epsilon=1e-6,
    )
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config
    assert ModelConfig(**yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


@pytest.mark.parametrize(
    ("typed", "stored"),
    [
        ("gelu", "gelu_tanh"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_erf", "gelu_erf"),
        ("squared-relu", "squared_relu"),
    ],
)
def test_activation_is_stored_by_its_exact_name(typed, stored):
    assert ModelConfig(vocab_size=10, activation=typed).activation == stored


def test_every_field_says_what_it_means():
    for name, field in {**ModelConfig.model_fields, **RotaryScalingConfig.model_fields}.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_derived_numbers():
    config = ModelConfig(
        vocab_size=50257, num_query_groups=4, position_embedding_type="rope", rotary_percentage=0.25
    )
    assert (config.head_dim, config.kv_heads, config.ffn_size) == (64, 4, 3072)
    assert (config.padded_vocab_size, config.rotary_channels) == (50304, 16)
    assert config.max_positions is None
    assert ModelConfig(vocab_size=10, max_position_embeddings=7).max_positions == 7
    assert ModelConfig(vocab_size=10).has_qkv_bias
    assert not ModelConfig(vocab_size=10, qkv_bias=False).has_qkv_bias


def test_divisors_are_cut():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert len(divisors(12288)) == 13
    assert divisors(12288)[-1] == 12288


def test_names_of_activations_agree_with_the_layers():
    """`models.config` may not import torch, so it repeats the names."""
    from typing import get_args

    from megalith.models import config
    from megalith.nn import mlp

    assert get_args(config.ActivationName) == mlp.ACTIVATIONS
    assert config.GATED_ACTIVATIONS == mlp.GATED


def test_config_and_presets_do_not_import_torch():
    code = "import sys, megalith.models.presets as p; p.get('gpt2-124m'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_model_prints_readably():
    config = ModelConfig(
        vocab_size=100, num_layers=3, hidden_size=16, num_attention_heads=4, activation="swiglu"
    )
    text = repr(GPT(config))
    assert "(0-2): 3 × Block(" in text
    assert "Linear(16 → 48, axes=(kv_heads ← embed))" in text
    assert "100 (padded to 128) × 16, axes=(vocab, embed)" in text
    assert "Dropout(0.1, site=mlp)" in text
    assert len(text.splitlines()) < 32
