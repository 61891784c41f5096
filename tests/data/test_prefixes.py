"""Everything that users write for `data_prefix` is read; the rest is refused with the forms that exist."""

from __future__ import annotations

import pytest

from megalith.data.prefixes import Prefixes, parse_prefixes


@pytest.mark.parametrize(
    ("value", "paths", "weights"),
    [
        ("a", ["a"], None),
        ("my corpus/a b", ["my corpus/a b"], None),
        (["a"], ["a"], None),
        (["a", "b"], ["a", "b"], None),
        ([0.3, "a", 0.7, "b"], ["a", "b"], [0.3, 0.7]),
        (["0.3", "a", "0.7", "b"], ["a", "b"], [0.3, 0.7]),
        ("0.3 a 0.7 b", ["a", "b"], [0.3, 0.7]),
        (["0.3 a 0.7 b"], ["a", "b"], [0.3, 0.7]),
        ('1 "my corpus/a" 2 b', ["my corpus/a", "b"], [1, 2]),
        ([[1, "a"], [2, "b"]], ["a", "b"], [1, 2]),
        ([1, "a"], ["a"], [1]),
        ("2024", ["2024"], None),
    ],
)
def test_forms(value, paths, weights):
    assert parse_prefixes(value) == Prefixes(tuple(paths), weights and tuple(weights))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([0.3, "a", "b"], "do not alternate"),
        (["a", 0.3], "do not alternate"),
        ([0.3, "a", 0.7], "do not alternate"),
        ([0, "a", 1, "b"], "a weight is 0"),
        ([-1, "a", 1, "b"], "a weight is -1"),
        ("", "names no file"),
        ([], "names no file"),
    ],
)
def test_what_cannot_be_read(value, said):
    with pytest.raises(ValueError, match=said) as caught:
        parse_prefixes(value)
    assert "fix:" in str(caught.value)
