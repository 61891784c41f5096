"""Which samples make up a batch: a pure function of the samples consumed, without any state.

```
consumed, batch size ─▶ positions consumed … consumed + size − 1 ─▶ this rank's contiguous share ─▶ sample numbers
```
Sequential (`dataloader_type: single`): position = sample number, whatever the layout. Cyclic is Megatron's
`MegatronPretrainingRandomSampler`: it goes round in a fixed data set, shuffled anew each time by torch's generator seeded
with the epoch; with data sharding each data-parallel rank draws from a bucket of its own, so the order depends on the
micro-batch and data-parallel sizes. Knows numbers only. Refuses to know tokens and plans.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from megalith.errors import ConfigError, Problem

Numbers = npt.NDArray[np.int64]


def batch_positions(consumed: int, batch_size: int, *, data_rank: int = 0, data_size: int = 1) -> Numbers:
    """Positions in the run of data rank `data_rank`'s rows: its contiguous share of the global batch.

    ValueError where the batch does not divide (the configuration is checked before).
    """
    rows, rest = divmod(batch_size, data_size)
    if rest:
        raise ValueError(f"global batch {batch_size} does not divide by {data_size} data-parallel ranks")
    first = consumed + data_rank * rows
    return np.arange(first, first + rows, dtype=np.int64)


class Sampler(Protocol):
    """Positions in the run → sample numbers of the data set."""

    def numbers(self, positions: Numbers) -> Numbers: ...

    def check_start(self, consumed: int) -> None:
        """ConfigError where a run cannot go on from `consumed`."""


class SequentialSampler:
    """Position i is sample i."""

    def numbers(self, positions: Numbers) -> Numbers:
        return positions

    def check_start(self, consumed: int) -> None:
        return


@dataclass(frozen=True)
class CyclicSampler:
    """Megatron's cyclic order over a data set of `total` samples.

    ConfigError when the data set is smaller than one micro-batch on every rank.
    """

    total: int
    micro_batch_size: int
    data_size: int
    data_sharding: bool = True
    _kept: dict[tuple[int, int], Numbers] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.active < 1:
            what = f"cyclic needs at least {self._stride} samples (micro-batch × data-parallel size), not {self.total}"
            raise ConfigError(
                [Problem("model.data.dataloader_type", what, "use single, or a smaller micro-batch")]
            )

    @property
    def active(self) -> int:
        """Samples of one round: whole micro-batches on every rank."""
        return self.total - self.total % self._stride

    @property
    def _stride(self) -> int:
        return self.micro_batch_size * self.data_size

    def check_start(self, consumed: int) -> None:
        if consumed % self.active % self._stride:
            what = f"{consumed} consumed samples are not whole micro-batches of {self._stride} samples over the ranks"
            fix = "a cyclic order can change its micro-batch or data-parallel size only there; keep the sizes"
            raise ConfigError([Problem("model.data.dataloader_type", what, fix)])

    def numbers(self, positions: Numbers) -> Numbers:
        result = np.empty_like(positions)
        epochs, places = np.divmod(positions, self.active)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            result[here] = self._of_epoch(int(epoch), places[here])
        return result

    def _of_epoch(self, epoch: int, places: Numbers) -> Numbers:
        turn, inside = np.divmod(places, self._stride)
        rank, row = np.divmod(inside, self.micro_batch_size)
        if not self.data_sharding:  # one permutation for all, dealt out to the ranks in turn
            size = self.total // self.micro_batch_size * self.micro_batch_size
            return self._permutation(size, epoch)[turn * self._stride + row * self.data_size + rank]
        bucket = self.total // self._stride * self.micro_batch_size
        return rank * bucket + self._permutation(bucket, epoch)[turn * self.micro_batch_size + row]

    def _permutation(self, size: int, epoch: int) -> Numbers:
        kept = self._kept.get((size, epoch))
        if kept is None:
            kept = torch.randperm(size, generator=torch.Generator().manual_seed(epoch)).numpy()
            self._kept.clear()
            self._kept[size, epoch] = kept
        return kept
