"""Tensors that lie in no file: layers that a checkpoint was saved without, with the numbers that a new model would begin with.

The same numbers on every process and in every layout, for they are drawn by the tensor's name.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch

from megalith.checkpoint.local import Held
from megalith.checkpoint.slices import inside, whole


@dataclass(frozen=True)
class Drawn:
    """Weights N(0, `std`); scales of norms 1; biases 0."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    std: float

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The whole tensor, in host memory."""
        if self.name.endswith(".bias"):
            return torch.zeros(self.shape, dtype=self.dtype)
        if "norm" in self.name.split(".")[-2]:
            return torch.ones(self.shape, dtype=self.dtype)
        draw = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        return (torch.randn(self.shape, generator=draw) * self.std).to(self.dtype)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` (exclusive) of the first dim."""
        return self.read()[start:stop]

    def fill(self, mine: Held) -> None:
        """Fills the memory that a process holds, in its dtype."""
        mine.memory.copy_(self.read()[inside(mine.part, whole(self.shape))])
