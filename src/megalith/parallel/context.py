"""Context parallelism: every process has two chunks of each sequence, computes their queries, and looks at all keys.

    chunks      0 1 2 3 4 5 6 7         a causal query of a late chunk looks at more keys than one of an early chunk;
    4 ranks     0 1 2 3 3 2 1 0         rank r has chunks r and 2C−1−r: the same work on every rank

    q of two chunks ──────────────────────────┬─▶ core: early queries, keys up to them ─┬─▶ y of two chunks
    k, v of two chunks ─ gather ─ in order ───┘   core: late queries, keys up to them   ┘

Where only padding is hidden (BERT, an encoder, a decoder's look across to it) either chunk looks at all keys; across, the
queries are the decoder's chunks and the keys those of the encoder's, which has another length.

Everything else of a block looks at one token at a time and needs no message; what numbers its rows (positions, dropout)
is told which they are. The batch is cut in `share_sequence`, the model changed in `share_context`: the attention core is
wrapped, `Lookback` and `Lookaround` say who sees whom chunk by chunk, and dropout takes its masks by place in the whole
sequence. Knows the order of chunks. Knows no model, only parts by class.

Legend: B batch, T time, S keys, C context ranks, H heads, G key-value heads, K head_dim
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed import ProcessGroup

from megalith.errors import DataError
from megalith.nn.attention import Attention
from megalith.nn.dropout import Dropout
from megalith.nn.lora import InputDropout
from megalith.nn.loss import NOT_COUNTED
from megalith.nn.visibility import Lookaround, Lookback, Visibility
from megalith.parallel.layers import SequenceDropout
from megalith.parallel.lora import SharedInputDropout
from megalith.topology import collectives
from megalith.topology.topology import Topology

WHOLE = ("documents",)
"""What a batch says of keys: every rank needs it of the whole sequence."""

OF_THE_FIRST_POSITION = ("order",)
"""What a batch asks of the first position: counted where that is, on the first rank."""

PLACES = {"tokens": "positions", "encoder_tokens": "encoder_positions"}
"""The sequences of a batch, and what says where in them its tokens stand."""


@dataclass(frozen=True)
class Chunks:
    """Which chunks of a sequence context rank `rank` of `ranks` has, and in which order."""

    rank: int
    ranks: int

    @property
    def mine(self) -> tuple[int, int]:
        """The numbers of the early and of the late one."""
        return self.rank, 2 * self.ranks - 1 - self.rank

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, …) → this rank's (B, T/C, …)."""
        chunks = x.chunk(2 * self.ranks, dim=1)
        return torch.cat([chunks[number] for number in self.mine], dim=1)

    def ordered(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, …), the parts of all ranks behind each other → as the sequence has it."""
        both = x.unflatten(1, (self.ranks, 2, -1))
        return torch.cat((both[:, :, 0], both[:, :, 1].flip(1)), dim=1).flatten(1, 2)

    def places(self, length: int, device: torch.device) -> torch.Tensor:
        """(T/C,) where in the sequence this rank's `length` = T/C rows stand."""
        return torch.cat([torch.arange(*span, device=device) for span in self.spans(length)])

    def spans(self, length: int) -> list[tuple[int, int]]:
        """From where to where in the sequence the chunks of this rank's `length` = T/C rows reach."""
        each = length // 2
        return [(number * each, (number + 1) * each) for number in self.mine]


def chunks_of(topology: Topology) -> Chunks:
    """Those of this process."""
    return Chunks(topology.rank("context"), topology.size("context"))


def share_sequence(batch: dict[str, torch.Tensor], topology: Topology) -> dict[str, torch.Tensor]:
    """This rank's part of every sequence of a batch, with its positions; the batch itself without context parallelism.

    Cuts what has a time dim (B, T, …) but for `WHOLE`; an encoder's sequence by its own length. Errors: `DataError` when a
    sequence cannot be cut evenly.
    """
    if topology.size("context") == 1:
        return batch
    chunks, places = chunks_of(topology), {}
    for name in PLACES.keys() & batch.keys():
        _check(name, batch[name].shape[1], chunks)
        places[PLACES[name]] = torch.arange(batch[name].shape[1], device=batch[name].device).expand_as(
            batch[name]
        )
    return {name: _part(name, tensor, chunks) for name, tensor in {**places, **batch}.items()}


def _check(name: str, length: int, chunks: Chunks) -> None:
    if length % (2 * chunks.ranks):
        raise DataError(
            f"{length} {name.replace('_', ' ')} cannot be cut into {2 * chunks.ranks} equal chunks",
            where="batch",
            fix=f"use sequences of a multiple of {2 * chunks.ranks} tokens",
        )


def _part(name: str, tensor: torch.Tensor, chunks: Chunks) -> torch.Tensor:
    if name in OF_THE_FIRST_POSITION and chunks.rank > 0:
        return torch.full_like(tensor, NOT_COUNTED)
    return tensor if name in WHOLE or tensor.ndim == 1 else chunks.cut(tensor)


def share_context(stage: nn.Module, topology: Topology) -> None:
    """The pass: in place, on a stage whose layers the tensor pass has changed already."""
    group = topology.group("context")
    if group is None:
        return
    chunks = chunks_of(topology)
    for module in list(stage.modules()):
        if isinstance(module, Attention):
            module.core = ContextCore(module.core, chunks, group)
        elif type(module) in SWAPS:
            module.__class__ = SWAPS[type(module)]
            module.chunks = chunks  # type: ignore[assignment]


class ChunkView(NamedTuple):
    """What the queries of one chunk see: of the first `keys` keys of the whole sequence, those that `sees` says."""

    sees: Visibility
    keys: int


class ContextCore(nn.Module):
    """An attention core over the keys and values of all ranks: one message for both, then one call of `inner` a chunk.

    In the backward pass every rank gets the sum of the gradients of its keys and values.
    """

    def __init__(self, inner: nn.Module, chunks: Chunks, group: ProcessGroup) -> None:
        super().__init__()
        self.inner, self.chunks, self.group = inner, chunks, group

    def wants_blocks(self, device: torch.device) -> bool:
        return self.inner.wants_blocks(device)  # type: ignore[operator]

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        visibility: tuple[ChunkView, ...],
        keys: torch.Tensor | None,
    ) -> torch.Tensor:
        """q (B, H, T/C, K), k and v (B, G, S/C, K) → (B, H, T/C, K)."""
        both = collectives.gather(torch.cat((k, v), dim=-1).transpose(1, 2), self.group)
        k, v = self.chunks.ordered(both).transpose(1, 2).chunk(2, dim=-1)
        views = zip(q.chunk(2, dim=2), visibility, strict=True)
        return torch.cat(
            [self.inner(rows, k[:, :, :end], v[:, :, :end], sees, keys) for rows, (sees, end) in views], dim=2
        )

    def extra_repr(self) -> str:
        return f"context={self.chunks.ranks}, chunks {self.chunks.mine[0]} and {self.chunks.mine[1]}"


class ContextLookback(Lookback):
    """Who sees whom, for each of this rank's two chunks: keys end where the chunk does."""

    chunks: Chunks

    def forward(self, start: int, length: int, device: torch.device, **options: Any) -> Any:
        """A `ChunkView` of either chunk; `length` = T/C, and `start` is 0: no cache is shared."""
        return tuple(
            ChunkView(super(ContextLookback, self).forward(first, end - first, device, **options), end)
            for first, end in self.chunks.spans(length)
        )

    def extra_repr(self) -> str:
        return f"context={self.chunks.ranks}"


class ContextLookaround(Lookaround):
    """The same where only padding is hidden: either chunk sees the keys of all ranks."""

    chunks: Chunks

    def forward(self, queries: int, keys: int, device: torch.device, **options: Any) -> Any:
        """A `ChunkView` of either chunk; `queries` = T/C and `keys` = S/C, `lengths` are of the whole sequence."""
        whole = keys * self.chunks.ranks
        return tuple(
            ChunkView(
                super(ContextLookaround, self).forward(end - first, whole, device, first=first, **options),
                whole,
            )
            for first, end in self.chunks.spans(queries)
        )

    def extra_repr(self) -> str:
        return f"context={self.chunks.ranks}"


class ContextDropout(Dropout):
    """Dropout of this rank's chunks: their rows are numbered in the whole sequence."""

    chunks: Chunks

    def rows(self, length: int, device: torch.device) -> torch.Tensor:
        return self.chunks.places(length, device)


class ContextSequenceDropout(SequenceDropout, ContextDropout):
    """The same for a tensor rank's part of them."""


class ContextInputDropout(InputDropout, ContextDropout):
    """Dropout of what a low-rank product reads of this rank's chunks."""


class ContextSharedInputDropout(SharedInputDropout, ContextDropout):
    """The same for a tensor rank's channels of them."""


SWAPS: dict[type, type] = {
    Lookback: ContextLookback,
    Lookaround: ContextLookaround,
    Dropout: ContextDropout,
    SequenceDropout: ContextSequenceDropout,
    InputDropout: ContextInputDropout,
    SharedInputDropout: ContextSharedInputDropout,
}
