"""Sliding windows count every target once, with the context they promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.evaluate.windows import window, window_starts


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 90), st.integers(1, 17), st.data())
def test_every_target_counts_exactly_once(n, length, data):
    stride = data.draw(st.integers(1, length))
    tokens = np.arange(100, 100 + n)
    seen = []
    for start in window_starts(n, length, stride):
        inputs, targets = window(tokens, start, length, stride)
        counted = targets[targets >= 0]
        assert len(counted) > 0  # no window is run for nothing
        assert (inputs[targets >= 0] == counted - 1).all()
        seen.extend(counted.tolist())
    assert seen == list(range(101, 100 + n))


def test_the_count_is_the_references_less_its_idle_windows():
    n, length, stride = 1000, 64, 32
    reference = max(-(-max(n - 1 - stride, 0) // stride) + 1, 1)
    ours = len(window_starts(n, length, stride))
    assert ours <= reference
    assert reference - ours == pytest.approx((length - stride) // stride, abs=1)
