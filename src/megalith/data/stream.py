"""The samples of a split as one endless row, numbered as the run reads them: the plan applied to open files.

Knows how a number becomes (source, number in the source). Refuses to know batches, masks and ranks.
Safe to share between threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megalith.data.blend import Blend
from megalith.data.gpt import Piece
from megalith.data.indexed.mmap import IndexedDataset
from megalith.data.plan import DataPlan, Segment
from megalith.errors import DataError

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Provenance:
    """Where a sample comes from: file, how many-th sample of it, samples of one pass over it (0: the order is Megatron's),
    and the pieces of its items in order, with the whole length of each item."""

    path: str
    index: int
    epoch_length: int
    pieces: list[Piece]
    item_lengths: list[int]


class Once(Protocol):
    """How far an order goes."""

    @property
    def once(self) -> int: ...
    @property
    def endless(self) -> bool: ...


class Samples(Protocol):
    """Samples of one source in their order: windows of its tokens (`gpt`), or groups of its sentences (`groups`)."""

    @property
    def indexed(self) -> IndexedDataset: ...
    @property
    def order(self) -> Once: ...

    def __getitem__(self, i: int) -> Any:
        """What masks make a row of a batch of: int64[seq_length + 1], or a `Group`."""

    def pieces(self, i: int) -> list[Piece]:
        """Where the tokens of sample `i` come from."""


class Stream:
    """Samples of one split: `stream[number]`, or many by `samples(numbers)`; `read(numbers)` are windows as one array."""

    def __init__(self, plan: DataPlan, open_source: Callable[[int], Samples]) -> None:
        """`open_source(i)` reads `plan.sources[i]`; sources that only past samples came from are opened when asked for."""
        self.plan = plan
        self._open_source = open_source
        self._open: dict[int, Samples] = {}
        for member in plan.segments[-1].members:
            self.dataset(member.source)
        self._starts = np.array([segment.start for segment in plan.segments])
        self._blends = [Blend([member.weight for member in segment.members]) for segment in plan.segments]

    def dataset(self, source: int) -> Samples:
        """The samples of `plan.sources[source]`."""
        if source not in self._open:
            self._open[source] = self._open_source(source)
        return self._open[source]

    @property
    def once(self) -> int:
        """Samples of one pass over the sources that are read now."""
        return sum(self.dataset(member.source).order.once for member in self.plan.segments[-1].members)

    @property
    def limit(self) -> int | None:
        """Samples that the plan covers; None: there is no end."""
        return None if self.plan.order == "native" else max(self.plan.samples, self.plan.cycle)

    def __getitem__(self, number: int) -> Any:
        return next(self.samples(np.array([number])))[1]

    def read(self, numbers: Numbers) -> npt.NDArray[np.int64]:
        """Windows int64[len(numbers), seq_length + 1]. DataError for a number that the plan does not cover."""
        rows = np.empty((len(numbers), self.plan.seq_length + 1), np.int64)
        for row, (_, window) in zip(rows, self.samples(numbers), strict=True):
            row[:] = window
        return rows

    def samples(self, numbers: Numbers) -> Iterator[tuple[int, Any]]:
        """(number within its source, sample) of each. DataError for a number that the plan does not cover."""
        sources, indexes = self.locate(numbers)
        for source, index in zip(sources.tolist(), indexes.tolist(), strict=True):
            yield index, self.dataset(source)[index]

    def locate(self, numbers: Numbers) -> tuple[Numbers, Numbers]:
        """(which of the plan's sources, number within it) of each sample."""
        self._check(numbers)
        sources, indexes = np.empty_like(numbers), np.empty_like(numbers)
        segment_of = np.searchsorted(self._starts, numbers, side="right") - 1
        for i in np.unique(segment_of):
            here = segment_of == i
            sources[here], indexes[here] = self._in_segment(int(i), numbers[here])
        return sources, indexes

    def provenance(self, number: int) -> Provenance:
        """Which file and which items sample `number` is made of."""
        sources, indexes = self.locate(np.array([number]))
        source, index = int(sources[0]), int(indexes[0])
        dataset = self.dataset(source)
        pieces = dataset.pieces(index)
        return Provenance(
            path=self.plan.sources[source].path,
            index=index,
            epoch_length=dataset.order.once if dataset.order.endless else 0,
            pieces=pieces,
            item_lengths=[int(dataset.indexed.sizes[piece.item]) for piece in pieces],
        )

    def _in_segment(self, i: int, numbers: Numbers) -> tuple[Numbers, Numbers]:
        segment: Segment = self.plan.segments[i]
        member, within = self._blends[i].locate(numbers - segment.start)
        source = np.array([m.source for m in segment.members])
        first = np.array([m.first for m in segment.members])
        return source[member], first[member] + within

    def _check(self, numbers: Numbers) -> None:
        lowest, highest = int(numbers.min(initial=0)), int(numbers.max(initial=0))
        if lowest < 0 or (self.limit is not None and highest >= self.limit):
            wrong = lowest if lowest < 0 else highest
            raise DataError(
                f"sample {wrong} is not in the plan, which covers {self.limit} samples",
                where=f"{self.plan.split} data",
                fix="the run asks for more samples than it announced: restart it with the longer trainer.max_steps "
                "(the plan is continued), or use model.data.order=native, which has no end",
            )
