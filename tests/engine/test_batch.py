"""Cutting and counting, before any forward."""

from __future__ import annotations

import pytest
import torch

from megalith.engine.batch import prepare, split
from megalith.engine.objective import CausalLanguageModel
from megalith.errors import DataError
from megalith.topology.topology import Topology
from tests.engine.tiny import LENGTH, tiny_batch


def share_of(batch, **options):
    return prepare(batch, CausalLanguageModel(), Topology.single(), **{"micro_batch_size": 2, **options})


def test_counts_are_of_the_whole_batch():
    batch = tiny_batch()
    share = share_of(batch)
    counted = int((batch["targets"] >= 0).sum())
    assert share.counts == {"lm": counted}
    assert [d["lm"] for d in share.divisors] == [counted] * 4
    assert (share.samples, share.tokens, share.empty) == (8, 8 * LENGTH, False)
    assert torch.equal(torch.cat([m["tokens"] for m in share.micros]), batch["tokens"])
    assert [m["sample"].tolist() for m in share.micros] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_megatrons_average_divides_each_micro_batch_by_its_own_count():
    batch = tiny_batch()
    share = share_of(batch, average="micro_batches")
    own = [int((part["targets"] >= 0).sum()) for part in split(batch, 2)]
    assert own[1] == 0
    assert [d["lm"] for d in share.divisors] == [max(n, 1) * 4 for n in own]


def test_a_batch_without_targets_says_so():
    batch = tiny_batch()
    batch["targets"][:] = -1
    assert share_of(batch).empty


@pytest.mark.parametrize("size", [3, 16])
def test_shares_that_do_not_divide_are_refused(size):
    with pytest.raises(DataError, match="multiple of micro_batch_size"):
        share_of(tiny_batch(), micro_batch_size=size)


def sides(lengths):
    """Two micro-batches of two rows, of which `lengths` tokens of the encoder's six are not padding."""
    return {
        "encoder_tokens": torch.ones(4, 6, dtype=torch.int64),
        "encoder_lengths": torch.tensor(lengths),
        "tokens": torch.ones(4, 3, dtype=torch.int64),
        "targets": torch.ones(4, 3, dtype=torch.int64),
        "sample": torch.arange(4),
    }


def test_tokens_are_those_of_both_sides():
    assert share_of(sides([6, 6, 6, 6])).tokens == 4 * (6 + 3)


@pytest.mark.parametrize(
    ("lengths", "told"),
    [([6, 6, 6, 6], [False, False]), ([6, 6, 6, 5], [False, True]), ([1, 6, 6, 6], [True, False])],
)
def test_a_micro_batch_without_padding_is_told_no_lengths(lengths, told):
    batch = sides(lengths)
    micros = share_of(batch).micros
    assert ["encoder_lengths" in micro for micro in micros] == told
    assert "encoder_lengths" in batch, "the loader's batch stays whole"


def test_of_a_pipeline_all_micro_batches_are_told_or_none(monkeypatch):
    monkeypatch.setattr(Topology, "size", lambda self, axis: 2 if axis == "pipeline" else 1)
    for lengths, told in (([6, 6, 6, 5], [True, True]), ([6, 6, 6, 6], [False, False])):
        assert ["encoder_lengths" in micro for micro in share_of(sides(lengths)).micros] == told
