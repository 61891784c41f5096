"""Blocks give what one chain gives, from any start; the endless blend is the same wherever it is read."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.data import blend as module
from megalith.data.blend import Blend, blend, normalised
from tests.data import straightforward

WEIGHTS = st.lists(st.floats(1e-4, 1.0) | st.sampled_from([0.1, 0.25, 0.5, 1.0]), min_size=1, max_size=9)


@given(weights=WEIGHTS, count=st.integers(0, 700), width=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_blocks_equal_the_chain(weights, count, width):
    weights = normalised(weights)
    sources, numbers = straightforward.blend(weights.tolist(), count)
    made = module._chain(normalised(weights), np.zeros(len(weights)), 0, count)
    assert (made[0].tolist(), made[1].tolist()) == (sources, numbers)
    length = count // width
    cut = module._blocks(normalised(weights), np.zeros(len(weights)), 0, (width, length))
    assert (cut[0].tolist(), cut[1].tolist()) == (sources[: width * length], numbers[: width * length])


@pytest.mark.parametrize("guess", ["zeros", "too many"])
def test_wrong_guesses_are_put_right(guess, monkeypatch):
    """The result is exact whatever the guesses were."""

    def bad(weights, at, warm_up):
        first = np.floor(weights[:, None] * at)
        first[0] += at - first.sum(axis=0)
        return np.zeros_like(first) if guess == "zeros" else first

    weights = normalised([3, 1, 1, 0.01])
    expected = straightforward.blend(weights.tolist(), 6000)
    monkeypatch.setattr(module, "_guess", bad)
    made = blend(weights, 6000)
    assert (made[0].tolist(), made[1].tolist()) == expected
    assert made[2].tolist() == np.bincount(expected[0]).tolist()


def test_it_goes_on_where_it_stopped():
    weights = normalised([0.17, 0.33, 0.5])
    whole = blend(weights, 9000)
    first = blend(weights, 3210)
    second = blend(weights, 9000 - 3210, start=3210, taken=first[2])
    assert np.array_equal(np.concatenate([first[0], second[0]]), whole[0])
    assert np.array_equal(np.concatenate([first[1], second[1]]), whole[1])
    assert np.array_equal(second[2], whole[2])


def test_read_anywhere(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 500)
    endless = Blend([1, 2, 4])
    sources, numbers = map(np.array, straightforward.blend([1, 2, 4], 5000))
    wanted = np.array([4999, 0, 499, 500, 3141, 4500, 17])
    found = endless.locate(wanted)
    assert np.array_equal(found[0], sources[wanted])
    assert np.array_equal(found[1], numbers[wanted])
    for count in (0, 1, 499, 500, 501, 3333):
        assert endless.taken(count).tolist() == np.bincount(sources[:count], minlength=3).tolist()


def test_each_source_is_read_in_order_without_gaps():
    sources, numbers, _ = blend(normalised([5, 3, 1, 1, 0.2]), 20_000)
    for source in range(5):
        mine = numbers[sources == source]
        assert np.array_equal(mine, np.arange(len(mine)))


@given(weights=WEIGHTS, count=st.integers(1, 3000))
@settings(max_examples=40, deadline=None)
def test_no_source_runs_ahead_of_its_share(weights, count):
    """So ⌈share⌉ samples of each source are always enough."""
    weights = normalised(weights)
    taken = blend(weights, count)[2]
    assert np.all(taken <= np.ceil(weights * count + 1e-9))


def test_many_sources():
    weights = np.random.default_rng(0).random(300)
    made = blend(normalised(weights), 5000)
    assert made[0].dtype == np.uint16
    assert (made[0].tolist(), made[1].tolist()) == straightforward.blend(
        (weights / weights.sum()).tolist(), 5000
    )


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [1, float("nan")]])
def test_impossible_weights(weights):
    with pytest.raises(ValueError, match="above 0"):
        normalised(weights)


def test_a_million_samples_take_no_time():
    start = time.perf_counter()
    blend(normalised([0.2, 0.3, 0.5]), 1_000_000)
    assert time.perf_counter() - start < 5, "0.05 s on an idle core"
