"""Samples are the tokens that the index says, cut out of the joint stream; their pieces add up."""

from __future__ import annotations

import numpy as np
import pytest

from megalith.data.cache import IndexCache
from megalith.data.gpt import GPTDataset
from megalith.data.indexed.mmap import open_indexed
from megalith.data.orders import MegatronOrder, NativeOrder, chapter_length, make_order
from megalith.data.sources import Files
from megalith.data.splits import Range
from tests.data import straightforward
from tests.data.corpus import random_lengths, write


def dataset(path, order="native", *, seq_length=8, seed=3, chapters=(20,), split=None):
    file = Files(None).open(path)
    made = make_order(
        order,
        file.items(split or Range(0, len(file.indexed)), "train"),
        IndexCache([]),
        seq_length=seq_length,
        seed=seed,
        chapters=chapters,
    )
    return GPTDataset(file.indexed, made, seq_length)


def test_megatron_samples(tmp_path):
    lengths = random_lengths(0)
    path = write(tmp_path / "a", lengths)
    data = dataset(path, "megatron", chapters=(70,))
    order, _, shuffle = straightforward.megatron(lengths, range(len(lengths)), 8, 70, 3)
    items = [1000 * i + np.arange(length) for i, length in enumerate(lengths)]
    assert len(data) == len(shuffle) >= 70
    for i in range(len(data)):
        assert data[i].dtype == np.int64
        assert data[i].tolist() == straightforward.sample_tokens(items, order, 8, shuffle[i])
    with pytest.raises(IndexError, match="holds"):
        data[len(data)]


def test_empty_items_between(tmp_path):
    lengths = [0, 3, 0, 0, 9, 0, 5, 0]
    data = dataset(write(tmp_path / "a", lengths), "megatron", seq_length=4, chapters=(9,))
    order, _, shuffle = straightforward.megatron(lengths, range(8), 4, 9, 3)
    items = [1000 * i + np.arange(length) for i, length in enumerate(lengths)]
    for i in range(9):
        assert data[i].tolist() == straightforward.sample_tokens(items, order, 4, shuffle[i])
        assert all(piece.length > 0 for piece in data.pieces(i))


@pytest.mark.parametrize("order", ["native", "megatron"])
def test_pieces_are_where_the_tokens_come_from(tmp_path, order):
    data = dataset(write(tmp_path / "a", random_lengths(1)), order)
    indexed = open_indexed(tmp_path / "a")
    for i in range(20):
        pieces = data.pieces(i)
        assert sum(piece.length for piece in pieces) == 9
        joined = [indexed.get(piece.item, piece.offset, piece.length) for piece in pieces]
        assert np.concatenate(joined).tolist() == data[i].tolist()
        assert {piece.item for piece in pieces} == {token // 1000 for token in data[i].tolist()}


def test_only_the_split_is_read(tmp_path):
    data = dataset(write(tmp_path / "a", [20] * 10), split=Range(3, 7))
    assert len(data) == 79 // 8
    read = {token // 1000 for i in range(3 * len(data)) for token in data[i].tolist()}
    assert read == {3, 4, 5, 6}


def test_native_goes_on_for_ever_in_epochs(tmp_path):
    data = dataset(write(tmp_path / "a", random_lengths(2)))
    epochs = [[tuple(data[epoch * len(data) + i]) for i in range(len(data))] for epoch in range(5)]
    for epoch in epochs:
        inputs = [token for sample in epoch for token in sample[:-1]]
        assert len(inputs) == len(set(inputs)) == 8 * len(data)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    with pytest.raises(IndexError):
        data[-1]


def test_chapters_follow_each_other(tmp_path):
    path = write(tmp_path / "a", random_lengths(4))
    first = dataset(path, "megatron", chapters=(40,))
    both = dataset(path, "megatron", chapters=(40, 25))
    alone = dataset(path, "megatron", chapters=(25,), seed=4)
    assert len(both) == len(first) + len(alone)
    assert [both[i].tolist() for i in range(len(both))] == (
        [first[i].tolist() for i in range(len(first))] + [alone[i].tolist() for i in range(len(alone))]
    )


def test_chapter_length_is_known_beforehand(tmp_path):
    path = write(tmp_path / "a", random_lengths(5))
    tokens = open_indexed(path).num_tokens
    for asked in (0, 1, 7, 39, 40, 200):
        data = dataset(path, "megatron", chapters=(asked,))
        assert len(data) == chapter_length(tokens, 8, asked) == len(data.order.find(0)[0])


def test_the_kinds_of_order(tmp_path):
    path = write(tmp_path / "a", random_lengths(6))
    assert isinstance(dataset(path).order, NativeOrder)
    assert isinstance(dataset(path, "megatron").order, MegatronOrder)
