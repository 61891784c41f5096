"""Two files' tensors as one: whoever reads a written one has it compared, bit by bit, with what it should be.

    written files ─┬─ every bit the same? ─▶ the written tensor
    source files  ─┘          └─ no: its name is kept

Knows lazy tensors. Knows no format, and what becomes of a difference is not its business.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from megalith.checkpoint.lazy import Lazy
from megalith.checkpoint.mapped import Mapped

BLOCK = 16 << 20
"""Bytes of a tensor's rows compared at a time where nobody asked for it."""


class Twin:
    """A tensor that was written, beside the one that it is a copy of. Only its first `rows` rows mean anything; None: all."""

    def __init__(self, written: Lazy, source: Lazy, rows: int | None = None) -> None:
        self.name, self.dtype, self.shape, self.nbytes = (
            written.name,
            written.dtype,
            written.shape,
            written.nbytes,
        )
        self._written, self._source = written, source
        self._needed = (written.shape or (1,))[0] if rows is None else rows
        self._compared = 0
        """Rows compared so far: these from the top."""
        shapes = written.shape[rows is not None :], source.shape[rows is not None :]
        self.same = shapes[0] == shapes[1]

    def read(self) -> torch.Tensor:
        """The written tensor."""
        tensor = self._written.read()
        if self.same and self._compared < self._needed:
            other = self._source.read()
            self.same = same_bits(
                *((tensor[: self._needed], other[: self._needed]) if self.shape else (tensor, other))
            )
            self._compared = self._needed
        return tensor

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Its rows. Those that follow on the ones compared so far are compared now, others by `finish`."""
        tensor = self._written.rows(start, stop)
        last = min(stop, self._needed)
        if self.same and start <= self._compared < last:
            self.same = same_bits(tensor[: last - start], self._source.rows(start, last))
            self._compared = last
        return tensor

    def finish(self) -> None:
        """Compares what nobody asked for."""
        if self.nbytes <= BLOCK and self._compared < self._needed:
            self.read()
        step = max(1, BLOCK * self.shape[0] // self.nbytes)
        while self.same and self._compared < self._needed:
            self.rows(self._compared, min(self._compared + step, self._needed))


def twins(written: Mapping[str, Lazy], source: Mapping[str, Lazy], vocabulary: int) -> dict[str, Twin]:
    """Of tensors that both have, under the same names. Rows behind the `vocabulary` in tables that a format pads are let be."""
    return {
        name: Twin(lazy, source[name], vocabulary if _is_padded(lazy) else None)
        for name, lazy in written.items()
        if name in source
    }


def _is_padded(lazy: Lazy) -> bool:
    return isinstance(lazy, Mapped) and lazy.bound.rule.padded


def different(pairs: Iterable[Twin]) -> list[str]:
    """The names of those that are not the same; all that has not been compared yet is compared first."""
    found = []
    for pair in pairs:
        pair.finish()
        if not pair.same:
            found.append(pair.name)
    return found


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Are both the same numbers, down to the sign of a zero? Where their dtypes differ: the same values."""
    if one.shape != other.shape:
        return False
    if one.dtype != other.dtype:
        both = torch.promote_types(one.dtype, other.dtype)
        one, other = one.to(both), other.to(both)
    return torch.equal(_words(one), _words(other))


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The memory as whole numbers, the widest that its length allows: those are compared fastest."""
    flat = tensor.contiguous().flatten().view(torch.uint8)
    if len(flat) % 8 or flat.storage_offset() % 8:
        return flat
    return flat.view(torch.int64)
