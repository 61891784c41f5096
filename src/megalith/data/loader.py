"""Batches of this data rank, read ahead by threads: a pure function of the samples consumed, so nothing is to be saved.

```
consumed ─ schedule ─▶ positions ─ sampler ─▶ numbers ─ stream ─▶ rows ─ masks ─▶ Batch    (in `workers` threads,
                                                                                            handed out in order)
```
Threads, not processes: reading is copying from mapped files, which runs outside Python's lock, and leaves no shared
memory behind when a run is killed. Leaving the loop early, an exception or Ctrl-C end the threads. Knows batches. Refuses
to know models, devices and steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from megalith.data.cache import Notice, no_notice
from megalith.data.masks import IGNORED, MaskOptions, Masks
from megalith.data.sampler import Sampler, SequentialSampler, batch_positions
from megalith.data.schedule import BatchRampUp
from megalith.data.stream import Stream
from megalith.errors import DataError

Batch = dict[str, torch.Tensor]
Positions = npt.NDArray[np.int64]
Work = TypeVar("Work")
Result = TypeVar("Result")

_LOWEST = {"tokens": 0, "encoder_tokens": 0, "targets": IGNORED}
"""The arrays of token ids in a batch, and their lowest legal value."""
_TARGETS = ("targets", "order")
_AHEAD = 2
"""Batches read ahead for each thread."""


@dataclass(frozen=True)
class Loader:
    """Batches of one split for data rank `data_rank` of `data_size`.

    A batch holds `tokens`, `targets` (−1: not counted) int64[b, T], `sample` int64[b] (position in the run; −1 in rows
    that only fill up), and what the masks make besides (`masks`, `masked`, `span`). `vocab_size` guards against ids that
    the model has no row for. `pin` puts batches into page-locked memory, for GPUs.
    """

    stream: Stream
    masks: Masks = field(default_factory=MaskOptions)
    sampler: Sampler = field(default_factory=SequentialSampler)
    data_rank: int = 0
    data_size: int = 1
    workers: int = 2
    vocab_size: int | None = None
    pin: bool = False

    def training(
        self, schedule: BatchRampUp, *, consumed: int = 0, end: int | None = None
    ) -> Iterator[Batch]:
        """Batches from `consumed` samples on, in the sizes of the schedule; without end, or up to `end` samples.

        The last batch is a whole one: samples that do not fill it are left.
        """
        self.sampler.check_start(consumed)
        return ordered(self._batch, self._training_positions(schedule, consumed, end), self.workers)

    def evaluation_positions(
        self, batches: int, batch_size: int, *, drop_last: bool = True, notice: Notice = no_notice
    ) -> list[Positions]:
        """Positions of this rank's rows of up to `batches` batches from sample 0 on, each sample at most once.

        With a native order the batches end where the samples of one pass do: `drop_last` leaves the samples that do not
        fill a batch (unless there is no whole one); otherwise the last batch is filled up with position −1.
        """
        available = self.stream.once if self.stream.limit is None else self.stream.limit
        whole, rest = divmod(available, batch_size)
        possible = whole + (1 if rest and (not drop_last or not whole) else 0)
        if possible < batches:
            notice(
                f"{self.stream.plan.split} data: {available} samples make {possible} batch"
                f"{'' if possible == 1 else 'es'} of {batch_size}, not {batches}"
            )
        found = []
        for number in range(min(batches, possible)):
            positions = batch_positions(
                number * batch_size, batch_size, data_rank=self.data_rank, data_size=self.data_size
            )
            found.append(np.where(positions < available, positions, -1))
        return found

    def read(self, positions: Iterable[Positions]) -> Iterator[Batch]:
        """The batches at given positions, read ahead; position −1 gives a row that does not count."""
        return ordered(self._batch, iter(positions), self.workers)

    def _training_positions(
        self, schedule: BatchRampUp, consumed: int, end: int | None
    ) -> Iterator[Positions]:
        while True:
            size = schedule.size_at(consumed)
            if end is not None and consumed + size > end:
                return
            yield batch_positions(consumed, size, data_rank=self.data_rank, data_size=self.data_size)
            consumed += size

    def _batch(self, positions: Positions) -> Batch:
        filling = positions < 0
        numbers = self.sampler.numbers(np.maximum(positions, 0))
        arrays = self.masks.batch(self.stream, numbers)
        self._check(arrays, numbers)
        for name in _TARGETS:
            if name in arrays:
                arrays[name][filling] = IGNORED
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        batch["sample"] = torch.from_numpy(positions)
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self.pin else batch

    def _check(self, arrays: Mapping[str, npt.NDArray], numbers: Positions) -> None:
        if self.vocab_size is None:
            return
        for name, lowest in _LOWEST.items():
            rows = arrays.get(name)
            if rows is None or not rows.size:
                continue
            if int(rows.min()) < lowest or int(rows.max()) >= self.vocab_size:
                self._refuse(rows, (rows < lowest) | (rows >= self.vocab_size), numbers)

    def _refuse(self, rows: npt.NDArray, wrong: npt.NDArray[np.bool_], numbers: Positions) -> None:
        row = int(np.flatnonzero(wrong.any(axis=1))[0])
        raise DataError(
            f"holds token id {rows[row][wrong[row]][0]}; the vocabulary ends at {(self.vocab_size or 0) - 1}",
            where=self.stream.provenance(int(numbers[row])).path,
            fix="the file was made with another tokenizer: set model.tokenizer to that one, or preprocess again",
        )


def ordered(work: Callable[[Work], Result], items: Iterator[Work], workers: int) -> Iterator[Result]:
    """`map(work, items)`, with `workers` threads ahead of the consumer (0: none). Closing the iterator ends them."""
    if workers == 0:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > _AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
