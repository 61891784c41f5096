"""Shares of the ranks make up the batch; cyclic equals Megatron's generator, batch by batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.data.sampler import CyclicSampler, SequentialSampler, batch_positions
from megalith.errors import ConfigError


@given(consumed=st.integers(0, 10**12), rows=st.integers(1, 5), ranks=st.integers(1, 5))
def test_shares_make_up_the_batch(consumed, rows, ranks):
    shares = [batch_positions(consumed, rows * ranks, data_rank=r, data_size=ranks) for r in range(ranks)]
    assert np.concatenate(shares).tolist() == list(range(consumed, consumed + rows * ranks))


def test_a_batch_that_does_not_divide():
    with pytest.raises(ValueError, match="does not divide"):
        batch_positions(0, 10, data_size=4)


def megatron_random_sampler(total, consumed, micro, rank, ranks, sharding):
    """One call of `iter()` of Megatron's sampler: micro-batches of one rank until the epoch ends."""
    active = total - total % (micro * ranks)
    epoch, current = divmod(consumed, active)
    generator = torch.Generator()
    generator.manual_seed(epoch)
    if sharding:
        bucket = (total // (micro * ranks)) * micro
        order = torch.randperm(bucket, generator=generator).tolist()
        numbers = [rank * bucket + x for x in order[current // ranks :]]
    else:
        whole = (total // micro) * micro
        order = torch.randperm(whole, generator=generator).tolist()[current:]
        numbers = order[rank::ranks]
    batch = []
    for number in numbers:
        batch.append(number)
        if len(batch) == micro:
            yield batch
            batch = []


@given(
    total=st.integers(1, 90),
    micro=st.integers(1, 4),
    ranks=st.integers(1, 3),
    start=st.integers(0, 40),
    sharding=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_cyclic_is_megatrons(total, micro, ranks, start, sharding):
    stride = micro * ranks
    if total < stride:
        with pytest.raises(ConfigError, match="cyclic needs at least"):
            CyclicSampler(total, micro, ranks, sharding)
        return
    sampler = CyclicSampler(total, micro, ranks, sharding)
    consumed = start * stride
    sampler.check_start(consumed)
    left = (sampler.active - consumed % sampler.active) // stride  # micro-batches until the epoch ends
    for rank in range(ranks):
        theirs = list(megatron_random_sampler(total, consumed, micro, rank, ranks, sharding))[:left]
        for turn, expected in enumerate(theirs):
            at = consumed + turn * stride + rank * micro
            assert sampler.numbers(np.arange(at, at + micro)).tolist() == expected


def test_a_cyclic_round_reads_every_sample_once():
    sampler = CyclicSampler(29, 2, 3)
    for epoch in range(3):
        numbers = sampler.numbers(np.arange(sampler.active) + epoch * sampler.active)
        assert len(set(numbers.tolist())) == sampler.active == 24
    across = sampler.numbers(np.array([23, 24]))
    assert across.tolist() == [*sampler.numbers(np.array([23])), *sampler.numbers(np.array([24]))]


def test_cyclic_cannot_start_anywhere():
    sampler = CyclicSampler(29, 2, 3)
    sampler.check_start(24 + 6)
    with pytest.raises(ConfigError, match="not whole micro-batches of 6"):
        sampler.check_start(4)


def test_sequential_is_the_identity():
    numbers = np.array([5, 1, 9])
    SequentialSampler().check_start(3)
    assert SequentialSampler().numbers(numbers).tolist() == [5, 1, 9]
