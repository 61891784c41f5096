"""Which source each sample of a weighted blend comes from, and the how many-th of that source it is.

Megatron's rule: sample i goes to the source that lags furthest behind its share, `weight · max(i, 1) − taken so far`
(the first one on a tie), in double precision. It looks only backwards, so a blend does not depend on how long the run
is. Knows weights and counts. Refuses to know data sets.

The rule is a chain, each choice needing the one before. To run it at numpy's speed the chain is cut into many blocks
that advance side by side. A block's starting counts are guessed (every source at its share, then a warm-up, which
nearly always lands on the true counts, because the rule forgets where it came from); afterwards every guess is compared
with what the block before ended on, and wrong ones are run again. The result is exact whatever the guesses were.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.float64]  # [K sources, B blocks], whole numbers

_SEQUENTIAL = 4096  # below this many samples blocks do not pay
_CHUNK = 1 << 20
_KEPT_CHUNKS = 4


def normalised(weights: Sequence[float]) -> npt.NDArray[np.float64]:
    """Weights that add up to 1. ValueError unless all are positive and finite."""
    array = np.asarray(weights, dtype=np.float64)
    if not len(array) or not np.all(np.isfinite(array)) or array.min() <= 0:
        raise ValueError("weights must be above 0")
    return array / array.sum()


def blend(
    weights: npt.NDArray[np.float64], count: int, *, start: int = 0, taken: Counts | None = None
) -> tuple[npt.NDArray, npt.NDArray[np.int64], Counts]:
    """Samples `start … start + count − 1`: (source uint8 or uint16[count], number within it int64[count], taken).

    `taken` float64[K] is how many samples each source has given before `start`, and is returned for its end.
    """
    counts = np.zeros(len(weights)) if taken is None else taken.astype(np.float64)
    if count < _SEQUENTIAL:
        return _chain(weights, counts, start, count)
    width = max(int(np.sqrt(count / 2)), 1)
    length = count // width
    source, number, counts = _blocks(weights, counts, start, (width, length))
    rest = _chain(weights, counts, start + width * length, count - width * length)
    return np.concatenate([source, rest[0]]), np.concatenate([number, rest[1]]), rest[2]


def _chain(
    weights: npt.NDArray[np.float64], counts: Counts, start: int, count: int
) -> tuple[npt.NDArray, npt.NDArray[np.int64], Counts]:
    column = counts[:, None].copy()
    source, number = _advance(weights, column, np.array([float(start)]), count)
    return source[:, 0], number[:, 0], column[:, 0]


def _blocks(
    weights: npt.NDArray[np.float64], counts: Counts, start: int, shape: tuple[int, int]
) -> tuple[npt.NDArray, npt.NDArray[np.int64], Counts]:
    """`shape` = (blocks, samples in each), one behind the other from `start`."""
    width, length = shape
    firsts = start + np.arange(width, dtype=np.float64) * length
    begin = _guess(weights, firsts, min(16 * len(weights) + 64, length))
    begin[:, 0] = counts
    ends = begin.copy()
    source, number = _advance(weights, ends, firsts, length)
    while True:
        wrong = 1 + np.flatnonzero((begin[:, 1:] != ends[:, :-1]).any(axis=0))
        if not len(wrong):
            break
        begin[:, wrong] = ends[:, wrong - 1]
        redone = begin[:, wrong]
        source[:, wrong], number[:, wrong] = _advance(weights, redone, firsts[wrong], length)
        ends[:, wrong] = redone
    return source.T.reshape(-1), number.T.reshape(-1), ends[:, -1].copy()


def _guess(weights: npt.NDArray[np.float64], at: npt.NDArray[np.float64], warm_up: int) -> Counts:
    """Plausible counts before the samples `at`: shares rounded to whole numbers, then `warm_up` steps of the rule."""
    first = np.maximum(at - warm_up, 0)
    shares = weights[:, None] * first
    counts = np.floor(shares)
    missing = first - counts.sum(axis=0)
    place = np.argsort(np.argsort(counts - shares, axis=0, kind="stable"), axis=0, kind="stable")
    counts += place < missing
    _advance(weights, counts, first, warm_up, keep=False)
    return counts


def _advance(
    weights: npt.NDArray[np.float64],
    counts: Counts,
    at: npt.NDArray[np.float64],
    steps: int,
    keep: bool = True,
) -> tuple[npt.NDArray, npt.NDArray[np.int64]]:
    """Run the rule `steps` times in every column of `counts` (changed in place), column b beginning at sample at[b]."""
    columns = np.arange(counts.shape[1])
    shape = (steps if keep else 0, counts.shape[1])
    source = np.empty(shape, np.uint8 if len(weights) <= 256 else np.uint16)
    number = np.empty(shape, np.int64)
    for step in range(steps):
        lag = weights[:, None] * np.maximum(at + step, 1.0)
        lag -= counts
        chosen = lag.argmax(axis=0)
        before = counts[chosen, columns]
        if keep:
            source[step], number[step] = chosen, before
        counts[chosen, columns] = before + 1
    return source, number


class Blend:
    """The endless blend of `weights`, readable at any place; recent stretches are kept. Safe to share by threads."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = normalised(weights)
        self._taken = [np.zeros(len(self.weights))]  # before chunk 0, 1, …
        self._chunks: OrderedDict[int, tuple[npt.NDArray, npt.NDArray]] = OrderedDict()
        self._lock = threading.Lock()

    def locate(self, numbers: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(source, number within the source), int64 each, of the samples `numbers` ≥ 0 of the blend."""
        source, within = np.zeros_like(numbers), np.array(numbers)
        if len(self.weights) == 1:
            return source, within
        chunk_of = numbers // _CHUNK
        for chunk in np.unique(chunk_of):
            here = chunk_of == chunk
            sources, withins = self._chunk(int(chunk))
            source[here] = sources[numbers[here] - chunk * _CHUNK]
            within[here] = withins[numbers[here] - chunk * _CHUNK]
        return source, within

    def taken(self, count: int) -> npt.NDArray[np.int64]:
        """How many of the first `count` samples come from each source."""
        if len(self.weights) == 1:
            return np.array([count])
        chunk, rest = divmod(count, _CHUNK)
        sources, _ = self._chunk(chunk)
        before = self._taken[chunk].astype(np.int64)
        return before + np.bincount(sources[:rest], minlength=len(self.weights))

    def _chunk(self, chunk: int) -> tuple[npt.NDArray, npt.NDArray]:
        with self._lock:
            if chunk in self._chunks:
                self._chunks.move_to_end(chunk)
                return self._chunks[chunk]
            for number in range(min(chunk, len(self._taken) - 1), chunk + 1):
                made = blend(self.weights, _CHUNK, start=number * _CHUNK, taken=self._taken[number])
                if number + 1 == len(self._taken):
                    self._taken.append(made[2])
            self._chunks[chunk] = made[:2]
            while len(self._chunks) > _KEPT_CHUNKS:
                self._chunks.popitem(last=False)
            return self._chunks[chunk]
