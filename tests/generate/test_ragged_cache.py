"""Rows of different lengths in one cache: moved to a common end, dropped in any order, read as if alone."""

import itertools

import pytest
import torch

from megalith.nn.cache import KVCache
from tests.generate.tiny import VARIANTS, tiny_model

LENGTHS = (3, 9, 1, 6)


def rows_of(lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(61, (length + 4,), generator=generator) for length in lengths]


def ragged_cache(model, texts, lengths):
    padded = torch.stack(
        [torch.nn.functional.pad(t[:n], (0, max(lengths) - n)) for t, n in zip(texts, lengths, strict=True)]
    )
    cache = model.new_cache(len(texts), max(lengths) + 4)
    with torch.inference_mode():
        model(padded, cache=cache)
    cache.align_right(lengths)
    return cache


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("pieces", [[1, 1, 1, 1], [4], [2, 2]], ids=str)
def test_each_row_goes_on_as_if_alone(name, pieces):
    model, texts = tiny_model(**VARIANTS[name]), rows_of(LENGTHS)
    cache = ragged_cache(model, texts, LENGTHS)
    at, found = 0, []
    with torch.inference_mode():
        for size in pieces:
            new = torch.stack([t[n + at : n + at + size] for t, n in zip(texts, LENGTHS, strict=True)])
            found.append(model(new, cache=cache))
            at += size
        for row, text in zip(torch.cat(found, 1), texts, strict=True):
            assert (row - model(text[None])[0, -4:]).abs().max() < 1e-10


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_dropping_leaves_the_others(order):
    """The last row takes the dropped one's place; what is left reads on as before."""
    model, texts = tiny_model(), rows_of(LENGTHS)
    cache, alive = ragged_cache(model, texts, LENGTHS), list(range(4))
    with torch.inference_mode():
        for step, row in enumerate(order):
            row = min(row, len(alive) - 1)
            alive[row] = alive[-1]
            del alive[-1]
            cache.drop(row)
            new = torch.stack([texts[i][LENGTHS[i] + step, None] for i in alive])
            for i, hidden in zip(alive, model(new, cache=cache), strict=True):
                assert (hidden[0] - model(texts[i][None])[0, LENGTHS[i] + step]).abs().max() < 1e-10


def test_equal_lengths_need_no_mask():
    cache = KVCache(1, 2, 8, 1, 4)
    cache.advance(3)
    cache.align_right([3, 3])
    assert cache.visible(1) is None
    assert cache.positions(2).tolist() == [3, 4]
    assert cache.furthest == 3


def test_positions_and_the_furthest_row():
    cache = KVCache(1, 2, 8, 1, 4)
    cache.advance(5)
    cache.align_right([2, 4])
    assert cache.positions(2).tolist() == [[2, 3], [4, 5]]
    assert cache.furthest == 4
    assert cache.visible(1)[:, 0, 0].tolist() == [[False] * 3 + [True] * 3, [False] + [True] * 5]
    cache.drop(1)
    assert cache.furthest == 2
    assert cache.batch == 1
