"""The core that SDPA gives way to on a CPU computes what SDPA computes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from megalith.nn.cores import WRITTEN_OUT, faster_written_out, written_out

BATCH, HEADS, GROUPS, QUERIES, KEYS, WIDTH = 2, 4, 2, 5, 7, 8


def make(dtype=torch.float64, queries=QUERIES, keys=KEYS):
    """q, k and v with the strides of heads."""
    torch.manual_seed(0)

    def heads(count, length):
        return torch.randn(BATCH, length, count, WIDTH, dtype=dtype, requires_grad=True)

    leaves = heads(HEADS, queries), heads(GROUPS, keys), heads(GROUPS, keys)
    return leaves, [leaf.transpose(1, 2) for leaf in leaves]


MASKS = {
    "none": lambda: None,
    "padding": lambda: (torch.arange(KEYS) < torch.tensor([[7], [4]]))[:, None, None],
    "bias": lambda: torch.randn(1, HEADS, QUERIES, KEYS, dtype=torch.float64, requires_grad=True),
}


@pytest.mark.parametrize(("mask", "scale"), itertools.product(MASKS, (None, 0.7)))
def test_written_out_is_sdpa(mask, scale):
    found = []
    for attend in (
        written_out,
        lambda q, k, v, m, s: F.scaled_dot_product_attention(q, k, v, attn_mask=m, scale=s, enable_gqa=True),
    ):
        leaves, (q, k, v) = make()
        torch.manual_seed(1)
        m = MASKS[mask]()
        y = attend(q, k, v, m, scale)
        (y * torch.arange(y.numel()).view_as(y)).sum().backward()
        found.append([y, *(leaf.grad for leaf in leaves), *([] if mask != "bias" else [m.grad])])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_where_it_is_faster():
    """Under gradients on a CPU: in half precisions, up to a size, and always under a mask that learns."""
    _, (q, k, _) = make(torch.bfloat16)
    assert faster_written_out(q, k, None)
    with torch.no_grad():
        assert not faster_written_out(q, k, None)
    _, (wide, keys, _) = make()
    assert not faster_written_out(wide, keys, None)
    assert faster_written_out(wide, keys, MASKS["bias"]())
    assert not faster_written_out(wide, keys, MASKS["bias"]().detach())
    long = torch.empty(1, 1, 1, WIDTH, dtype=torch.bfloat16, requires_grad=True).expand(
        1, 1, WRITTEN_OUT, WIDTH
    )
    assert not faster_written_out(long, k, None)
