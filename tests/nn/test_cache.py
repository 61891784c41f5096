"""The key-value cache changes nothing but the cost."""

from __future__ import annotations

import pytest
import torch

from megalith.errors import UnsupportedError
from megalith.models.config import ModelConfig
from megalith.nn.cache import KVCache
from tests.reference.common import random_model

MODELS = {
    "gpt2": {},
    "llama": {
        "position_embedding_type": "rope",
        "normalization": "rmsnorm",
        "activation": "swiglu",
        "num_query_groups": 2,
        "bias": False,
    },
    "interleaved part": {
        "position_embedding_type": "rope",
        "rotary_percentage": 0.5,
        "rotary_interleaved": True,
        "num_query_groups": 1,
    },
    "relative": {"position_embedding_type": "relative", "relative_attention_max_distance": 17},
    "post_ln eager": {"transformer_block_type": "post_ln", "attention_core": "eager"},
    "no positions": {"position_embedding_type": "none", "kv_channels": 8},
}
B, T = 3, 12


def make_model(name):
    shape = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "max_position_embeddings": T}
    return random_model(ModelConfig(vocab_size=13, **shape, **MODELS[name]))


def tokens():
    return torch.randint(13, (B, T), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5] + [1] * 7, [3, 4, 5]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_equals_no_cache(name, pieces):
    """Prompt at once, in chunks, or token by token."""
    model = make_model(name)
    with torch.inference_mode():
        whole = model.logits(model(tokens()))
        cache = model.new_cache(B, T)
        parts = [model.logits(model(piece, cache=cache)) for piece in tokens().split(pieces, dim=1)]
    assert cache.length == T
    assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-10 * whole.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_the_same(name):
    model = make_model(name)
    rows, cached = tokens()[:, :4], tokens()[:, :4]
    cache = model.new_cache(B, T)
    with torch.inference_mode():
        for _ in range(8):
            rows = torch.cat((rows, model.logits(model(rows))[:, -1:].argmax(-1)), 1)
            hidden = model(cached[:, cache.length :], cache=cache)
            cached = torch.cat((cached, model.logits(hidden)[:, -1:].argmax(-1)), 1)
    assert torch.equal(rows, cached)


def test_rewind_forgets():
    model = make_model("llama")
    cache = model.new_cache(B, T)
    with torch.inference_mode():
        model(tokens(), cache=cache)
        cache.rewind(5)
        again = model(tokens()[:, 5:], cache=cache)
        assert (again - model(tokens())[:, 5:]).abs().max() < 1e-10


def test_a_full_cache_and_a_wrong_batch_are_errors():
    model = make_model("gpt2")
    cache = model.new_cache(B, 4)
    model(tokens()[:, :3], cache=cache)
    with pytest.raises(UnsupportedError, match="3 tokens cached and 2 new ones"):
        model(tokens()[:, 3:5], cache=cache)
    assert cache.length == 3
    with pytest.raises(UnsupportedError, match="batch of 2 rows"):
        model(tokens()[:2, 3:4], cache=cache)


def test_documents_with_a_cache_are_refused():
    model = make_model("gpt2")
    with pytest.raises(UnsupportedError, match="does not remember which document"):
        model(tokens(), documents=torch.zeros(B, T), cache=model.new_cache(B, T))


def test_the_position_table_ends():
    model = make_model("gpt2")
    cache = model.new_cache(1, 20)
    model(tokens()[:1], cache=cache)
    with pytest.raises(UnsupportedError, match="13 tokens, but the model has 12 learned positions"):
        model(tokens()[:1, :1], cache=cache)


def test_shape_and_dtype():
    model = make_model("llama")
    model.set_compute_dtype(torch.bfloat16)
    cache = model.new_cache(5, 7)
    assert cache.keys.shape == cache.values.shape == (2, 5, 2, 7, 4)
    assert cache.keys.dtype == torch.bfloat16
    assert KVCache(1, 2, 3, 4, 5).max_length == 3
