"""A parameter as this process holds it: a plain tensor that shares memory with it, for kernels that know no DTensor.

Norm, clipping and update run on these, so there is one code path for one process and for many.
"""

from __future__ import annotations

import torch
from torch import nn

from megalith.topology.sharded import is_dtensor
from megalith.topology.topology import Topology


def local_parameter(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter itself, or a plain one over the memory of a DTensor's local part."""
    if not is_dtensor(parameter):
        return parameter
    return nn.Parameter(parameter.to_local().detach(), requires_grad=parameter.requires_grad)


def place_gradient(parameter: nn.Parameter, local: nn.Parameter) -> None:
    """Gives the local parameter the gradient of its owner, without a copy."""
    if local is not parameter:
        gradient = parameter.grad
        local.grad = gradient.to_local() if is_dtensor(gradient) else gradient


def like(parameter: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """A tensor placed as `parameter` is, over the memory of `part`."""
    if not is_dtensor(parameter):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def counted_here(parameter: torch.Tensor, topology: Topology) -> bool:
    """Does a norm over shards and tensor ranks count what this process holds? Replicas count once, on coordinate 0."""
    mesh = topology.weights
    shared: set[str] = set()
    if is_dtensor(parameter):
        names = parameter.device_mesh.mesh_dim_names or ()
        # A strided shard, which FSDP2 makes of a tensor-parallel one, answers is_shard() with no.
        shared = {name for name, p in zip(names, parameter.placements, strict=True) if not p.is_replicate()}
    return mesh is None or all(
        axis in shared or mesh[axis].get_local_rank() == 0 for axis in ("shard", "tensor")
    )
