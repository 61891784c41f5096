"""Splits of any spelling cut everything into three parts; what cannot be read is refused with an example."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.data.splits import parse_splits, split_ranges
from megalith.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("969, 30, 1", (0.969, 0.03, 0.001)),
        ("98/2/0", (0.98, 0.02, 0)),
        ("1", (1, 0, 0)),
        ("0.5,.5", (0.5, 0.5, 0)),
    ],
)
def test_spellings(text, shares):
    assert parse_splits(text) == pytest.approx(shares)


@pytest.mark.parametrize("text", ["", "a,b,c", "0,0,0", "1,2,3,4", "-1,2,3", "nan,1,1", "inf,1,1"])
def test_what_cannot_be_read(text):
    with pytest.raises(ConfigError, match=r'splits_string.*\n.*"969, 30, 1"'):
        parse_splits(text)


def test_a_share_of_nothing_stays_nothing():
    """0 + 2 + 2 rounded of 3 items is one too many; taken off every border it would leave −1 items to train on."""
    assert [len(part) for part in split_ranges("0, 1, 1", 3).values()] == [0, 1, 2]


@given(
    shares=st.tuples(st.integers(1, 1000), st.integers(0, 1000), st.integers(0, 1000)),
    items=st.integers(0, 10**6),
)
def test_every_item_is_in_one_split(shares, items):
    ranges = list(split_ranges("/".join(map(str, shares)), items).values())
    assert ranges[0].first == 0
    assert ranges[-1].last == items
    assert all(a.last == b.first for a, b in pairwise(ranges))
    for part, share in zip(ranges, shares, strict=True):
        assert abs(len(part) - items * share / sum(shares)) <= 3
