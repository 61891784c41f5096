"""Single layers: casts, norms, positions, and what a half-precision run computes where."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from megalith.models.config import ModelConfig
from megalith.models.gpt import GPT
from megalith.nn.axes import AXES
from megalith.nn.linear import Linear
from megalith.nn.norm import LayerNorm, RMSNorm, make_norm
from megalith.nn.position import Rotary, RotaryScaling, relative_bucket
from megalith.topology.rng import initialise


def filled(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def tiny(**fields):
    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 16}
    model = GPT(ModelConfig(**{"vocab_size": 50, "hidden_dropout": 0.0, **shape, **fields}))
    initialise(model.named_parameters(), model.init_rules(), 0)
    return model


@pytest.mark.parametrize("bias", [True, False])
def test_linear_casts_equal_autocast(bias):
    layer = filled(Linear(24, 16, axes=("mlp", "embed"), bias=bias))
    x = torch.randn(5, 24, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = F.linear(x, layer.weight, layer.bias)
    layer.compute_dtype = torch.bfloat16
    found = layer(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted)
    gradients = [
        torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()]) for y in (found, wanted)
    ]
    for a, b in zip(*gradients, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_a_whole_model_equals_autocast():
    """bf16 by our casts against the same model in fp32 under torch.autocast: loss and every gradient, bit for bit."""
    tokens, targets = torch.randint(50, (2, 16)), torch.randint(50, (2, 16))
    results = []
    for autocast in (True, False):
        model = tiny(attention_core="sdpa")
        model.set_compute_dtype(None if autocast else torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = model.logits(model(tokens))
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters()}))
    (a, first), (b, second) = results
    assert torch.equal(a, b)
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]), name


@pytest.mark.parametrize("residual", [None, torch.bfloat16])
@pytest.mark.parametrize("wiring", ["pre_ln", "post_ln"])
def test_dtypes_of_stream_and_products(residual, wiring):
    model = tiny(transformer_block_type=wiring, position_embedding_type="rope", normalization="rmsnorm")
    model.set_compute_dtype(torch.bfloat16, residual)
    seen = {}
    for name, module in model.named_modules():
        hook = lambda _, args, out, name=name: seen.__setitem__(name, out.dtype)  # noqa: E731
        if name and name != "lookback":
            module.register_forward_hook(hook)
    model(torch.randint(50, (2, 16)))
    stream = residual or torch.float32
    for name in ("blocks.0", "blocks.1", "drop_embedding"):
        assert seen[name] == stream, name
    for name in ("blocks.0.attention.qkv", "blocks.1.mlp.down", "blocks.0.attention.core"):
        assert seen[name] == torch.bfloat16, name
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_every_product_layer_gets_the_compute_dtype():
    model = tiny()
    model.set_compute_dtype(torch.float16)
    layers = [m for m in model.modules() if isinstance(m, Linear)]
    assert len(layers) == 8
    assert {m.compute_dtype for m in [*layers, model, model.cross_entropy]} == {torch.float16}


def test_every_weight_has_axes():
    model = tiny(position_embedding_type="relative", share_embeddings_and_output_weights=False)
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if own:
            assert len(module.axes) == module.weight.ndim, name
            assert set(module.axes) <= set(AXES), name


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
def test_norms_keep_statistics_wide(kind):
    """bf16 in and out, fp32 inside: equal to the fp32 result rounded once."""
    norm = filled(kind(64, 1e-5))
    x = (torch.randn(7, 64) * 3 + 5).bfloat16()
    assert torch.equal(norm(x), norm(x.float()).bfloat16())
    assert make_norm("rmsnorm", 4, 1e-6).eps == 1e-6


def test_rotary_depends_on_the_distance_only():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator, dtype=torch.float64)
    for interleaved in (False, True):
        rotary = Rotary(16, interleaved=interleaved)

        def score(i, j, rotary=rotary):
            turned = [
                rotary.rotate(x, *rotary.angles(torch.tensor([p]), torch.float64))
                for x, p in ((q, i), (k, j))
            ]
            return (turned[0] * turned[1]).sum()

        assert abs(score(7, 3) - score(104, 100)) < 1e-12
        assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_rotary_angles_are_exact_at_far_positions():
    cos, sin = Rotary(4, base=10000.0).angles(torch.tensor([1_000_003]), torch.float32)
    for found, function in ((cos, math.cos), (sin, math.sin)):
        wanted = torch.tensor([function(1_000_003.0), function(1_000_003.0 / 100.0)])
        assert (found.flatten() - wanted).abs().max() < 1e-6


def test_rotary_leaves_the_rest_of_a_head_alone():
    x = torch.randn(1, 2, 3, 16)
    rotary = Rotary(4)
    turned = rotary.rotate(x, *rotary.angles(torch.arange(3), torch.float32))
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    assert not torch.equal(turned[:, :, 1, :4], x[:, :, 1, :4])


def test_linear_scaling_stretches_positions():
    plain, slowed = Rotary(8), Rotary(8, scaling=RotaryScaling("linear", 4.0))
    a = plain.angles(torch.tensor([3.0]), torch.float64)
    b = slowed.angles(torch.tensor([12.0]), torch.float64)
    assert all((x - y).abs().max() < 1e-15 for x, y in zip(a, b, strict=True))


def test_relative_buckets_grow_with_distance():
    distance = -torch.arange(300)
    buckets = relative_bucket(distance, 32, 128, bidirectional=False)
    assert buckets[:16].tolist() == list(range(16))
    assert (buckets.diff() >= 0).all()
    assert buckets.max() == buckets[128] == 31
    ahead = relative_bucket(torch.arange(1, 10), 32, 128, bidirectional=False)
    assert ahead.eq(0).all()
    both = relative_bucket(torch.tensor([-3, 3]), 32, 128, bidirectional=True)
    assert both.tolist() == [3, 19]
