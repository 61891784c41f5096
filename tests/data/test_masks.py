"""Masks equal Megatron's loop written out, for every combination of options."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from megalith.data.masks import MaskOptions, documents, make_batch, positions
from megalith.errors import ConfigError

EOD = 0
ROWS = arrays.arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(2, 24)), elements=st.integers(0, 3))


def megatron_loop(tokens):
    """`get_ltor_masks_and_position_ids` of one batch, item by item: (loss mask, positions, allowed[b, i, j])."""
    batch, length = tokens.shape
    loss_mask = np.ones((batch, length))
    position = np.tile(np.arange(length), (batch, 1))
    allowed = np.tile(np.tril(np.ones((length, length), bool)), (batch, 1, 1))
    loss_mask[tokens == EOD] = 0
    for b in range(batch):
        previous = 0
        for i in np.flatnonzero(tokens[b] == EOD):
            allowed[b, i + 1 :, : i + 1] = False
            position[b, i + 1 :] -= i + 1 - previous
            previous = i + 1
    return loss_mask, position, allowed


@given(rows=ROWS)
@settings(max_examples=100, deadline=None)
def test_like_megatron(rows):
    options = MaskOptions(EOD, mask_loss=True, reset_positions=True, reset_attention=True)
    batch = make_batch(rows, options)
    loss_mask, position, allowed = megatron_loop(rows[:, :-1])
    assert np.array_equal(batch["tokens"], rows[:, :-1])
    assert np.array_equal(batch["targets"], np.where(loss_mask == 1, rows[:, 1:], -1))
    assert np.array_equal(batch["positions"], position)
    numbers = batch["documents"]
    same = numbers[:, :, None] == numbers[:, None, :]
    assert np.array_equal(same & np.tril(np.ones(same.shape[1:], bool)), allowed)


def test_the_two_senses():
    rows = np.array([[5, 6, EOD, 7, EOD, EOD, 8]])
    plain = make_batch(rows, MaskOptions(EOD))
    assert plain["targets"].tolist() == [[6, 0, 7, 0, 0, 8]]
    sense_input = make_batch(rows, MaskOptions(EOD, mask_loss=True))
    assert sense_input["targets"].tolist() == [[6, 0, -1, 0, -1, -1]]
    sense_target = make_batch(rows, MaskOptions(EOD, mask_loss=True, sense="target"))
    assert sense_target["targets"].tolist() == [[6, -1, 7, -1, -1, 8]]


def test_the_drawing_of_the_module():
    tokens = np.array([[11, 12, EOD, 13]])
    assert documents(tokens, EOD).tolist() == [[0, 0, 0, 1]]
    assert positions(tokens, EOD).tolist() == [[0, 1, 2, 0]]


@pytest.mark.parametrize(("positions_", "attention"), list(itertools.product([False, True], repeat=2)))
def test_only_what_is_asked_for(positions_, attention):
    rows = np.array([[1, 2, 3]])
    batch = make_batch(rows, MaskOptions(EOD, reset_positions=positions_, reset_attention=attention))
    expected = {"tokens": np.int64, "targets": np.int64}
    expected |= {"positions": np.int64} if positions_ else {}
    expected |= {"documents": np.int32} if attention else {}
    assert {name: array.dtype for name, array in batch.items()} == expected
    batch["targets"][0, 0] = -1
    assert rows[0, 1] == 2, "targets are a copy"


def test_without_an_end_of_document_token():
    assert make_batch(np.array([[1, 2, 3]]), MaskOptions())["targets"].tolist() == [[2, 3]]
    with pytest.raises(ConfigError) as caught:
        MaskOptions(mask_loss=True, reset_attention=True)
    assert [problem.where for problem in caught.value.problems] == [
        "model.data.eod_mask_loss",
        "model.data.reset_attention_mask",
    ]
