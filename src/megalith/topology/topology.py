"""One frozen object that says who this process is on every axis. Passed as an argument; there is no global state.

With one process there is no mesh and no process group, and every reduction is the identity: code above never asks
"are we distributed?". Knows nothing of models, nor of how the processes were started (`launch` does).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megalith.errors import TopologyError
from megalith.topology.sizes import AXES, Sizes

Value = TypeVar("Value")


@dataclass(frozen=True)
class Topology:
    """Sizes, this process's device, and the mesh of process groups (None with one process).

    Errors: `TopologyError` for sizes that cannot be, `UnsupportedError` for an axis that is not built.
    """

    sizes: Sizes = field(default_factory=Sizes)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None
    weights: DeviceMesh | None = None
    """The same processes as parameters lie on them: context ranks, which hold the same ones, count as data ranks."""

    def __post_init__(self) -> None:
        self.sizes.check()
        if (self.mesh is None) != (self.sizes.world == 1):
            raise TopologyError(
                f"{self.sizes} needs {self.sizes.world} processes", fix="start them, or use sizes of 1"
            )

    @classmethod
    def of(cls, sizes: Sizes, device: str | torch.device = "cpu") -> Topology:
        """The topology of this process among the started ones: sizes as asked, `device` of this process.

        Every process must call it, with the same sizes. Errors: `TopologyError` when their number does not fit.
        """
        sizes.check(world=started()[1])
        here = choose_device(device)
        if sizes.world == 1:
            return cls(sizes, here)
        shape = tuple(getattr(sizes, axis) for axis in AXES)
        mesh = init_device_mesh(here.type, shape, mesh_dim_names=AXES)
        if sizes.context == 1:
            return cls(sizes, here, mesh, mesh)
        copies = (sizes.copies // sizes.sharing, sizes.sharing)
        shape, names = (sizes.pipeline, *copies, sizes.tensor), ("pipeline", "replicate", "shard", "tensor")
        return cls(sizes, here, mesh, init_device_mesh(here.type, shape, mesh_dim_names=names))

    @classmethod
    def single(cls, device: str | torch.device = "cpu") -> Topology:
        """The topology of one process; `device` is "auto", "cpu", "cuda" or "cuda:N"."""
        return cls(Sizes(), choose_device(device))

    def size(self, axis: str) -> int:
        """Number of processes along an axis of `sizes.AXES`."""
        return int(getattr(self.sizes, axis))

    def rank(self, axis: str) -> int:
        """This process's coordinate along an axis."""
        return self.mesh[axis].get_local_rank() if self.mesh is not None else 0

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The process group along an axis; None when its size is 1."""
        return self.mesh[axis].get_group() if self.mesh is not None and self.size(axis) > 1 else None

    @property
    def data_size(self) -> int:
        """How many different shares a global batch is cut into."""
        return self.sizes.data

    @property
    def data_rank(self) -> int:
        """Which of these shares this process computes."""
        return self.rank("replicate") * self.size("shard") + self.rank("shard")

    @property
    def is_main(self) -> bool:
        """Is this the one process that prints and writes logs?"""
        return self.mesh is None or dist.get_rank() == 0

    @property
    def global_rank(self) -> int:
        """This process's number among all."""
        return 0 if self.mesh is None else dist.get_rank()

    def sum(self, value: torch.Tensor, *axes: str) -> torch.Tensor:
        """All-reduce `value` in place over several axes, one after the other. Not differentiable."""
        for axis in axes:
            if (group := self.group(axis)) is not None:
                dist.all_reduce(value, group=group)
        return value

    def agree(self, value: Value) -> Value:
        """The main process's `value` on every process: what one of them decides, all of them do. Small, picklable things."""
        if self.mesh is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """(…) of every process, all of one shape → (world, …). Not differentiable."""
        if self.mesh is None:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.sizes.world)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    def barrier(self) -> None:
        """Wait for every process."""
        if self.mesh is not None:
            dist.barrier()


def started() -> tuple[int, int]:
    """This process's number and how many there are: (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gathered(value: Value) -> list[Value]:
    """Every process's `value`, by rank, on every process. Small, picklable things."""
    if started()[1] == 1:
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """ "auto" → the first GPU when there is one, else the CPU; any other name is checked to exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TopologyError(
            f"no device is called {name!r}", where="device", fix="auto, cpu or cuda"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise TopologyError(f"{device.type} is not supported", where="device", fix="auto, cpu or cuda")
    available = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= available:
        found = f"{available} GPU{'s' if available != 1 else ''} found"
        raise TopologyError(f"{device} asked for, {found}", where="device", fix="auto or cpu")
    return device
