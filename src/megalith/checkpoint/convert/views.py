"""Tensors that still lie in files, seen otherwise: in another dtype, or kept while several readers need them.

Knows lazy tensors. Knows no format.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from megalith.checkpoint.exported import Cut
from megalith.checkpoint.lazy import Lazy


@dataclass(frozen=True)
class Rounded:
    """A tensor whose numbers are those that `dtype` has."""

    lazy: Lazy
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return self.lazy.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.lazy.shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        return self.lazy.read().to(self.dtype)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.lazy.rows(start, stop).to(self.dtype)


def rounded(tensors: Mapping[str, Lazy], dtype: torch.dtype | None) -> dict[str, Lazy]:
    """All of them in `dtype`; None: as they are."""
    return {
        name: lazy if dtype in (None, lazy.dtype) else Rounded(lazy, dtype or lazy.dtype)
        for name, lazy in tensors.items()
    }


class Kept:
    """A tensor that is read once for `uses` readers, and let go after the last of them."""

    def __init__(self, lazy: Lazy, uses: int) -> None:
        self.name, self.dtype, self.shape, self.nbytes = lazy.name, lazy.dtype, lazy.shape, lazy.nbytes
        self._lazy, self._uses = lazy, uses
        self._tensor: torch.Tensor | None = None

    def read(self) -> torch.Tensor:
        """The tensor itself: nobody may change it."""
        tensor = self._lazy.read() if self._tensor is None else self._tensor
        self._uses -= 1
        self._tensor = tensor if self._uses > 0 else None
        return tensor

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.read()[start:stop]


def reading_once(cuts: Sequence[Cut]) -> list[Cut]:
    """The same parts, of sources that are read once for all of them, however many parts one has.

    Parts of one tensor should be read one after another: what they share stays in memory from the first to the last.
    """
    uses = Counter(id(lazy) for cut in cuts for lazy in cut.sources)
    kept = {
        id(lazy): Kept(lazy, uses[id(lazy)]) for cut in cuts for lazy in cut.sources if uses[id(lazy)] > 1
    }
    return [replace(cut, sources=tuple(kept.get(id(lazy), lazy) for lazy in cut.sources)) for cut in cuts]
