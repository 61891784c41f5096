"""Slices: arithmetic that decides whether a checkpoint is complete."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalith.checkpoint.slices import (
    cut,
    elements,
    from_text,
    inside,
    overlap,
    problem,
    shape_of,
    to_text,
    whole,
)

shapes = st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple)


@st.composite
def partitions(draw):
    """A shape, and slices that cover it exactly: cut in two again and again, at any place."""
    shape = draw(shapes)
    parts = [whole(shape)]
    for _ in range(draw(st.integers(0, 6))):
        part = parts.pop(draw(st.integers(0, len(parts) - 1)))
        dims = [d for d, (a, b) in enumerate(part) if b - a > 1]
        if not dims:
            parts.append(part)
            continue
        dim = draw(st.sampled_from(dims))
        first, stop = part[dim]
        at = draw(st.integers(first + 1, stop - 1))
        parts += [(*part[:dim], (first, at), *part[dim + 1 :]), (*part[:dim], (at, stop), *part[dim + 1 :])]
    return shape, draw(st.permutations(parts))


@given(partitions())
def test_what_covers_exactly_has_no_problem_and_everything_else_has(case):
    shape, parts = case
    assert problem(shape, parts) == ""
    for number, part in enumerate(parts):
        assert problem(shape, parts[:number] + parts[number + 1 :]), "a hole"
        assert problem(shape, [*parts, part]), "twice"
        for dim, (first, stop) in enumerate(part):
            moved = (*part[:dim], (first, stop + 1), *part[dim + 1 :])
            assert problem(shape, [*parts[:number], moved, *parts[number + 1 :]]), "too large"


@given(partitions())
def test_overlap_is_what_two_slices_of_a_tensor_share(case):
    shape, parts = case
    numbers = torch.arange(elements(whole(shape))).view(shape)
    other = tuple((size // 3, size) for size in shape)
    seen = 0
    for part in parts:
        common = overlap(part, other)
        mine = set(numbers[inside(part, whole(shape))].flatten().tolist())
        theirs = set(numbers[inside(other, whole(shape))].flatten().tolist())
        assert (mine & theirs) == (
            set() if common is None else set(numbers[inside(common, whole(shape))].flatten().tolist())
        )
        seen += 0 if common is None else elements(common)
    assert seen == elements(other)


@given(partitions(), st.integers(1, 50))
def test_cutting_covers_what_was_cut(case, most):
    for part in case[1]:
        pieces = cut(part, most)
        assert (
            problem(
                shape_of(part),
                [tuple((a - c, b - c) for (a, b), (c, _) in zip(p, part, strict=True)) for p in pieces],
            )
            == ""
        )
        assert all(elements(p) <= max(most, elements(p[1:])) for p in pieces if p)


@given(partitions())
def test_text_comes_back(case):
    for part in case[1]:
        assert not part or from_text(to_text(part)) == part


@pytest.mark.parametrize("text", ["", "1", "0:1,", "-1:2", "0:1:2", "a:b", "0: 1", "٣:٤"])
def test_other_texts_are_no_slices(text):
    with pytest.raises(ValueError, match="is not a slice"):
        from_text(text)


def test_empty_tensors_and_wrong_ranks():
    assert problem((0, 3), []) == ""
    assert problem((0, 3), [((0, 0), (0, 3))]) == ""
    assert problem((), [()]) == ""
    assert "0 of 1" in problem((), [])
    assert "no slice of [2, 2]" in problem((2, 2), [((0, 2),)])
    assert "no slice of [2]" in problem((2,), [((0, 2),), ((1, 1),)])
