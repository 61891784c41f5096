"""Megatron's own numbers: computed by running the reference pieces, not by us."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from megalith.data.blend import Blend, blend, normalised
from megalith.data.index import megatron_index
from megalith.data.splits import split_ranges

SIZES = np.array([5, 3, 7, 4, 6, 9], np.int32)


@pytest.mark.parametrize(
    ("samples", "documents", "rows", "shuffle"),
    [
        (4, [2, 1, 5, 0, 4, 3], [[0, 0], [1, 1], [2, 6], [4, 0], [5, 2]], [0, 2, 1, 3]),
        (
            9,
            [1, 2, 5, 2, 3, 4, 1, 0, 4, 5, 0, 3, 1, 0, 3, 2, 5, 4],
            [[0, 0], [1, 5], [2, 6], [3, 5], [5, 2], [7, 1], [8, 4], [9, 6], [11, 0], [13, 1], [15, 0], [16, 1], [17, 0]],
            [3, 5, 2, 1, 6, 4, 7, 0, 9, 8, 10, 11],
        ),
    ],
)  # fmt: skip
def test_index(samples, documents, rows, shuffle):
    index = megatron_index(SIZES, np.arange(6), 8, samples=samples, seed=1234)
    assert index.documents.tolist() == documents
    assert index.samples.tolist() == rows
    assert index.shuffle.tolist() == shuffle
    assert (index.documents.dtype, index.samples.dtype, index.shuffle.dtype) == (
        np.int32,
        np.int32,
        np.uint32,
    )


@pytest.mark.parametrize(
    ("text", "items", "borders"),
    [
        ("969, 30, 1", 1000, [0, 969, 999, 1000]),
        ("969, 30, 1", 100, [0, 97, 100, 100]),
        ("949,50,1", 1000, [0, 949, 999, 1000]),
        ("949,50,1", 10, [0, 10, 10, 10]),
        ("98,2,0", 12345, [0, 12098, 12345, 12345]),
        ("1,1,1", 10, [0, 4, 7, 10]),
    ],
)
def test_splits(text, items, borders):
    ranges = split_ranges(text, items)
    assert [(r.first, r.last) for r in ranges.values()] == list(pairwise(borders))


def test_blend():
    sources, numbers, taken = blend(normalised([0.2, 0.3, 0.5]), 20)
    assert sources.tolist() == [2, 1, 0, 2, 1, 2, 0, 2, 1, 2, 0, 2, 1, 2, 1, 2, 0, 2, 1, 2]
    assert numbers.tolist() == [0, 0, 0, 1, 1, 2, 1, 3, 2, 4, 2, 5, 3, 6, 4, 7, 3, 8, 5, 9]
    assert taken.tolist() == [4, 6, 10]
    again = Blend([0.2, 0.3, 0.5]).locate(np.arange(20))
    assert [a.tolist() for a in again] == [sources.tolist(), numbers.tolist()]
