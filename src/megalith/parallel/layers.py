"""Layers that hold a part of their weight, or see a part of the sequence: what `tensor` turns plain layers into.

Each is the plain layer with its collectives written out. Sharded parameters are DTensors at rest and plain local tensors in
every computation. With sequence parallelism the residual stream is (B, T/n, D), and entering and leaving a layer gathers and
scatters the sequence instead of copying and summing.

    column   x ─ copy|gather ─▶ x · Wₖᵀ            (…, out/n)
    row      xₖ · Wₖᵀ ─ reduce|scatter_sum ─▶ + b   (…, out)

Legend: B batch, T time, D width, V true vocabulary, n tensor ranks, N rows of a chunk
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed import ProcessGroup

from megalith.models.heads import MaskedHead, Pooler
from megalith.nn.dropout import Dropout, ProbabilityDropout
from megalith.nn.embedding import OutputHead, PositionEmbedding, TokenEmbedding
from megalith.nn.linear import Linear
from megalith.nn.loss import CrossEntropy
from megalith.nn.position import RelativeBias
from megalith.nn.prompt import Prompts
from megalith.topology import collectives


@dataclass(frozen=True)
class Shares:
    """This rank's place along the tensor axis, and the two doors of a parallel region."""

    group: ProcessGroup
    part: int
    parts: int
    sequence: bool

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """From the residual stream into a region where every rank computes a part."""
        return (collectives.gather if self.sequence else collectives.copy)(x, self.group)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """The parts added up, back on the residual stream."""
        return (collectives.scatter_sum if self.sequence else collectives.reduce)(x, self.group)


def local(parameter: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The plain tensor that this rank holds of a parameter, cast to `dtype`. Differentiable."""
    from torch.distributed.tensor import DTensor

    # Not `is_dtensor`: a compiler's stand-in for a parameter has none of its class's own attributes.
    tensor = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return tensor if dtype is None else tensor.to(dtype)


class ColumnParallelLinear(Linear):
    """Each rank makes a part of the outputs."""

    shares: Shares

    def forward(self, x: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        x = self.shares.enter(x.to(self.compute_dtype or x.dtype))  # cast first: half the bytes to send
        return F.linear(
            x, local(self.weight, x.dtype), None if self.bias is None else local(self.bias, x.dtype)
        )

    def extra_repr(self) -> str:
        return _describe(self, 0)


class RowParallelLinear(Linear):
    """Each rank has a part of the inputs; the bias, which every rank holds, is added once, after the sum."""

    shares: Shares

    def forward(self, x: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        x = x.to(self.compute_dtype or x.dtype)
        y = self.shares.leave(F.linear(x, local(self.weight, x.dtype)))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return _describe(self, 1)


def _describe(layer: Linear, dim: int) -> str:
    shape, held = layer.weight.shape, local(layer.weight.detach()).shape
    sequence = ", sequence parallel" if layer.shares.sequence else ""  # type: ignore[union-attr]
    return f"{shape[1]} → {shape[0]}, tensor={layer.shares.parts}, local {held[dim]}{sequence}"  # type: ignore[union-attr]


class VocabParallelEmbedding(TokenEmbedding):
    """Each rank holds a range of the vocabulary's rows, looks up the tokens in it, and multiplies by it."""

    shares: Shares

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        weight = local(self.weight)
        row = tokens - self.shares.part * weight.shape[0]
        outside = (row < 0) | (row >= weight.shape[0])
        x = F.embedding(row.masked_fill(outside, 0), weight).masked_fill(outside[..., None], 0)
        return self.shares.leave(x)

    def logits(self, hidden: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.shares.enter(hidden.to(self.compute_dtype or hidden.dtype))
        added = None if bias is None else local(bias, hidden.dtype)
        part = F.linear(hidden, local(self.weight, hidden.dtype), added)
        return collectives.join(part, self.shares.group)[..., : self.vocabulary]

    def extra_repr(self) -> str:
        rows = local(self.weight.detach()).shape[0]
        return f"{super().extra_repr()}, tensor={self.shares.parts}, local {rows}"


class VocabParallelHead(VocabParallelEmbedding, OutputHead):
    """The same for an untied head."""


class VocabParallelCrossEntropy(CrossEntropy):
    """The logits of a chunk stay sharded: three sums over its rows, instead of a gather of its logits."""

    shares: Shares

    def swapped(self) -> None:
        """The elementwise part now talks to the other ranks."""
        softmax = ShardedSoftmax(self.shares)
        self.elementwise, self.value = softmax, softmax.value

    def forward(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        vocabulary: int,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden = self.shares.enter(hidden.to(self.compute_dtype or hidden.dtype))
        table = local(weight)
        first = self.shares.part * table.shape[0]
        held = min(max(vocabulary - first, 0), table.shape[0])
        column = targets - first
        inside = (column >= 0) & (column < held)
        mine = torch.where(inside, column, torch.where(targets >= 0, held, -1))
        return super().forward(hidden, table, mine, held, None if bias is None else local(bias))


class ShardedSoftmax:
    """`softmax_minus_one_hot` where each rank has a range of the columns.

    A target is a column here, the width of the part where another rank has it, or −1 where it is not counted.
    """

    def __init__(self, shares: Shares) -> None:
        self.shares = shares

    def __call__(
        self, logits: torch.Tensor, targets: torch.Tensor, wide: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Part of the logits (N, V/n) → the rows' summed loss, the same on every rank, and this part's gradient."""
        width, dtype = logits.shape[-1], logits.dtype
        powers, total, loss = self._powers(logits, targets, wide)
        if width:
            counted, here = (targets >= 0).to(wide), (targets >= 0) & (targets < width)
            powers *= (counted / total)[:, None]
            powers.scatter_add_(-1, self._column(targets, width), -here.to(wide)[:, None])
        return loss, powers.to(dtype)

    def value(self, logits: torch.Tensor, targets: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
        """The loss alone, for evaluation."""
        return self._powers(logits, targets, wide)[2]

    def _powers(
        self, logits: torch.Tensor, targets: torch.Tensor, wide: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """exp(logits − max) of this part, its sum over all parts, and the loss. A part may have no column at all."""
        width, group = logits.shape[-1], self.shares.group
        logits = logits.to(wide)
        top = logits.amax(-1) if width else logits.new_full(targets.shape, float("-inf"))
        logits = logits - collectives.all_max(top, group)[:, None]
        chosen = logits.new_zeros(targets.shape)
        if width:
            here = (targets >= 0) & (targets < width)
            chosen = logits.gather(-1, self._column(targets, width))[:, 0].masked_fill(~here, 0)
        powers = logits.exp_()
        chosen, total = collectives.all_reduce(torch.stack((chosen, powers.sum(-1))), group)
        return powers, total, ((total.log() - chosen) * (targets >= 0)).sum()

    @staticmethod
    def _column(targets: torch.Tensor, width: int) -> torch.Tensor:
        return targets.clamp(min=0, max=width - 1)[:, None]


class SharedBias(RelativeBias):
    """T5's relative bias of this rank's heads."""

    shares: Shares

    @property
    def table(self) -> torch.Tensor:
        return local(self.weight)


class SequencePositionEmbedding(PositionEmbedding):
    """Learned positions of this rank's part of the sequence."""

    shares: Shares

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return super().forward(positions.chunk(self.shares.parts, dim=-1)[self.shares.part])


class SequencePrompts(Prompts):
    """Prompts among this rank's part of the sequence: of a table's gradient every rank has that of the rows it saw."""

    shares: Shares

    def here(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.chunk(self.shares.parts, dim=1)[self.shares.part]


class SequenceDropout(Dropout):
    """Dropout of this rank's part of the sequence: its rows are numbered in the whole one."""

    shares: Shares

    def rows(self, length: int, device: torch.device) -> torch.Tensor:
        return super().rows(length * self.shares.parts, device).chunk(self.shares.parts)[self.shares.part]


class SequenceMaskedHead(MaskedHead):
    """The head over the counted targets of this rank's part of the sequence; the token table's product gathers its outputs."""

    shares: Shares

    def counted(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T/n, D) and the whole (B, T) → (1, N, D) of this part, and (1, N·n) targets of all parts.

        N is the count of the part with most targets: the others send rows besides that are not counted.
        """
        parts = targets.unflatten(1, (self.shares.parts, -1)).transpose(0, 1).flatten(1)
        most = max(int((parts >= 0).sum(1).max()), 1)
        order = (parts < 0).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        rows = hidden.flatten(0, 1)[order[self.shares.part]]
        return rows[None], parts.gather(1, order).flatten()[None]


class SequencePooler(Pooler):
    """The first position is on the first tensor rank; all pool it alike."""

    shares: Shares

    def first(self, hidden: torch.Tensor) -> torch.Tensor:
        mine = hidden[:, 0]
        return collectives.reduce(
            mine if self.shares.part == 0 else torch.zeros_like(mine), self.shares.group
        )


class HeadDropout(ProbabilityDropout):
    """Dropout of attention probabilities of this rank's heads: they are numbered in the whole layer."""

    shares: Shares

    def heads(self, count: int, device: torch.device) -> torch.Tensor:
        return super().heads(count, device) + self.shares.part * count


def become(module: nn.Module, kind: type[nn.Module], shares: Shares) -> Any:
    """Changes the class of a layer in place: names, hooks and everything else it carries stay."""
    module.__class__ = kind
    module.shares = shares  # type: ignore[assignment]
    return module
