"""A tensor in pieces that do not all lie in one run. Knows slices and lazy tensors; whole runs are a `LazyTensor` instead."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megalith.checkpoint.lazy import Lazy
from megalith.checkpoint.slices import Slice, inside, overlap, whole


@dataclass(frozen=True)
class Assembled:
    """Pieces and where in the whole each lies; they cover it. Has the face of a `LazyTensor`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[tuple[Slice, Lazy], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The whole tensor, in host memory."""
        return self._fetch(whole(self.shape))

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` (exclusive) of the first dim; pieces beside them are not read."""
        if not (self.shape and 0 <= start <= stop <= self.shape[0]):
            raise IndexError(f"rows {start}:{stop} of {self.name} {list(self.shape)}")
        return self._fetch(((start, stop), *whole(self.shape[1:])))

    def _fetch(self, wanted: Slice) -> torch.Tensor:
        target = torch.empty([stop - first for first, stop in wanted], dtype=self.dtype)
        for place, piece in self.pieces:
            common = overlap(place, wanted)
            if common is not None:
                shape = tuple(stop - first for first, stop in place)
                target[inside(common, wanted)] = piece.read().view(shape)[inside(common, place)]
        return target
