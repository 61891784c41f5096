"""In which order one source gives its samples: epoch by epoch (native), or by Megatron's index in chapters.

```
native     epoch 0 │ epoch 1 │ epoch 2 …   each: items shuffled, cut into samples, samples shuffled, all by
                                           (seed, epoch). Endless; how long the run is never matters.
megatron   chapter 0 (seed)  │ chapter 1 (seed + 1) …   each: Megatron's index for the samples asked for. A run that
                                           is lengthened gets another chapter behind those it has; nothing moves.
```
Native samples never reach across an epoch. An epoch reads every token once as input and once as target, but for the
`(tokens − 1) mod seq_length` last ones of its shuffled stream (fewer than one sample; other items each time) and the
very first token, which nothing predicts.

Knows lengths of items and numbers. Refuses to know tokens, weights and steps. Safe to share between threads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from megalith.data.cache import IndexCache
from megalith.data.index import GPTIndex, epoch_index, epochs_needed, megatron_index, samples_in
from megalith.data.splits import Range

_KEPT = 3

Made = TypeVar("Made")


@dataclass(frozen=True)
class Items:
    """The items of one split of one file: `sizes` int32 of the *whole* file, the `range` that is read, and who it is."""

    sizes: npt.NDArray[np.int32]
    range: Range
    name: str
    identity: str
    """Hash of the file's index."""

    @property
    def tokens(self) -> int:
        return int(self.sizes[self.range.first : self.range.last].sum(dtype=np.int64))

    def documents(self) -> npt.NDArray[np.int32]:
        return np.arange(self.range.first, self.range.last, dtype=np.int32)


class SourceOrder(Protocol):
    """Sample i of a source → the index it lies in and its row there (samples row … row + 1)."""

    @property
    def once(self) -> int:
        """Samples before anything is read again (native: one epoch) or runs out (megatron)."""

    @property
    def endless(self) -> bool: ...

    def find(self, i: int) -> tuple[GPTIndex, int]: ...


class Kept(Generic[Made]):
    """Makes things by number and keeps the last few."""

    def __init__(self, build: Callable[[int], Made]) -> None:
        self._build = build
        self._open: OrderedDict[int, Made] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, number: int) -> Made:
        with self._lock:
            if number not in self._open:
                self._open[number] = self._build(number)
            self._open.move_to_end(number)
            while len(self._open) > _KEPT:
                self._open.popitem(last=False)
            return self._open[number]


@dataclass
class NativeOrder:
    """Epoch by epoch, endless. The source must hold at least one sample."""

    items: Items
    seq_length: int
    seed: int
    cache: IndexCache
    once: int = 0
    endless: bool = True
    _epochs: Kept[GPTIndex] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.once = samples_in(self.items.tokens, self.seq_length)
        self._epochs = Kept(self._epoch)

    def find(self, i: int) -> tuple[GPTIndex, int]:
        epoch, j = divmod(i, self.once)
        index = self._epochs[epoch]
        return index, int(index.shuffle[j])

    def _epoch(self, epoch: int) -> GPTIndex:
        key = _key(self, "native") | {"epoch": epoch}
        random_seed = [self.seed & 0xFFFFFFFF, self.seed >> 32, epoch]

        def build() -> GPTIndex:
            return epoch_index(self.items.sizes, self.items.documents(), self.seq_length, random_seed)

        return self.cache.get(self.items.name, key, len(self.items.range) + self.once, build)


@dataclass
class MegatronOrder:
    """Megatron's index, `chapters[k]` samples asked of chapter k, which may hold more (it runs over whole epochs)."""

    items: Items
    seq_length: int
    seed: int
    cache: IndexCache
    chapters: Sequence[int] = ()
    once: int = 0
    endless: bool = False
    _ends: npt.NDArray[np.int64] = field(init=False, repr=False)
    _indexes: Kept[GPTIndex] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        lengths = [chapter_length(self.items.tokens, self.seq_length, asked) for asked in self.chapters]
        self._ends = np.cumsum([0, *lengths])
        self.once = int(self._ends[-1])
        self._indexes = Kept(self._chapter)

    def find(self, i: int) -> tuple[GPTIndex, int]:
        if not 0 <= i < self.once:
            raise IndexError(f"sample {i} of {self.items.name}: the index holds {self.once}")
        chapter = int(np.searchsorted(self._ends, i, side="right")) - 1
        index = self._indexes[chapter]
        return index, int(index.shuffle[i - int(self._ends[chapter])])

    def _chapter(self, chapter: int) -> GPTIndex:
        asked, seed = self.chapters[chapter], self.seed + chapter
        key = _key(self, "megatron") | {"seed": seed, "samples": asked}
        epochs = epochs_needed(self.items.tokens, self.seq_length, asked)
        rows = epochs * (len(self.items.range) + samples_in(self.items.tokens, self.seq_length))

        def build() -> GPTIndex:
            return megatron_index(
                self.items.sizes, self.items.documents(), self.seq_length, samples=asked, seed=seed
            )

        return self.cache.get(self.items.name, key, rows, build)


def chapter_length(tokens: int, seq_length: int, asked: int) -> int:
    """Samples that Megatron's index for `asked` samples of a source of `tokens` holds."""
    return samples_in(epochs_needed(tokens, seq_length, asked) * tokens, seq_length)


def make_order(
    order: str,
    items: Items,
    cache: IndexCache,
    *,
    seq_length: int,
    seed: int,
    chapters: Sequence[int],
) -> SourceOrder:
    """The order named "native" or "megatron"; `chapters` is Megatron's alone."""
    if order == "native":
        return NativeOrder(items, seq_length, seed, cache)
    return MegatronOrder(items, seq_length, seed, cache, tuple(chapters))


def _key(order: NativeOrder | MegatronOrder, algorithm: str) -> dict[str, str | int]:
    first, last = order.items.range
    return {
        "algorithm": f"{algorithm} 1",
        "file": order.items.identity,
        "first": first,
        "last": last,
        "seq_length": order.seq_length,
        "seed": order.seed,
    }
