"""Collectives inside a model, as differentiable pairs: the backward of each is the forward of its conjugate.

    copy   x ─▶ x            conjugate: reduce     enters a region where every rank computes a part
    reduce x ─▶ Σ x          conjugate: copy       leaves it
    gather (B, T/n, D) ─▶ (B, T, D)   conjugate: scatter_sum   the same two doors, the sequence shared outside
    scatter_sum (B, T, D) ─▶ (B, T/n, D)
    join   (…, V/n) ─▶ (…, V)         backward: this rank's slice (what follows is computed alike on every rank)

Plain `torch.distributed` calls in autograd functions, which compile as part of a block. Knows tensors and groups.

Legend: B batch, T time, D width, V vocabulary, n ranks of the group
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

Group = dist.ProcessGroup


def copy(x: torch.Tensor, group: Group) -> torch.Tensor:
    """The same tensor; its gradient is the sum over the group."""
    return _Copy.apply(x, group)


def reduce(x: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum over the group; its gradient passes as it is."""
    return _Reduce.apply(x, group)


def gather(x: torch.Tensor, group: Group) -> torch.Tensor:
    """(B, T/n, …) → (B, T, …), parts in rank order; its gradient is summed and cut again."""
    return _Gather.apply(x, group)


def scatter_sum(x: torch.Tensor, group: Group) -> torch.Tensor:
    """(B, T, …) → this rank's (B, T/n, …) of the sum over the group; its gradient is gathered."""
    return _ScatterSum.apply(x, group)


def join(x: torch.Tensor, group: Group) -> torch.Tensor:
    """(…, V/n) → (…, V), parts in rank order; every rank goes on alike, so its gradient is this rank's slice."""
    return _Join.apply(x, group)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce(gradient, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return reduce_scatter(gradient, ctx.group), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_gather(gradient, ctx.group), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group, ctx.width = group, x.shape[-1]
        return all_gather(x.movedim(-1, 1), group).movedim(1, -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        first = dist.get_rank(ctx.group) * ctx.width
        return gradient.narrow(-1, first, ctx.width), None


# -- the calls themselves, not differentiable; every one copies, none changes its argument ------------------------


def all_reduce(x: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum over the group."""
    x = x.contiguous().clone()
    dist.all_reduce(x, group=group)
    return x


def all_max(x: torch.Tensor, group: Group) -> torch.Tensor:
    """The largest over the group, element by element."""
    x = x.contiguous().clone()
    dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
    return x


def all_gather(x: torch.Tensor, group: Group) -> torch.Tensor:
    """The group's tensors behind each other along dim 1."""
    parts = dist.get_world_size(group)
    out = x.new_empty(parts, *x.shape)
    _gather_into(out.flatten(0, 1), x.contiguous(), group=group)
    return out.transpose(0, 1).flatten(1, 2)


def reduce_scatter(x: torch.Tensor, group: Group) -> torch.Tensor:
    """This rank's piece, along dim 1, of the sum over the group."""
    parts = dist.get_world_size(group)
    x = x.unflatten(1, (parts, -1)).transpose(0, 1).contiguous()
    out = torch.empty_like(x[0])
    _scatter_into(out, x.flatten(0, 1), group=group)
    return out


# torch 2.13 renames these two and warns at every call of the old names.
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
