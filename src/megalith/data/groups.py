"""Sample i of one source as a group of sentences: which one in which order, and its tokens from the mapped file.

```
native     the groups are made once, from the seed; each epoch shuffles them anew by (seed, epoch). Endless.
megatron   chapter 0 (seed) │ chapter 1 (seed + 1) …   each: Megatron's mapping for the samples asked for, as in `orders`
```
Every native epoch has equally many samples, so sample i is found without looking at the epochs before it; what is drawn
anew for each sample (masks, swap of the halves, what is cut off) is keyed by i and differs from epoch to epoch.

Knows sentences and numbers. Refuses to know masks, weights and batches. Safe to share between threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from megalith.data.cache import IndexCache, Key
from megalith.data.gpt import Piece
from megalith.data.indexed.mmap import IndexedDataset
from megalith.data.orders import Kept
from megalith.data.sentence_index import SentenceIndex, megatron_groups, native_groups
from megalith.data.shape import Order, Shape
from megalith.data.splits import Range


class Group(NamedTuple):
    """Sentences of one document: their `tokens` int64[n] one behind the other, their lengths, and how many are to be kept."""

    tokens: npt.NDArray[np.int64]
    lengths: list[int]
    target: int


@dataclass(frozen=True)
class Sentences:
    """The sentences of one split of one file: `sizes` int32 of the *whole* file; `documents` int64[D + 1], the items at
    which the split's documents begin, and the end; who the file is."""

    sizes: npt.NDArray[np.int32]
    documents: npt.NDArray[np.int64]
    name: str
    identity: str
    """Hash of the file's index."""

    @classmethod
    def of(cls, indexed: IndexedDataset, part: Range, name: str, identity: str) -> Sentences:
        """Items `part` of a file, which must begin and end with documents."""
        borders = indexed.document_indices
        inside = borders[(borders >= part.first) & (borders <= part.last)]
        documents = np.unique(np.concatenate([[part.first], inside, [part.last]]))
        return cls(np.array(indexed.sizes, np.int32), documents, name, identity)


class GroupOrder(Protocol):
    """Sample i of a source → (first item, item behind the last, target length)."""

    sentences: Sentences

    @property
    def once(self) -> int:
        """Samples before anything is read again (native: one epoch) or runs out (megatron)."""

    @property
    def endless(self) -> bool: ...

    def find(self, i: int) -> tuple[int, int, int]: ...

    def groups(self) -> SentenceIndex:
        """The groups of the first epoch or chapter."""


@dataclass
class NativeGroups:
    """Epoch by epoch, endless. Some document must be usable."""

    sentences: Sentences
    shape: Shape
    seed: int
    cache: IndexCache
    once: int = 0
    endless: bool = True
    _index: SentenceIndex = field(init=False, repr=False)
    _epochs: Kept[npt.NDArray] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        sentences, shape = self.sentences, self.shape
        words = [self.seed & 0xFFFFFFFF, self.seed >> 32]
        self._index = self.cache.get(
            sentences.name,
            _key(self, "native groups"),
            len(sentences.sizes),
            lambda: native_groups(sentences.sizes, sentences.documents, shape, words),
            kind=SentenceIndex,
        )
        self.once = len(self._index)
        self._epochs = Kept(lambda epoch: _shuffled(self.once, [*words, epoch]))

    def groups(self) -> SentenceIndex:
        return self._index

    def find(self, i: int) -> tuple[int, int, int]:
        epoch, j = divmod(i, self.once)
        return _row(self._index, int(self._epochs[epoch][j]))


@dataclass
class MegatronGroups:
    """Megatron's mapping, `chapters[k]` samples asked of chapter k, which may hold more (it runs over whole epochs)."""

    sentences: Sentences
    shape: Shape
    seed: int
    cache: IndexCache
    chapters: Sequence[int] = ()
    once: int = 0
    endless: bool = False
    _ends: npt.NDArray[np.int64] = field(init=False, repr=False)
    _indexes: list[SentenceIndex] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._indexes = [self._chapter(i) for i in range(len(self.chapters))]
        self._ends = np.cumsum([0, *map(len, self._indexes)])
        self.once = int(self._ends[-1])

    def groups(self) -> SentenceIndex:
        return self._indexes[0]

    def find(self, i: int) -> tuple[int, int, int]:
        if not 0 <= i < self.once:
            raise IndexError(f"sample {i} of {self.sentences.name}: the index holds {self.once}")
        chapter = int(np.searchsorted(self._ends, i, side="right")) - 1
        return _row(self._indexes[chapter], i - int(self._ends[chapter]))

    def _chapter(self, chapter: int) -> SentenceIndex:
        asked, seed, sentences = self.chapters[chapter], self.seed + chapter, self.sentences
        key = {**_key(self, "megatron groups"), "seed": seed, "samples": asked}

        def build() -> SentenceIndex:
            return megatron_groups(
                sentences.sizes, sentences.documents, self.shape, samples=asked, seed=seed & 0xFFFFFFFF
            )

        return self.cache.get(
            sentences.name, key, max(len(sentences.sizes), asked), build, kind=SentenceIndex
        )


def make_groups(
    order: Order, sentences: Sentences, shape: Shape, *, seed: int, chapters: Sequence[int], cache: IndexCache
) -> GroupOrder:
    """The order named "native" or "megatron"; `chapters` is Megatron's alone."""
    if order == "native":
        return NativeGroups(sentences, shape, seed, cache)
    return MegatronGroups(sentences, shape, seed, cache, tuple(chapters))


class SentenceDataset:
    """Samples of one source in their order; `dataset[i]` is a `Group`."""

    def __init__(self, indexed: IndexedDataset, order: GroupOrder) -> None:
        self.indexed = indexed
        self.order = order

    def __len__(self) -> int:
        return self.order.once

    def __getitem__(self, i: int) -> Group:
        if i < 0:
            raise IndexError(f"sample {i}: samples are counted from 0")
        first, last, target = self.order.find(i)
        sentences = [self.indexed.get(item) for item in range(first, last)]
        return Group(np.concatenate(sentences, dtype=np.int64), [len(s) for s in sentences], target)

    def pieces(self, i: int) -> list[Piece]:
        """The sentences of sample `i`, whole: which of their tokens are cut off is drawn with the masks."""
        first, last, _ = self.order.find(i)
        return [Piece(item, 0, int(self.indexed.sizes[item])) for item in range(first, last)]


def _shuffled(count: int, random_seed: list[int]) -> npt.NDArray:
    order = np.arange(count, dtype=np.uint32 if count <= np.iinfo(np.uint32).max else np.int64)
    np.random.RandomState(random_seed).shuffle(order)
    return order


def _row(index: SentenceIndex, row: int) -> tuple[int, int, int]:
    first, last, target = index.groups[row].tolist()
    return first, last, target


def _key(order: NativeGroups | MegatronGroups, algorithm: str) -> Key:
    shape, documents = order.shape, order.sentences.documents
    return {
        "algorithm": f"{algorithm} 1",
        "file": order.sentences.identity,
        "first": int(documents[0]),
        "last": int(documents[-1]),
        "max_length": shape.max_length,
        "min_sentences": shape.min_sentences,
        "short_seq_prob": repr(shape.short_seq_prob),
        "seed": order.seed,
    }
