"""Data parallelism by FSDP2, in four named policies. Blocks first, then the stage around them.

    policy            weights at rest        gradients reduced            kept in between
    replicate         whole                  after the last micro-batch   whole gradients
    shard_optimizer   shards                 after the last micro-batch   whole gradients
    shard_grads       shards                 after every micro-batch      gathered weights
    shard_all         shards                 after every micro-batch      one block's weights at a time

`replicate` is a mesh whose shard axis has size 1; hybrid has both. Context ranks hold the same weights and see other tokens,
so they are more ranks of the same kind: replicas, or where anything is shared, sharers. Gradients are summed, never divided: the loss was.
Under a pipeline the schedule reduces after its last micro-batch, whatever the policy. Knows modules that have `blocks`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from megalith.topology.sharded import is_dtensor
from megalith.topology.topology import Topology

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule, OffloadPolicy

BY_HAND = {"relative_bias", "prompts"}
"""Modules whose parameters FSDP2 is never given: a few small ones, that every process holds whole."""


def share_data(module: nn.Module, topology: Topology, *, root: bool = False) -> None:
    """Put a block, or at last the stage, under FSDP2; the identity with one data-parallel and context rank.

    Without overlap the whole stage is one group, whose gradients are reduced when all of them are there. The stage's own
    parameters stay gathered after its forward, since the loss multiplies by the head.
    """
    if topology.sizes.copies == 1 or not (root or topology.sizes.overlap):
        return
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    reshard = topology.sizes.zero_stage == 3 and topology.sizes.sharing > 1 and not root
    fully_shard(
        module,
        mesh=data_mesh(topology),
        reshard_after_forward=reshard,
        mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False),
        offload_policy=_offload(topology),
        ignored_params=set(summed_by_hand(module, topology).values()),
    )
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(
        True
    )  # else gloo is asked for a premultiplied sum it does not have


def _offload(topology: Topology) -> OffloadPolicy:
    """Pinned where there is a GPU to copy to."""
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

    if not topology.sizes.offload:
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=topology.device.type == "cuda")


def data_mesh(topology: Topology) -> DeviceMesh:
    """The mesh that FSDP2 reduces and shards over: (replicate, shard), or shard alone."""
    mesh, sizes = topology.weights, topology.sizes
    assert mesh is not None
    return mesh["replicate", "shard"] if sizes.copies > sizes.sharing else mesh["shard"]


def summed_by_hand(stage: nn.Module, topology: Topology) -> dict[str, nn.Parameter]:
    """Parameters that several stages of one process share, which FSDP2 cannot: their gradients are summed afterwards.

    Relative biases and prompts always, small as they are; of an encoder-decoder's tables those that some process has in two
    stages.
    """
    held, ranks = getattr(stage, "holders", {}), topology.size("pipeline")

    def twice(name: str) -> bool:
        stages = held.get(name, ())
        return len({index % ranks for index in stages}) < len(stages)

    return {
        name: p
        for name, p in stage.named_parameters()
        if not BY_HAND.isdisjoint(name.split(".")) or twice(name)
    }


def under_fsdp(module: nn.Module) -> TypeGuard[FSDPModule]:
    """Is it one of FSDP2's? Where nobody has imported that, nothing is."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def begin_micro_batch(stage: nn.Module, topology: Topology, *, last: bool) -> None:
    """Says before a backward whether its gradients are reduced: those of the last one always are."""
    if under_fsdp(stage):
        stage.set_requires_gradient_sync(last or topology.sizes.zero_stage >= 2)
        stage.set_is_last_backward(last)


def reshard(stage: nn.Module) -> None:
    """Free gathered weights; afterwards parameters are what this process keeps (an evaluation leaves them gathered)."""
    for module in stage.modules():
        if under_fsdp(module):
            module.reshard()


def whole(parameter: torch.Tensor, device: torch.device) -> torch.Tensor:
    """All of a parameter at rest, there, whoever holds its parts. Every process that has one calls it alike. Not differentiable."""
    tensor = parameter.detach().to(device)
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def sum_gradients(stages: Sequence[nn.Module], topology: Topology) -> None:
    """Over the data-parallel and context ranks, of the parameters that FSDP2 was not given, each once."""
    parameters = {name: p for stage in stages for name, p in summed_by_hand(stage, topology).items()}
    for parameter in parameters.values():
        if parameter.grad is not None:
            topology.sum(local_gradient(parameter), "replicate", "shard", "context")


def local_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """The plain tensor of a gradient that this process holds; shares memory with `.grad`."""
    gradient = parameter.grad
    assert gradient is not None
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient
