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
