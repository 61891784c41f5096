"""The mapping equals a sentence-by-sentence walk, loses nothing, and cuts nothing apart."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from megalith.data.sentence_index import census, cut_off, megatron_groups, native_groups, shuffled
from megalith.data.shape import Shape
from megalith.data.twister import draws_64


def corpus(seed, longest=40, documents=40):
    random = np.random.default_rng(seed)
    counts = random.integers(0, 9, documents)
    sizes = random.integers(1, longest, max(int(counts.sum()), 1)).astype(np.int32)
    return sizes, np.concatenate([[0], np.cumsum(counts)])


def one_epoch(sizes, documents, shape, draw):
    """As the C++ does it: sentence by sentence."""
    rows = []
    for first, last in pairwise(documents):
        long = last - first > 1 and max(sizes[first:last], default=0) > 512
        if last - first < shape.min_sentences or long:
            continue
        start, length, count, left, target = first, 0, 0, last - first, draw()
        for item in range(first, last):
            length, count, left = length + sizes[item], count + 1, left - 1
            if (length >= target and left > 1 and count >= shape.min_sentences) or left == 0:
                rows.append((start, item + 1, target))
                start, length, count, target = item + 1, 0, 0, draw()
    return rows


def walked(sizes, documents, shape, samples, seed):
    random = np.random.RandomState(seed)
    ratio = round(1 / shape.short_seq_prob) if shape.short_seq_prob else 0

    def draw():
        if not ratio:
            return shape.max_length
        number = int(random.randint(0, 2**32, dtype=np.uint32))
        return 2 + number % (shape.max_length - 1) if number % ratio == 0 else shape.max_length

    rows = one_epoch(sizes, documents, shape, draw)
    while len(rows) < samples:
        rows += one_epoch(sizes, documents, shape, draw)
    numbers = draws_64(seed + 1, len(rows)).tolist()
    for i, number in zip(range(len(rows) - 1, 0, -1), numbers, strict=False):
        j = number % (i + 1)
        rows[i], rows[j] = rows[j], rows[i]
    return rows


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("prob", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("min_sentences", [1, 2])
def test_it_is_the_walk(seed, prob, min_sentences):
    sizes, documents = corpus(seed, longest=700 if seed % 3 == 0 else 40)
    shape = Shape("bert", 60, min_sentences, prob)
    rows = walked(sizes, documents, shape, 100, seed + 1)
    made = megatron_groups(sizes, documents, shape, samples=100, seed=seed + 1)
    assert made.groups.tolist() == [list(map(int, row)) for row in rows]


def test_a_native_pass_holds_every_sentence_once_and_keeps_documents_apart():
    sizes, documents = corpus(1, longest=700)
    groups = native_groups(sizes, documents, Shape("t5", 60, 1, 0.1), [1, 0]).groups.astype(int)
    assert groups[0, 0] == 0
    assert groups[-1, 1] == documents[-1]
    assert (groups[1:, 0] == groups[:-1, 1]).all()
    first, last = (np.searchsorted(documents, groups[:, i], side) for i, side in ((0, "right"), (1, "left")))
    assert (first == last).all(), "a group lies in one document"


def test_blocks_of_items_do_not_matter(monkeypatch):
    sizes, documents = corpus(2)
    shape = Shape("bert", 60, 2, 0.1)
    whole = native_groups(sizes, documents, shape, [1]).groups
    for block in (1, 7, 50):
        monkeypatch.setattr("megalith.data.sentence_index._BLOCK", block)
        assert np.array_equal(native_groups(sizes, documents, shape, [1]).groups, whole)


def test_a_part_of_a_file():
    """A split begins and ends with documents; numbers are of the whole file."""
    sizes, documents = corpus(3)
    part = documents[10:31]
    groups = native_groups(sizes, part, Shape("t5", 60), [1]).groups
    assert (groups[:, :2].min(), groups[:, :2].max()) == (part[0], part[-1])


def test_shuffled_is_a_permutation():
    assert sorted(shuffled(1000, 5).tolist()) == list(range(1000))
    assert shuffled(1, 5).tolist() == [0]
    assert shuffled(0, 5).tolist() == []


def test_no_document_is_usable():
    with pytest.raises(ValueError, match="no document"):
        megatron_groups(
            np.array([5, 5], np.int32), np.array([0, 1, 2]), Shape("bert", 60, 2), samples=1, seed=1
        )


def test_census_and_what_is_cut_off():
    sizes = np.array([600, 5, 7, 900, 30, 40], np.int32)
    documents = np.array([0, 2, 3, 4, 6])
    shape = Shape("bert", 50, 2)
    found = census(sizes, documents, shape, drop_long=True)
    assert (found.documents, found.few, found.long, found.usable, found.single) == (4, 2, 1, 1, 2)
    assert census(sizes, documents, shape, drop_long=False).usable == 2
    index = native_groups(sizes, documents, shape, [1])
    assert index.groups.tolist() == [[0, 2, 50], [4, 6, 50]]
    assert cut_off(index, sizes) == (675, 555 + 20)
