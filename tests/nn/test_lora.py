"""A low-rank product beside a plain one: written out by hand, and dropout that depends on nothing but sample, layer and place."""

from __future__ import annotations

import torch

from megalith.nn.attention import AttentionSpec, Shared
from megalith.nn.block import Block, BlockSpec
from megalith.nn.dropout import sample_keys
from megalith.nn.linear import Linear
from megalith.nn.lora import PROJECTIONS, add_lora
from megalith.nn.mlp import MLPSpec
from megalith.nn.visibility import Lookback


def layer(rank=2, scale=0.5, dropout=0.0, projection="mlp.up"):
    torch.manual_seed(3)
    linear = Linear(6, 4, axes=("mlp", "embed")).double()
    torch.nn.init.normal_(linear.weight)
    torch.nn.init.normal_(linear.bias)
    made = add_lora(linear, rank=rank, scale=scale, dropout=dropout, projection=projection)
    torch.nn.init.normal_(made.lora_a)
    torch.nn.init.normal_(made.lora_b)
    return made


def test_written_out():
    linear, x = layer(), torch.randn(3, 5, 6, dtype=torch.float64)
    whole = linear.weight + 0.5 * linear.lora_b @ linear.lora_a
    torch.testing.assert_close(linear(x), x @ whole.T + linear.bias, rtol=1e-13, atol=1e-13)


def test_b_of_zero_is_the_plain_layer_bit_for_bit():
    linear, x = layer(), torch.randn(3, 5, 6, dtype=torch.float64)
    torch.nn.init.zeros_(linear.lora_b)
    assert torch.equal(linear(x), Linear.forward(linear, x))


def test_casts_as_the_weight_does():
    linear = layer().float()
    linear.compute_dtype = torch.bfloat16
    assert linear(torch.randn(2, 3, 6)).dtype == torch.bfloat16


def test_drops_what_a_reads_alone_and_by_sample():
    linear, x = layer(dropout=0.5), torch.ones(2, 50, 6, dtype=torch.float64)
    keys = sample_keys(1, 2, torch.tensor([7, 8]))
    linear.train()
    dropped = linear(x, keys) - Linear.forward(linear, x)
    narrow = linear.drop_lora(x, keys)
    torch.testing.assert_close(dropped, 0.5 * narrow @ linear.lora_a.T @ linear.lora_b.T)
    assert 0.4 < (narrow == 0).double().mean() < 0.6
    assert set(narrow.unique().tolist()) == {0.0, 2.0}
    one = linear.drop_lora(x[1:], keys[1:])
    assert torch.equal(one, narrow[1:]), "a sample's mask does not know its neighbours"
    linear.eval()
    assert torch.equal(linear(x), linear(x, keys))


def test_every_product_of_a_block_drops_by_a_mask_of_its_own():
    keys, x = sample_keys(1, 2, torch.tensor([7])), torch.ones(1, 20, 6, dtype=torch.float64)
    masks = [layer(dropout=0.5, projection=name).drop_lora(x, keys) for name in PROJECTIONS]
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def test_keys_reach_every_product_of_a_block():
    spec = AttentionSpec(width=8, heads=2, kv_heads=2, head_dim=4)
    block = Block(BlockSpec(spec, MLPSpec(8, 16, "swiglu"), cross=spec)).double()
    for name in PROJECTIONS:
        add_lora(block.get_submodule(name), rank=2, scale=1.0, dropout=0.5, projection=name)
    torch.manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    seen = []
    for name in PROJECTIONS:
        block.get_submodule(f"{name}.drop_lora").register_forward_hook(
            lambda module, given, out, name=name: seen.append((name, given[1]))
        )
    x, memory = (torch.randn(1, length, 8, dtype=torch.float64) for length in (5, 3))
    shared = Shared(Lookback()(0, 5, x.device), memory=memory)
    keys = sample_keys(1, 2, torch.tensor([7]))
    block.cross.core.forward = lambda q, k, v, across, keys: v[:, :, :1].expand_as(q)
    block.train()(x, shared, keys)
    assert {name for name, _ in seen} == set(PROJECTIONS)
    assert all(given is keys for _, given in seen)
