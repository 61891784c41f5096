"""The part of a tensor that this process holds, as a plain tensor, and where in the whole it lies.

Knows DTensors. Sends nothing: every process answers for itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megalith.checkpoint.slices import Slice, shape_of, whole
from megalith.topology.sharded import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement


@dataclass(frozen=True)
class Held:
    """`memory` is shared with the tensor; `shape` is the whole one's; `part` may be empty."""

    memory: torch.Tensor
    shape: tuple[int, ...]
    part: Slice


def held(tensors: Mapping[str, torch.Tensor]) -> dict[str, Held]:
    """What this process holds of each tensor. Raises `ValueError` for a placement that is not one run of each dim."""
    known: dict[object, tuple[int, int]] = {}
    return {name: _held(name, tensor, known) for name, tensor in tensors.items()}


def _held(name: str, tensor: torch.Tensor, known: dict[object, tuple[int, int]]) -> Held:
    shape = tuple(tensor.shape)
    if not is_dtensor(tensor):
        return Held(tensor.detach(), shape, whole(shape))
    memory = tensor.to_local().detach()
    part = tuple(_run(tensor, dim, known) for dim in range(len(shape)))
    if any(p.is_partial() for p in tensor.placements) or (memory.numel() and shape_of(part) != memory.shape):
        raise ValueError(
            f"{name}: {list(memory.shape)} of {list(shape)} placed {tensor.placements} is no slice"
        )
    return Held(memory, shape, part)


def _run(tensor: DTensor, dim: int, known: dict[object, tuple[int, int]]) -> tuple[int, int]:
    """Which indices of a dim this process has: the dim's numbers, placed as the tensor is, say so themselves.

    That holds for every placement, those of torch's own that have no public name included.
    """
    from torch.distributed.tensor import Replicate, distribute_tensor

    size = tensor.shape[dim]
    placements = tuple(p if _cuts(p, dim) else Replicate() for p in tensor.placements)
    if all(p.is_replicate() for p in placements):
        return 0, size
    key = (tensor.device_mesh, placements, dim, size)
    if key not in known:
        numbers = torch.arange(size).view(*[1] * dim, size)
        placed = distribute_tensor(numbers, tensor.device_mesh, placements, src_data_rank=None)
        mine = placed.to_local().flatten().cpu()
        first = int(mine[0]) if len(mine) else 0
        if not torch.equal(mine, torch.arange(first, first + len(mine))):
            raise ValueError(f"{placements} of {size} is not one run")
        known[key] = first, first + len(mine)
    return known[key]


def _cuts(placement: Placement, dim: int) -> bool:
    return not placement.is_replicate() and getattr(placement, "dim", None) == dim
