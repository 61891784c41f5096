"""Tensor and sequence parallelism: a pass that changes the classes of layers by the rules table.

    Linear, out-axis shared   ─▶ ColumnParallelLinear        TokenEmbedding ─▶ VocabParallelEmbedding
    Linear, in-axis shared    ─▶ RowParallelLinear           CrossEntropy   ─▶ VocabParallelCrossEntropy
    LoRALinear                ─▶ the same with its two matrices, one of them shared, too

Works on a meta model, in place; the identity when the axis has size 1. Knows layers and heads by class and by `axes`, no
model.
"""

from __future__ import annotations

import torch
from torch import nn

from megalith.models.heads import MaskedHead, Pooler
from megalith.nn.attention import Attention
from megalith.nn.dropout import Dropout, ProbabilityDropout
from megalith.nn.embedding import OutputBias, OutputHead, PositionEmbedding, TokenEmbedding
from megalith.nn.linear import Linear
from megalith.nn.lora import LoRALinear
from megalith.nn.loss import CrossEntropy
from megalith.nn.norm import LayerNorm, RMSNorm
from megalith.nn.position import RelativeBias
from megalith.nn.prompt import Prompts
from megalith.parallel import layers
from megalith.parallel.layers import Shares, become
from megalith.parallel.lora import ColumnParallelLoRA, RowParallelLoRA, SharedInputDropout
from megalith.parallel.rules import shared_dim
from megalith.topology.topology import Topology


def share_tensors(stage: nn.Module, topology: Topology) -> None:
    """The pass. Marks with `partial_gradients` the parameters whose gradient every tensor rank has a part of."""
    group = topology.group("tensor")
    if group is None:
        return
    sequence = topology.sizes.sequence_parallel
    shares = Shares(group, topology.rank("tensor"), topology.size("tensor"), sequence)
    for module in list(stage.modules()):
        _share(module, shares, topology)
        if sequence:
            _share_sequence(module, shares)


def _share(module: nn.Module, shares: Shares, topology: Topology) -> None:
    if isinstance(module, Linear):
        dim = shared_dim(module.axes, "tensor")
        if isinstance(module, LoRALinear):
            _share_lora(module, dim, shares, topology)
        elif dim == 0:
            become(module, layers.ColumnParallelLinear, shares)
            _shard(module, topology, weight=0, bias=0)
        elif dim == 1:
            become(module, layers.RowParallelLinear, shares)
            _shard(module, topology, weight=1)
    elif isinstance(module, TokenEmbedding):
        head = isinstance(module, OutputHead)
        become(module, layers.VocabParallelHead if head else layers.VocabParallelEmbedding, shares)
        _shard(module, topology, weight=0)
    elif isinstance(module, OutputBias):
        _shard(module, topology, bias=0)
    elif isinstance(module, CrossEntropy):
        become(module, layers.VocabParallelCrossEntropy, shares).swapped()
    elif isinstance(module, RelativeBias):
        become(module, layers.SharedBias, shares)
        _shard(module, topology, weight=1)
    elif isinstance(module, ProbabilityDropout):
        become(module, layers.HeadDropout, shares)
    elif isinstance(module, Attention):
        module.kv_heads //= shares.parts


def _share_lora(module: LoRALinear, dim: int | None, shares: Shares, topology: Topology) -> None:
    if dim == 0:
        become(module, ColumnParallelLoRA, shares)
        _shard(module, topology, weight=0, bias=0, lora_b=0)
        _partial(module, "lora_a")
    elif dim == 1:
        become(module, RowParallelLoRA, shares)
        become(module.drop_lora, SharedInputDropout, shares)
        _shard(module, topology, weight=1, lora_a=1)
        _partial(module, "lora_b")


def _share_sequence(module: nn.Module, shares: Shares) -> None:
    """What lies between the parallel regions sees a part of the sequence, so its gradients are parts, too."""
    if isinstance(module, LayerNorm | RMSNorm):
        _partial(module, "weight", "bias")
    elif isinstance(module, layers.RowParallelLinear):
        _partial(module, "bias")
    elif isinstance(module, PositionEmbedding):
        become(module, layers.SequencePositionEmbedding, shares)
        _partial(module, "weight")
    elif isinstance(module, Prompts):
        become(module, layers.SequencePrompts, shares)
        for part in module.tables.modules():
            _partial(part, *(name for name, _ in part.named_parameters(recurse=False)))
    elif isinstance(module, MaskedHead):
        become(module, layers.SequenceMaskedHead, shares)
        _partial(module.dense, "weight", "bias")
    elif isinstance(module, Pooler):
        become(module, layers.SequencePooler, shares)
    elif type(module) is Dropout:
        become(module, layers.SequenceDropout, shares)


def _shard(module: nn.Module, topology: Topology, **dims: int) -> None:
    """Replaces whole meta parameters by DTensors of which this rank holds one piece."""
    from torch.distributed.tensor import DTensor, Shard

    assert topology.weights is not None
    for name, dim in dims.items():
        whole = getattr(module, name, None)
        if whole is None:
            continue
        shape = list(whole.shape)
        shape[dim] //= topology.size("tensor")
        piece = torch.empty(shape, dtype=whole.dtype, device=whole.device)
        shard = DTensor.from_local(piece, topology.weights["tensor"], [Shard(dim)], run_check=False)
        setattr(module, name, nn.Parameter(shard, requires_grad=whole.requires_grad))


def _partial(module: nn.Module, *names: str) -> None:
    found = [name for name in names if getattr(module, name, None) is not None]
    before = getattr(module, "partial_gradients", ())
    module.partial_gradients = tuple(dict.fromkeys([*before, *found]))  # type: ignore[assignment]  # finish_gradients sums them
