"""The index equals a slow, obvious implementation; each sample holds the tokens it should, each exactly once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.data import index as module
from megalith.data.index import epoch_index, epochs_needed, megatron_index, sample_rows, samples_in
from tests.data import straightforward

LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any)


@given(
    lengths=LENGTHS, seq_length=st.integers(1, 20), samples=st.integers(1, 60), seed=st.integers(0, 2**32 - 1)
)
@settings(max_examples=150, deadline=None)
def test_megatron_index_equals_the_obvious_one(lengths, seq_length, samples, seed):
    documents = range(len(lengths))
    made = megatron_index(
        np.array(lengths, np.int32), np.array(documents), seq_length, samples=samples, seed=seed
    )
    order, rows, shuffle = straightforward.megatron(lengths, documents, seq_length, samples, seed)
    assert made.documents.tolist() == order
    assert made.samples.tolist() == rows
    assert made.shuffle.tolist() == shuffle
    assert len(made) >= samples


@pytest.mark.parametrize("block", [1, 2, 3, 1000])
def test_rows_do_not_depend_on_the_block(block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", block)
    rng = np.random.default_rng(block)
    lengths = rng.integers(0, 40, 50).astype(np.int32)
    order = rng.permutation(50).astype(np.int32)
    count = samples_in(int(lengths.sum()), 7)
    assert sample_rows(lengths, order, 7, count).tolist() == straightforward.walk(lengths, order, 7, count)


def test_tiny_data_is_legal():
    """Megatron's assertion (last epoch number of samples exceeded max value) trips here: last = 4, per epoch = 3."""
    index = megatron_index(np.array([10, 5], np.int32), np.arange(2), 4, samples=7, seed=1)
    assert epochs_needed(15, 4, 7) == 2
    assert samples_in(2 * 15, 4) - samples_in(15, 4) == 4 > samples_in(15, 4)
    assert sorted(index.shuffle.tolist()) == list(range(7))


def test_one_token_is_enough_for_megatron():
    index = megatron_index(np.array([1], np.int32), np.arange(1), 3, samples=2, seed=1)
    assert index.samples.tolist() == [[0, 0], [3, 0], [6, 0]]
    with pytest.raises(ValueError, match="at least one token"):
        megatron_index(np.array([0, 0], np.int32), np.arange(2), 3, samples=2, seed=1)


def test_only_the_documents_of_the_split_are_used():
    sizes = np.array([4, 4, 4, 4, 4], np.int32)
    index = megatron_index(sizes, np.array([1, 3]), 2, samples=10, seed=7)
    assert set(index.documents.tolist()) == {1, 3}


@given(lengths=LENGTHS, seq_length=st.integers(1, 9), epoch=st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_an_epoch_reads_every_token_once(lengths, seq_length, epoch):
    sizes = np.array(lengths, np.int32)
    index = epoch_index(sizes, np.arange(len(lengths)), seq_length, [1, 0, epoch])
    assert sorted(index.documents.tolist()) == list(range(len(lengths)))
    assert sorted(index.shuffle.tolist()) == list(range(len(index)))
    ids = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    stream = [t for d in index.documents for t in ids[d]]
    as_input = [t for k in range(len(index)) for t in stream[k * seq_length : (k + 1) * seq_length]]
    assert len(set(as_input)) == len(as_input) == len(index) * seq_length
    assert sum(lengths) - 1 - len(as_input) < seq_length
    assert index.samples.tolist() == straightforward.walk(lengths, index.documents, seq_length, len(index))


def test_epochs_differ():
    sizes = np.full(50, 10, np.int32)
    first, second = (epoch_index(sizes, np.arange(50), 8, [1, 0, epoch]) for epoch in (0, 1))
    assert first.documents.tolist() != second.documents.tolist()
    assert first.shuffle.tolist() != second.shuffle.tolist()


def test_the_native_epoch_never_changes():
    """Written down so that a run of today is resumed in the same order by every later release."""
    index = epoch_index(np.array([5, 3, 7, 4, 6, 9], np.int32), np.arange(6), 8, [1234, 0, 1])
    assert index.documents.tolist() == NATIVE_DOCUMENTS
    assert index.samples.tolist() == NATIVE_ROWS
    assert index.shuffle.tolist() == NATIVE_SHUFFLE


def test_too_short_a_stream_is_noticed():
    with pytest.raises(ValueError, match="the stream holds 9 tokens, 2 samples need 11"):
        sample_rows(np.array([4, 5], np.int32), np.arange(2), 5, 2)


def test_streams_longer_than_32_bits():
    sizes = np.array([2**31 - 1, 2**31 - 1], np.int32)
    index = megatron_index(sizes, np.arange(2), 2**30, samples=3, seed=1)
    assert index.samples.tolist() == [[0, 0], [0, 2**30], [1, 1], [1, 2**30 + 1]]


NATIVE_DOCUMENTS = [4, 0, 3, 5, 1, 2]
NATIVE_ROWS = [[0, 0], [1, 2], [3, 1], [4, 0], [5, 5]]
NATIVE_SHUFFLE = [3, 1, 0, 2]
