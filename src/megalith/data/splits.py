"""Cuts the items of a token file into train, validation and test, as Megatron's `--split` does.

Knows proportions and Python's rounding. Refuses to know what an item is.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from megalith.errors import ConfigError, Problem

SPLITS = ("train", "validation", "test")


class Range(NamedTuple):
    """Items `first … last − 1`."""

    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first


def parse_splits(text: str) -> tuple[float, float, float]:
    """Three proportions that add up to 1, from "969, 30, 1" or "98/2/0"; missing ones are 0. ConfigError otherwise."""
    pieces = [piece.strip() for piece in re.split(r"[,/]", text) if piece.strip()]
    try:
        numbers = [float(piece) for piece in pieces]
    except ValueError:
        raise _bad_splits(text, "holds something that is not a number") from None
    if not 1 <= len(numbers) <= 3:
        raise _bad_splits(text, f"holds {len(numbers)} numbers, not three")
    numbers += [0.0] * (3 - len(numbers))
    total = sum(numbers)
    if not (min(numbers) >= 0 and 0 < total < float("inf")):
        raise _bad_splits(text, "needs numbers that are not negative, one of them above 0")
    return numbers[0] / total, numbers[1] / total, numbers[2] / total


def split_ranges(text: str, items: int) -> dict[str, Range]:
    """Items of each split. Borders are rounded one by one with Python's `round` (half to even), as Megatron's.

    The rounding surplus is taken off all three borders, so that the last is `items`. A small file can leave a split
    empty ("969, 30, 1" of 100 items has no test split).
    """
    borders = [0]
    for share in parse_splits(text):
        borders.append(borders[-1] + round(share * float(items)))
    surplus = borders[-1] - items
    borders = [max(border - surplus, 0) for border in borders]
    borders[0] = 0
    return {name: Range(*borders[i : i + 2]) for i, name in enumerate(SPLITS)}


def _bad_splits(text: str, what: str) -> ConfigError:
    fix = 'three proportions separated by "," or "/", for train, validation and test: "969, 30, 1"'
    return ConfigError([Problem("model.data.splits_string", f"{text!r} {what}", fix)])
