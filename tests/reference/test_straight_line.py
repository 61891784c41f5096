"""Every pair of options against a straight-line implementation (`plain.py`), in float64: logits, loss, every gradient."""

from __future__ import annotations

import pytest
import torch

from megalith.models.config import ModelConfig, RotaryScalingConfig, num_parameters
from tests.reference import plain
from tests.reference.common import assert_close, mean_loss, missing_pairs, random_model, rows

FACTORS = {
    "positions": ["learned", "rope", "rope_part", "rope_linear", "rope_llama3", "relative", "none"],
    "norm": ["layernorm", "rmsnorm"],
    "wiring": ["pre", "pre_after", "post"],
    "activation": [
        "gelu_tanh",
        "gelu_erf",
        "relu",
        "silu",
        "squared_relu",
        "geglu",
        "geglu_erf",
        "swiglu",
        "reglu",
    ],
    "bias": ["all", "none", "qkv", "not_qkv"],
    "groups": ["4", "2", "1"],
    "head_dim": ["4", "8"],
    "head": ["tied", "untied"],
    "scale": ["default", "own"],
    "input": ["plain", "documents", "restarted"],
    "core": ["sdpa", "eager"],
}

TABLE = """
# positions   norm      wiring    activation   bias    groups head_dim head   scale   input     core
learned     layernorm pre       geglu        qkv     1 8 tied   default restarted sdpa
learned     layernorm pre_after gelu_tanh    not_qkv 2 8 untied default documents sdpa
learned     layernorm pre_after silu         all     2 8 tied   own     restarted eager
learned     layernorm post      relu         none    2 4 untied own     plain     sdpa
learned     layernorm post      reglu        none    1 4 untied own     restarted eager
learned     rmsnorm   pre       gelu_erf     not_qkv 4 8 untied default restarted sdpa
learned     rmsnorm   pre       reglu        all     4 8 tied   default plain     sdpa
learned     rmsnorm   pre_after squared_relu none    4 8 untied own     restarted eager
learned     rmsnorm   pre_after geglu_erf    qkv     1 8 tied   own     documents sdpa
learned     rmsnorm   pre_after swiglu       none    2 4 untied own     plain     sdpa
rope        layernorm pre       relu         qkv     4 4 tied   own     documents eager
rope        layernorm pre       swiglu       none    4 8 tied   own     documents eager
rope        layernorm post      silu         qkv     2 4 tied   own     plain     sdpa
rope        layernorm post      squared_relu qkv     2 4 untied own     plain     eager
rope        layernorm post      geglu        none    1 4 untied default restarted sdpa
rope        rmsnorm   pre_after geglu_erf    qkv     1 8 tied   default restarted sdpa
rope        rmsnorm   pre_after reglu        not_qkv 2 8 tied   default documents sdpa
rope        rmsnorm   post      gelu_tanh    none    1 8 tied   default documents sdpa
rope        rmsnorm   post      gelu_erf     all     4 4 untied default restarted eager
rope_part   layernorm pre_after relu         all     1 8 untied default plain     eager
rope_part   layernorm post      gelu_erf     none    2 8 tied   own     documents sdpa
rope_part   rmsnorm   pre       gelu_tanh    qkv     1 4 tied   default restarted eager
rope_part   rmsnorm   pre       silu         not_qkv 2 8 tied   default plain     sdpa
rope_part   rmsnorm   pre       squared_relu not_qkv 4 4 tied   default documents sdpa
rope_part   rmsnorm   pre       geglu_erf    all     2 8 tied   own     documents sdpa
rope_part   rmsnorm   pre       reglu        not_qkv 2 8 tied   default restarted eager
rope_part   rmsnorm   pre_after geglu        not_qkv 4 4 tied   own     documents sdpa
rope_part   rmsnorm   post      swiglu       none    2 4 untied own     plain     eager
rope_linear layernorm pre       geglu        qkv     2 8 untied default plain     eager
rope_linear layernorm pre       geglu_erf    all     4 4 untied own     documents eager
rope_linear layernorm pre_after gelu_erf     qkv     1 4 untied own     restarted eager
rope_linear layernorm post      gelu_tanh    none    4 4 tied   own     plain     eager
rope_linear layernorm post      reglu        qkv     2 4 untied default documents sdpa
rope_linear rmsnorm   pre       relu         none    2 4 tied   own     plain     eager
rope_linear rmsnorm   pre       silu         not_qkv 2 8 tied   default plain     sdpa
rope_linear rmsnorm   pre_after squared_relu all     1 8 tied   default restarted sdpa
rope_linear rmsnorm   post      swiglu       all     2 8 untied own     restarted eager
rope_llama3 layernorm pre       geglu_erf    not_qkv 1 8 untied own     documents eager
rope_llama3 layernorm pre       reglu        none    2 8 untied default documents sdpa
rope_llama3 layernorm pre_after gelu_erf     not_qkv 4 8 untied own     plain     sdpa
rope_llama3 layernorm post      silu         all     4 8 tied   own     restarted eager
rope_llama3 layernorm post      geglu        all     2 8 tied   own     plain     sdpa
rope_llama3 rmsnorm   pre       relu         qkv     4 8 tied   own     documents eager
rope_llama3 rmsnorm   pre       swiglu       qkv     2 4 untied own     plain     sdpa
rope_llama3 rmsnorm   pre_after silu         none    1 4 untied default documents sdpa
rope_llama3 rmsnorm   post      gelu_tanh    qkv     4 4 untied default restarted sdpa
rope_llama3 rmsnorm   post      squared_relu qkv     2 8 tied   default documents sdpa
relative    layernorm pre       reglu        all     4 8 untied default plain     eager
relative    layernorm pre_after swiglu       not_qkv 1 8 tied   own     restarted eager
relative    layernorm post      squared_relu not_qkv 2 8 untied own     plain     eager
relative    layernorm post      geglu_erf    none    2 8 untied default plain     eager
relative    rmsnorm   pre       gelu_tanh    qkv     1 8 tied   own     restarted eager
relative    rmsnorm   pre       gelu_erf     not_qkv 4 4 untied default plain     sdpa
relative    rmsnorm   pre       relu         all     4 4 tied   default documents sdpa
relative    rmsnorm   post      silu         qkv     1 4 tied   default plain     sdpa
relative    rmsnorm   post      geglu        all     2 8 untied default documents sdpa
none        layernorm pre       swiglu       all     1 8 tied   default documents sdpa
none        layernorm pre_after geglu        none    4 4 tied   own     plain     eager
none        layernorm pre_after geglu_erf    qkv     2 4 untied own     documents eager
none        layernorm post      gelu_erf     not_qkv 2 4 tied   default restarted eager
none        layernorm post      silu         none    2 4 untied default documents eager
none        rmsnorm   post      gelu_tanh    all     1 4 untied own     restarted eager
none        rmsnorm   post      relu         not_qkv 2 8 untied default restarted sdpa
none        rmsnorm   post      squared_relu all     1 8 tied   default plain     sdpa
none        rmsnorm   post      reglu        qkv     1 4 untied default restarted eager
"""

POSITIONS = {
    "learned": {"position_embedding_type": "learned_absolute"},
    "rope": {"position_embedding_type": "rope"},
    "rope_part": {"position_embedding_type": "rope", "rotary_percentage": 0.5, "rotary_interleaved": True},
    "rope_linear": {
        "position_embedding_type": "rope",
        "rotary_scaling": RotaryScalingConfig(type="linear", factor=2.5),
    },
    "rope_llama3": {
        "position_embedding_type": "rope",
        "rotary_base": 20.0,
        "rotary_scaling": RotaryScalingConfig(
            type="llama3",
            factor=4.0,
            original_max_position_embeddings=30,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        ),
    },
    "relative": {
        "position_embedding_type": "relative",
        "relative_attention_num_buckets": 6,
        "relative_attention_max_distance": 7,
    },
    "none": {"position_embedding_type": "none"},
}
WIRING = {
    "pre": {},
    "pre_after": {"apply_residual_connection_post_layernorm": True},
    "post": {"transformer_block_type": "post_ln"},
}
BIAS = {
    "all": {},
    "none": {"bias": False},
    "qkv": {"bias": False, "qkv_bias": True},
    "not_qkv": {"bias": True, "qkv_bias": False},
}
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [5, 5, 5, 5, 5, 9, 9, 9]])
RESTARTED = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 0, 1, 2]])
INPUTS = {
    "plain": {},
    "documents": {"documents": DOCUMENTS},
    "restarted": {"documents": DOCUMENTS, "positions": RESTARTED},
}


def table():
    return rows("\n".join(line for line in TABLE.splitlines() if not line.startswith("#")), FACTORS)


def make_config(row):
    return ModelConfig(
        vocab_size=13,
        make_vocab_size_divisible_by=8,
        num_layers=2,
        hidden_size=16,
        num_attention_heads=4,
        ffn_hidden_size=24,
        max_position_embeddings=8,
        hidden_dropout=0.0,
        num_query_groups=int(row["groups"]),
        kv_channels=int(row["head_dim"]),
        normalization=row["norm"],
        layernorm_epsilon=1e-3,
        activation=row["activation"],
        share_embeddings_and_output_weights=row["head"] == "tied",
        attention_scale=0.37 if row["scale"] == "own" else None,
        attention_core=row["core"],
        **POSITIONS[row["positions"]],
        **WIRING[row["wiring"]],
        **BIAS[row["bias"]],
    )


def test_table_has_every_pair():
    assert missing_pairs(table(), FACTORS) == []


@pytest.mark.parametrize("row", table(), ids=lambda row: "-".join(row.values()))
def test_equals_straight_line(row):
    model = random_model(make_config(row))
    config = model.config
    assert sum(p.numel() for p in model.parameters()) == num_parameters(config)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 13, (2, 8), generator=generator)
    targets = torch.randint(-1, 13, (2, 8), generator=generator)
    inputs = INPUTS[row["input"]]
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    theirs = plain.logits_of(weights, config, tokens, **inputs)
    plain.loss_of(theirs, targets).backward()
    assert_close("logits", model.logits(model(tokens, **inputs)), theirs)
    loss = mean_loss(model, tokens, targets, **inputs)
    assert_close("loss", loss, plain.loss_of(theirs, targets))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(name, parameter.grad, weights[name].grad)
