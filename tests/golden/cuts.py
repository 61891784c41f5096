"""How Megatron cuts one layer among tensor-parallel ranks: rank `r` of `tp`."""

from __future__ import annotations

import torch

from tests.golden.sides import Sides
from tests.golden.whole import Tensors, Whole


def rows(tensor: torch.Tensor, tp: int, r: int) -> torch.Tensor:
    """Rank r's equal share of dim 0."""
    count = tensor.shape[0] // tp
    return tensor[r * count : (r + 1) * count].clone()


def columns(tensor: torch.Tensor, tp: int, r: int) -> torch.Tensor:
    """Rank r's equal share of dim 1, as memory of its own."""
    count = tensor.shape[1] // tp
    return tensor[:, r * count : (r + 1) * count].contiguous().clone()


def padded_table(table: torch.Tensor, tp: int) -> torch.Tensor:
    """A table padded to a multiple of 128 · tp rows; the rows behind the vocabulary are large garbage."""
    missing = -len(table) % (128 * tp)
    garbage = 50 + torch.randn((missing, table.shape[1]), generator=torch.Generator().manual_seed(9))
    return torch.cat([table, garbage.to(table.dtype)])


def query_key_value(
    whole: Whole | Sides, layer: Tensors, kind: str, version: float, tp: int, r: int
) -> torch.Tensor:
    """Rank r's fused query-key-value `kind` (weight or bias), its rows in the order of that checkpoint_version.

    0: [3, heads, head dim]; 1: [heads, head dim, 3]; 2 and 3: [group, its queries then key then value, head dim].
    """
    q, k, v = (layer[f"{name}.{kind}"] for name in "qkv")
    head_dim = len(q) // whole.heads
    my_heads = range(r * whole.heads // tp, (r + 1) * whole.heads // tp)
    my_groups = range(r * whole.groups // tp, (r + 1) * whole.groups // tp)

    def head(tensor: torch.Tensor, number: int) -> torch.Tensor:
        return tensor[number * head_dim : (number + 1) * head_dim]

    out: list[torch.Tensor] = []
    if version == 0:
        for tensor in (q, k, v):
            for number in my_heads:
                out += [head(tensor, number)]
    elif version == 1:
        for number in my_heads:
            for channel in range(head_dim):
                for tensor in (q, k, v):
                    out += [head(tensor, number)[channel : channel + 1]]
    else:
        per_group = whole.heads // whole.groups
        for group in my_groups:
            for number in range(group * per_group, (group + 1) * per_group):
                out += [head(q, number)]
            out += [head(k, group), head(v, group)]
    return torch.cat(out)


def key_value(whole: Sides, layer: Tensors, kind: str, version: float, tp: int, r: int) -> torch.Tensor:
    """Rank r's fused key-value of a decoder's look at the encoder: 0: [2, heads, dim]; 1: [heads, dim, 2]; 2, 3: [heads, 2, dim]."""
    k, v = layer[f"cross_k.{kind}"], layer[f"cross_v.{kind}"]
    dim, out = len(k) // whole.heads, []
    mine = range(r * whole.heads // tp, (r + 1) * whole.heads // tp)
    if version == 0:
        for tensor in (k, v):
            for head in mine:
                out += [tensor[head * dim : (head + 1) * dim]]
    elif version == 1:
        for head in mine:
            for channel in range(dim):
                at = head * dim + channel
                out += [k[at : at + 1], v[at : at + 1]]
    else:
        for head in mine:
            out += [k[head * dim : (head + 1) * dim], v[head * dim : (head + 1) * dim]]
    return torch.cat(out)


def first_linear(layer: Tensors, kind: str, tp: int, r: int) -> torch.Tensor:
    """Rank r's first linear of the feed-forward layer: where gated, its gates and then its ups."""
    up = rows(layer[f"up.{kind}"], tp, r)
    if f"gate.{kind}" not in layer:
        return up
    return torch.cat([rows(layer[f"gate.{kind}"], tp, r), up])
