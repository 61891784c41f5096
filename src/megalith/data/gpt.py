"""Sample i of one source as tokens: `seq_length + 1` of them, read from the mapped file.

Knows how a row of the index becomes pieces of items. Refuses to know how the order was made, weights, batches, masks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megalith.data.indexed.mmap import IndexedDataset
from megalith.data.orders import SourceOrder


class Piece(NamedTuple):
    """`length` tokens from token `offset` of an item of the file."""

    item: int
    offset: int
    length: int


class GPTDataset:
    """Samples of one source in their order; `dataset[i]` is int64[seq_length + 1].

    `len()` counts the samples before anything is read again. A native order goes on behind it, epoch after epoch.
    """

    def __init__(self, indexed: IndexedDataset, order: SourceOrder, seq_length: int) -> None:
        self.indexed = indexed
        self.order = order
        self.seq_length = seq_length

    def __len__(self) -> int:
        return self.order.once

    def __getitem__(self, i: int) -> npt.NDArray[np.int64]:
        tokens = np.empty(self.seq_length + 1, np.int64)
        at = 0
        for item, offset, length in self.pieces(i):
            tokens[at : at + length] = self.indexed.get(item, offset, length)
            at += length
        return tokens

    def pieces(self, i: int) -> list[Piece]:
        """Where the tokens of sample `i` come from, in order; their lengths add up to `seq_length + 1`."""
        if i < 0:
            raise IndexError(f"sample {i}: samples are counted from 0")
        index, row = self.order.find(i)
        (first, start), (last, stop) = index.samples[row : row + 2].tolist()
        items = index.documents[first : last + 1].tolist()
        pieces = []
        for place, item in enumerate(items, first):
            begin = start if place == first else 0
            end = stop + 1 if place == last else int(self.indexed.sizes[item])
            if end > begin:
                pieces.append(Piece(item, begin, end - begin))
        return pieces
