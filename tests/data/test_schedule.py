"""Batch sizes equal Megatron's calculator step by step; every wrong ramp is refused before the first step."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.data.schedule import BatchRampUp, Stage
from megalith.errors import ConfigError


def megatron_steps(start, increment, samples, batch, train_samples):
    """Sizes of the steps, as `RampupBatchsizeNumMicroBatches` and `update_train_iters` go through them."""
    sizes, consumed = [], 0
    increments = (batch - start) // increment
    per_increment = samples / increments if increments else 0
    while True:
        if consumed > samples or not increments:
            size = batch
        else:
            size = start + (int(consumed / per_increment) if per_increment else increments) * increment
        if consumed + size > train_samples:
            return sizes
        sizes.append(size)
        consumed += size


RAMPS = st.tuples(st.integers(1, 20), st.integers(1, 9), st.integers(0, 12), st.integers(0, 4000))


@given(ramp=RAMPS, train_samples=st.integers(0, 6000))
@settings(max_examples=200, deadline=None)
def test_like_megatron(ramp, train_samples):
    start, increment, levels, samples = ramp
    batch = start + levels * increment
    schedule = BatchRampUp(start, increment, samples, batch)
    sizes = megatron_steps(start, increment, samples, batch, train_samples)
    consumed = 0
    for step, size in enumerate(sizes):
        assert schedule.size_at(consumed) == size
        assert schedule.consumed_at(step) == consumed
        assert schedule.step_at(consumed) == step
        consumed += size
    assert schedule.steps_within(train_samples) == len(sizes)
    assert {stage.size for stage in schedule.stages} >= set(sizes)


def test_the_175b_ramp():
    schedule = BatchRampUp.from_config([16, 16, 5859375], 1536)
    assert len(schedule.stages) == 96
    assert schedule.stages[:2] == (Stage(0, 0, 16), Stage(3855, 61680, 32))
    assert schedule.stages[-1].size == 1536
    steps = schedule.steps_within(146484375)
    counted, consumed = 0, 0
    while consumed <= 5859375:
        consumed += schedule.size_at(consumed)
        counted += 1
    assert steps == counted + (146484375 - consumed) // 1536
    schedule.check(1, 16)


def test_constant():
    schedule = BatchRampUp.from_config(None, 8)
    assert schedule.stages == (Stage(0, 0, 8),)
    assert (schedule.size_at(0), schedule.consumed_at(10), schedule.step_at(80)) == (8, 80, 10)
    assert schedule.steps_within(85) == 10
    with pytest.raises(
        ValueError, match=r"81 samples are not a whole number of steps \(step 10 begins at 80\)"
    ):
        schedule.step_at(81)


@pytest.mark.parametrize(
    ("ramp", "batch", "said"),
    [
        ([16, 5, 100], 32, ["5 does not divide", "an increment among 1, 2, 4, 8, 16"]),
        ([64, 8, 100], 32, ["64 is above global_batch_size 32"]),
        ([0, 0, -1], 32, ["first batch size is 0", "increment is 0", "length is -1"]),
        ([16, 16], 32, ["has 2 numbers", "three numbers"]),
        (None, 0, ["0 is not a batch size"]),
    ],
)
def test_wrong_numbers(ramp, batch, said):
    with pytest.raises(ConfigError) as caught:
        BatchRampUp.from_config(ramp, batch)
    for part in said:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("ramp", "batch", "said"),
    [
        ([16, 16, 1000], 64, ["32 does not divide the batch sizes 16, 48", "first 32, increments 32"]),
        ([8, 8, 200000], 512, ["8, 16, 24, 40, 48, 56, …, 504", "32, 64, 96, 128, 160, 192, …, 512"]),
        ([20, 20, 1000], 100, ["model.global_batch_size first: a multiple of 32: 96 or 128"]),
        ([16, 48, 1000], 64, ["first batch size among 32, 64"]),
        (None, 100, ["32 does not divide the batch size 100", "a multiple of 32: 96 or 128"]),
        (None, 8, ["a multiple of 32: 32"]),
    ],
)
def test_sizes_that_do_not_divide(ramp, batch, said):
    with pytest.raises(ConfigError) as caught:
        BatchRampUp.from_config(ramp, batch).check(micro_batch_size=4, data_size=8)
    for part in said:
        assert part in str(caught.value)


def test_only_sizes_that_are_reached_count():
    """The ramp is so short that 24 is jumped over."""
    schedule = BatchRampUp(16, 8, 10, 32)
    assert [stage.size for stage in schedule.stages] == [16, 32]
    schedule.check(16, 1)


def test_a_ramp_of_no_length():
    assert BatchRampUp(4, 4, 0, 16).stages == (Stage(0, 0, 16),)
