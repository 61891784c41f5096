"""Native tensors as foreign ones, by a table of rules: each tensor-parallel part is made alone, when it is read.

    native name → tensor ─▶ foreign name → a Cut for each tensor-parallel part

Names and shapes are known without reading. Knows no format; which stage of a pipeline a tensor belongs to is the writer's to say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from megalith.checkpoint.lazy import Lazy
from megalith.checkpoint.local import Held
from megalith.checkpoint.mapped import Bound, Mapped, bind, shares_memory
from megalith.checkpoint.mapping import Heads, Table
from megalith.checkpoint.slices import Slice, inside, overlap, shape_of, whole
from megalith.checkpoint.tensor_files import LazyTensor
from megalith.errors import CheckpointError


@dataclass(frozen=True)
class Cut:
    """A tensor-parallel part of a foreign tensor, made of pieces of native ones when it is read."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    bound: Bound
    sources: tuple[Lazy, ...]
    places: tuple[Slice, ...]
    """The piece of each native tensor that it takes; rows behind the last are zero."""
    heads: Heads

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The part, in host memory."""
        gathered = self._gathered()
        if gathered is not None:
            return gathered
        pieces = [piece(lazy, place) for lazy, place in zip(self.sources, self.places, strict=True)]
        made = self.bound.rule.step.outward(pieces, self.heads)
        return made[self.bound.foreign.index(self.name)].contiguous()

    def _gathered(self) -> torch.Tensor | None:
        """The part where it is native tensors side by side, each put straight into its place; None where it must be made."""
        if len(self.sources) < 2 or len(self.bound.foreign) > 1:
            return None
        if any(lazy.dtype != self.dtype for lazy in self.sources):
            return None
        made = torch.empty(self.shape, dtype=self.dtype)
        views = self.bound.rule.step.inward([made], self.heads)
        if (
            any(not shares_memory(view, made) for view in views)
            or sum(map(torch.numel, views)) != made.numel()
        ):
            return None
        for view, lazy, place in zip(views, self.sources, self.places, strict=True):
            put(view, lazy, place)
        return made

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` (exclusive) of the first dim."""
        return self.read()[start:stop]


def piece(lazy: Lazy, place: Slice) -> torch.Tensor:
    """A slice of a tensor, little else of it read where that can be; what lies behind its last row is zero."""
    if not isinstance(lazy, LazyTensor | Mapped) and overlap(place, whole(lazy.shape)) == place:
        return lazy.read()[inside(place, whole(lazy.shape))]
    tensor = torch.empty(shape_of(place), dtype=lazy.dtype)
    put(tensor, lazy, place)
    return tensor


def put(target: torch.Tensor, lazy: Lazy, place: Slice) -> None:
    """The same slice into memory of its shape and dtype."""
    there = overlap(place, whole(lazy.shape)) if place else place
    if there != place:
        target.zero_()
    if there is None:
        return
    part = target[inside(there, place)]
    if isinstance(lazy, LazyTensor | Mapped):
        lazy.fill(Held(part, lazy.shape, there))
    else:
        part.copy_(lazy.read()[inside(there, whole(lazy.shape))])


def foreigns(
    table: Table,
    tensors: Mapping[str, Lazy],
    heads: Heads,
    *,
    tensor_parallel: int = 1,
    vocabulary_rows: int | None = None,
) -> dict[str, tuple[Cut, ...]]:
    """Foreign name → its parts, one for each of `tensor_parallel` ranks (a tensor that all have: the same one each time).

    `vocabulary_rows`: what tables of tokens are padded, or cut, to; None: as they are. Errors: `CheckpointError` for tensors
    that the format has no place for or that do not divide.
    """
    found: dict[str, tuple[Cut, ...]] = {}
    for bound in bind(table, tensors):
        sources = tuple(tensors[name] for name in bound.native)
        rows = vocabulary_rows if bound.rule.padded else None
        ranks = range(tensor_parallel)
        places = [
            tuple(_share(lazy, bound.rule.cut, rows, (i, tensor_parallel)) for lazy in sources) for i in ranks
        ]
        for i, name in enumerate(bound.foreign):
            shapes = [_outward_shape(bound, sources, place, heads, i) for place in places]
            found[name] = tuple(
                Cut(name, sources[0].dtype, shape, bound, sources, place, heads)
                for shape, place in zip(shapes, places, strict=True)
            )
    return found


def _share(lazy: Lazy, cut: int | None, rows: int | None, share: tuple[int, int]) -> Slice:
    place = list(whole(lazy.shape))
    if rows is not None:
        place[0] = (0, rows)
    if cut is not None:
        number, count = share
        size = place[cut][1]
        if size % count:
            raise CheckpointError(
                f"{lazy.name} {list(lazy.shape)}: {size} does not divide into {count} parts"
            )
        place[cut] = (number * size // count, (number + 1) * size // count)
    return tuple(place)


def _outward_shape(
    bound: Bound, sources: Sequence[Lazy], places: Sequence[Slice], heads: Heads, index: int
) -> tuple[int, ...]:
    bare = [
        torch.empty(shape_of(place), dtype=lazy.dtype, device="meta")
        for lazy, place in zip(sources, places, strict=True)
    ]
    return tuple(bound.rule.step.outward(bare, heads)[index].shape)
