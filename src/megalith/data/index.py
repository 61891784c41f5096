"""Which tokens make up sample j: Megatron's document, sample and shuffle index, bit for bit, and the parts it is made of.

```
documents   the items in the order they are read, epoch after epoch      [2 1 5 0 4 3]
samples     sample k covers the stream from row k to row k + 1,          [[0 0] [1 1] [2 6] …]
            both ends included: neighbours share one token               (place in `documents`, token of that item)
shuffle     sample j of the data set is the k-th of the stream           [0 2 1 3]
```
Knows arithmetic on lengths. Refuses to know files, caches, blends and who asks. Randomness is numpy's legacy
`RandomState`, whose numbers never change; the algorithm is `_build_index_mappings` of Megatron-LM's gpt_dataset.py,
without its assertion on small data. Items without tokens are legal and hold no sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_BLOCK = 1 << 15
"""Items, and about so many rows, walked at once: the buffers stay in the processor's cache."""


@dataclass(frozen=True)
class GPTIndex:
    """The three arrays of a data set of `len(shuffle)` samples.

    `documents` int32[D]; `samples` int32 or int64[n + 1, 2]; `shuffle` uint32 or int64[n]. They may be mapped files.
    """

    documents: npt.NDArray
    samples: npt.NDArray
    shuffle: npt.NDArray

    def __len__(self) -> int:
        return len(self.shuffle)


def samples_in(tokens: int, seq_length: int) -> int:
    """Samples of `seq_length + 1` tokens, neighbours sharing one, that a stream of `tokens` holds."""
    return max(tokens - 1, 0) // seq_length


def epochs_needed(tokens_per_epoch: int, seq_length: int, samples: int) -> int:
    """Smallest number of passes over the items whose joint stream holds `samples` (at least one)."""
    return max(-(-(samples * seq_length + 1) // tokens_per_epoch), 1)


def megatron_index(
    sizes: npt.NDArray, documents: npt.NDArray, seq_length: int, *, samples: int, seed: int
) -> GPTIndex:
    """Megatron's index for at least `samples` samples of the items `documents`, whose lengths are in `sizes`.

    The stream runs over whole epochs; the last one is shuffled by itself when it would give fewer than 80 % of its
    samples. The result may hold more than `samples` samples. At least one token is required.
    """
    documents = np.asarray(documents, dtype=np.int32)
    tokens = int(np.take(sizes, documents).sum(dtype=np.int64))
    if tokens < 1:
        raise ValueError("an index needs at least one token")
    epochs = epochs_needed(tokens, seq_length, samples)
    before_last = samples_in((epochs - 1) * tokens, seq_length)
    separate = epochs > 1 and samples - before_last < int(0.80 * samples_in(tokens, seq_length))
    random = np.random.RandomState(seed)
    order = _shuffled_epochs(documents, epochs, separate, random)
    count = samples_in(epochs * tokens, seq_length)
    rows = sample_rows(sizes, order, seq_length, count)
    border = before_last if separate else count
    return GPTIndex(order, rows, _shuffled_parts(count, border, random))


def epoch_index(
    sizes: npt.NDArray, documents: npt.NDArray, seq_length: int, random_seed: list[int]
) -> GPTIndex:
    """One pass over `documents`: items shuffled, cut into samples, samples shuffled; the surplus is not read."""
    random = np.random.RandomState(random_seed)
    order = np.array(documents, dtype=np.int32)
    random.shuffle(order)
    tokens = int(np.take(sizes, order).sum(dtype=np.int64))
    count = samples_in(tokens, seq_length)
    return GPTIndex(
        order, sample_rows(sizes, order, seq_length, count), _shuffled_parts(count, count, random)
    )


def sample_rows(sizes: npt.NDArray, order: npt.NDArray, seq_length: int, count: int) -> npt.NDArray:
    """[count + 1, 2]: where in the stream of the items `order` every `seq_length`-th token lies.

    Row k is (place in `order`, offset in that item) of stream token k · seq_length; row 0 is (0, 0) always. int32, or
    int64 where a number does not fit. The stream must hold count · seq_length + 1 tokens.
    """
    largest = max(len(order), int(sizes.max(initial=0)))
    rows = np.empty((count + 1, 2), np.int32 if largest <= np.iinfo(np.int32).max else np.int64)
    start, row = 0, 0
    block = max(min(_BLOCK, _BLOCK * len(order) // (count + 1)), 1)
    for first in range(0, len(order), block):
        lengths = np.take(sizes, order[first : first + block])
        ends = start + np.cumsum(lengths, dtype=np.int64)
        start = int(ends[-1])
        after = np.minimum((ends + (seq_length - 1)) // seq_length, count + 1)  # first row behind each item
        stop = int(after[-1])
        item = np.repeat(np.arange(len(lengths)), np.diff(after, prepend=row))
        ends -= lengths
        rows[row:stop, 0] = item
        rows[row:stop, 0] += first
        rows[row:stop, 1] = np.arange(row, stop) * seq_length - ends[item]
        row = stop
        if row > count:
            break
    if row <= count:
        raise ValueError(f"the stream holds {start} tokens, {count} samples need {count * seq_length + 1}")
    rows[0] = 0
    return rows


def _shuffled_epochs(
    documents: npt.NDArray, epochs: int, separate: bool, random: np.random.RandomState
) -> npt.NDArray:
    """All epochs shuffled together, or the last one apart from the others."""
    order = np.tile(documents, epochs)
    border = len(order) - len(documents) if separate else len(order)
    random.shuffle(order[:border])
    if separate:
        random.shuffle(order[border:])
    return order


def _shuffled_parts(count: int, border: int, random: np.random.RandomState) -> npt.NDArray:
    """0 … count − 1 with the numbers below `border` and those from it on shuffled among themselves."""
    numbers = np.arange(count, dtype=np.uint32 if count < np.iinfo(np.uint32).max - 1 else np.int64)
    random.shuffle(numbers[:border])
    if border < count:
        random.shuffle(numbers[border:])
    return numbers
