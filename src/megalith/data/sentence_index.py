"""Which sentences make up a sample: Megatron's `build_mapping`, bit for bit, and the parts it is made of.

```
documents  [0 3 4 9 12]   items at which documents begin, and the end
groups     row (first, last, target): items first … last − 1 of one document, cut to `target` tokens
```
A document is walked from its begin; a group ends where it has `target` tokens and `min_sentences` sentences, unless fewer
than two sentences would be left, which it takes too. Targets are drawn one at the begin of each document and one behind
each group. Randomness is the C++ standard library's; see `twister`. The algorithm is `build_mapping` of Megatron-LM's
helpers.cpp.

Knows arithmetic on lengths. Refuses to know files, caches and tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, repeat

import numpy as np
import numpy.typing as npt

from megalith.data.shape import Shape
from megalith.data.twister import draws_32, draws_64

LONG_SENTENCE = 512
"""Tokens beyond which a sentence makes Megatron leave its whole document out (if it has another sentence)."""

_BLOCK = 1 << 18
"""Items walked at once: their lengths are Python numbers then."""

Array = npt.NDArray


@dataclass(frozen=True)
class SentenceIndex:
    """`groups` uint32 (int64 where a number does not fit) [n, 3]: first item, item behind the last, target length."""

    groups: Array

    def __len__(self) -> int:
        return len(self.groups)


@dataclass(frozen=True)
class Census:
    """What a set of documents holds, in documents that have a sentence."""

    documents: int
    few: int
    """Those with fewer sentences than a group needs."""
    long: int
    """Of the others, those with a sentence of more than 512 tokens beside others."""
    usable: int
    """Those that give samples in the order asked about."""
    single: int
    """Those that are one item."""


def census(sizes: Array, documents: Array, shape: Shape, *, drop_long: bool) -> Census:
    """Count `documents` int64[D + 1] of items with lengths `sizes`. `drop_long`: leave those out, as Megatron does."""
    counts = np.diff(documents)
    long = _with_long_sentence(sizes, documents)
    return Census(
        documents=int((counts > 0).sum()),
        few=int(((counts > 0) & (counts < shape.min_sentences)).sum()),
        long=int((long & (counts >= shape.min_sentences)).sum()),
        usable=int(_usable(sizes, documents, shape, drop_long).sum()),
        single=int((counts == 1).sum()),
    )


def megatron_groups(
    sizes: Array, documents: Array, shape: Shape, *, samples: int, seed: int
) -> SentenceIndex:
    """Megatron's mapping: whole epochs until there are `samples` groups, shuffled together. Some document must be usable."""
    targets = _targets(shape, np.random.RandomState(seed))
    epochs: list[Array] = []
    count = 0
    while not epochs or count < samples:
        if epochs and not _ratio(shape):  # nothing is drawn: every epoch is the same
            epochs += epochs * (-(-samples // len(epochs[0])) - 1)
            break
        epochs.append(_walk(sizes, documents, shape, (targets, True)))
        if not len(epochs[-1]):
            raise ValueError("no document gives a sample")
        count += len(epochs[-1])
    rows = np.concatenate(epochs)
    return SentenceIndex(rows[shuffled(len(rows), seed + 1)])


def native_groups(sizes: Array, documents: Array, shape: Shape, random_seed: list[int]) -> SentenceIndex:
    """One pass over all documents in file order; those with long sentences too, which are cut like everything else."""
    targets = _targets(shape, np.random.RandomState(random_seed))
    return SentenceIndex(_walk(sizes, documents, shape, (targets, False)))


def shuffled(count: int, seed: int) -> npt.NDArray[np.int64]:
    """0 … count − 1 as the C++ code shuffles them: from the end, each with the (r mod (i + 1))-th, r 64-bit numbers."""
    order = np.arange(count)
    if count < 2:
        return order
    partners = (draws_64(seed, count - 1) % np.arange(count, 1, -1, dtype=np.uint64)).astype(np.int64)
    view = order.data
    for i, j in zip(range(count - 1, 0, -1), partners.data, strict=True):
        view[i], view[j] = view[j], view[i]
    return order


def cut_off(index: SentenceIndex, sizes: Array) -> tuple[int, int]:
    """(tokens of all groups, how many of them lie beyond their group's target and are never read)."""
    ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    first, last, target = index.groups.T
    lengths = ends[last] - ends[first]
    return int(lengths.sum()), int(np.maximum(lengths - target.astype(np.int64), 0).sum())


def _ratio(shape: Shape) -> int:
    """One group in `ratio` is short; 0: none. C++'s `round`: halves away from 0."""
    return int(np.floor(1.0 / shape.short_seq_prob + 0.5)) if shape.short_seq_prob > 0 else 0


def _targets(shape: Shape, random: np.random.RandomState) -> Iterator[int]:
    ratio = _ratio(shape)
    if not ratio:
        return repeat(shape.max_length)
    blocks = (_lengths(draws.astype(np.int64), ratio, shape.max_length) for draws in draws_32(random))
    return chain.from_iterable(blocks)


def _lengths(draws: npt.NDArray[np.int64], ratio: int, longest: int) -> list[int]:
    lengths: list[int] = np.where(draws % ratio == 0, 2 + draws % (longest - 1), longest).tolist()
    return lengths


def _with_long_sentence(sizes: Array, documents: Array) -> npt.NDArray[np.bool_]:
    """bool[D]: whether a document of several sentences has a long one."""
    long = np.concatenate([[0], np.cumsum(sizes[documents[0] : documents[-1]] > LONG_SENTENCE)])
    found: npt.NDArray[np.bool_] = np.diff(long[documents - documents[0]]) > 0
    return found & (np.diff(documents) > 1)


def _usable(sizes: Array, documents: Array, shape: Shape, drop_long: bool) -> npt.NDArray[np.bool_]:
    enough: npt.NDArray[np.bool_] = np.diff(documents) >= max(shape.min_sentences, 1)
    return enough & ~_with_long_sentence(sizes, documents) if drop_long else enough


def _walk(sizes: Array, documents: Array, shape: Shape, drawn: tuple[Iterator[int], bool]) -> Array:
    """[n, 3]: the groups of one pass. `drawn`: the targets, and whether documents with a long sentence are left out."""
    targets, drop_long = drawn
    kept = np.flatnonzero(_usable(sizes, documents, shape, drop_long))
    fits = int(documents[-1]) <= np.iinfo(np.uint32).max
    blocks = [np.empty((0, 3), np.uint32 if fits else np.int64)]
    ends_of_documents = documents[kept + 1]
    at = 0
    while at < len(kept):
        origin = int(documents[kept[at]])
        after = int(np.searchsorted(ends_of_documents, origin + _BLOCK, side="right"))
        block = kept[at : max(after, at + 1)]
        end = int(ends_of_documents[at + len(block) - 1])
        ends = [0, *np.cumsum(sizes[origin:end], dtype=np.int64).tolist()]
        lasts = ends_of_documents[at : at + len(block)] - origin
        borders = zip((documents[block] - origin).tolist(), lasts.tolist(), strict=True)
        rows = np.array(_grouped(ends, borders, shape.min_sentences, targets), np.int64).reshape(-1, 3)
        rows[:, :2] += origin
        blocks.append(rows.astype(blocks[0].dtype))
        at += len(block)
    return np.concatenate(blocks)


def _grouped(
    ends: list[int], documents: Iterator[tuple[int, int]], min_sentences: int, targets: Iterator[int]
) -> list[tuple[int, int, int]]:
    """Groups of documents whose items `first … last − 1` lie in `ends` (tokens before each item)."""
    groups = []
    for first, last in documents:
        target = next(targets)
        while first < last:
            stop = max(bisect_left(ends, ends[first] + target, first + 1, last + 1), first + min_sentences)
            if stop > last - 2:
                stop = last
            groups.append((first, stop, target))
            target = next(targets)
            first = stop
    return groups
