"""A checkpoint says what it holds: any family's config goes into its state and comes back, and counts what it builds."""

from __future__ import annotations

import json

import pytest
import torch

from megalith.errors import CheckpointError
from megalith.models.config import ModelConfig, effective, num_parameters
from megalith.models.family import FAMILIES, describe, understand

SHAPE = {"vocab_size": 100, "num_layers": 2, "hidden_size": 16, "num_attention_heads": 4}
MORE = {
    "gpt": [{}],
    "bert": [
        {},
        {"bert_binary_head": False},
        {"bert_binary_head": False, "num_tokentypes": 3, "transformer_block_type": "post_ln"},
        {"normalization": "rmsnorm", "share_embeddings_and_output_weights": False, "bias": False},
    ],
    "t5": [
        {},
        {"encoder_num_layers": 3, "decoder_ffn_hidden_size": 24, "output_bias": True},
        {"position_embedding_type": "relative", "num_query_groups": 2, "kv_channels": 6, "bias": False},
    ],
    "bart": [{"transformer_block_type": "post_ln", "share_position_embeddings": False}],
}
CASES = [(family, fields) for family, rows in MORE.items() for fields in rows]


@pytest.mark.parametrize(("family", "fields"), CASES)
def test_counts_what_it_builds(family, fields):
    model_class, config_class = FAMILIES[family]
    config = config_class(**SHAPE, **fields)
    with torch.device("meta"):
        model = model_class(config)
    assert sum(p.numel() for p in model.parameters()) == num_parameters(config)
    assert num_parameters(config, padded=False) < num_parameters(config)


@pytest.mark.parametrize(("family", "fields"), CASES)
def test_comes_back(family, fields):
    model_class, config_class = FAMILIES[family]
    config = config_class(**SHAPE, **fields)
    state = json.loads(json.dumps(describe(family, config)))
    assert understand(state, where="here") == (model_class, config)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_says_what_it_means(family):
    for name, field in FAMILIES[family][1].model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_what_null_stands_for_is_the_same_model():
    _, bert = FAMILIES["bert"]
    assert effective(bert(**SHAPE)) == effective(bert(**SHAPE, num_tokentypes=2))
    _, t5 = FAMILIES["t5"]
    written = t5(
        **{**SHAPE, "num_layers": 9}, encoder_num_layers=2, decoder_num_layers=2, decoder_ffn_hidden_size=64
    )
    assert effective(t5(**SHAPE)) == effective(written)


def test_a_field_of_another_family_is_not_understood():
    state = describe("bert", FAMILIES["bert"][1](**SHAPE))
    state["architecture"]["family"] = "gpt"
    with pytest.raises(CheckpointError, match="bert_binary_head"):
        understand(state, where="here")
    with pytest.raises(CheckpointError, match="this version knows gpt, bert, t5, bart"):
        understand(describe("mamba", ModelConfig(**SHAPE)), where="here")
