"""What this process sends to the others, counted call by call at torch's dispatcher, whoever makes the call.

    with Traffic(topology) as traffic: …     traffic.sent ─▶ {(axis, operation): bytes on the wire}

Bytes on the wire are those of ring algorithms, which NCCL and gloo use for large tensors: of n processes each sends
2(n−1)/n of a tensor that is summed, (n−1)/n of one that is gathered or scattered. Knows groups by axis; knows no model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megalith.topology.sizes import AXES
from megalith.topology.topology import Topology

SUM, GATHER, SCATTER, SEND, OTHER = "sum", "gather", "scatter", "send", "other"
_OPERATIONS = {
    "allreduce_": SUM,
    "_allgather_base_": GATHER,
    "allgather_": GATHER,
    "_reduce_scatter_base_": SCATTER,
    "reduce_scatter_": SCATTER,
    "send": SEND,
    "alltoall_base_": OTHER,
    "alltoall_": OTHER,
    "broadcast_": OTHER,
}
_WIRE: dict[str, Callable[[int, int], float]] = {
    # (bytes that this process puts in, processes) → bytes that it sends
    SUM: lambda size, n: 2 * size * (n - 1) / n,
    GATHER: lambda size, n: size * (n - 1),
    SCATTER: lambda size, n: size * (n - 1) / n,
    SEND: lambda size, n: size,
    OTHER: lambda size, n: size * (n - 1) / n,
}
Sent = Counter[tuple[str, str]]
"""Bytes by (axis, operation)."""


class Traffic(TorchDispatchMode):
    """Counts while it is entered; `sent`: bytes on the wire. A group of all processes counts for the last of its axes."""

    def __init__(self, topology: Topology) -> None:
        super().__init__()
        groups = {axis: topology.group(axis) for axis in AXES}
        self._axes = {group.group_name: axis for axis, group in groups.items() if group is not None}
        if (mesh := topology.weights) is not None:  # where context ranks are data ranks
            data = {mesh[axis].get_group().group_name: axis for axis in ("replicate", "shard")}
            self._axes = data | self._axes
        self.sent: Sent = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # fmt: skip
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Sequence[Any]) -> None:
        operation = _OPERATIONS.get(name)
        group = next((found for found in map(_as_group, args) if found is not None), None)
        if operation is None or group is None:
            return
        tensors = list(_tensors(args[0] if operation in (SUM, SEND) or name == "broadcast_" else args[1]))
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.sent[self._axes.get(group.group_name, "all"), operation] += round(
            _WIRE[operation](size, group.size())
        )


def _as_group(argument: Any) -> dist.ProcessGroup | None:
    if isinstance(argument, torch.ScriptObject):
        try:
            return dist.ProcessGroup.unbox(argument)
        except RuntimeError:  # a reduction or a work
            return None
    return None


def _tensors(argument: Any) -> Iterator[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, list | tuple):
        for item in argument:
            yield from _tensors(item)
