"""Slices of a tensor: which part of it lies where, in whole numbers.

    a slice = (first, one after the last) along each dim, ((0, 48), (24, 32)); as text `0:48,24:32`

Knows arithmetic. Knows nothing of torch, of files or of why a tensor was cut.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import TypeAlias

Slice: TypeAlias = tuple[tuple[int, int], ...]
_RANGE = re.compile(r"(\d+):(\d+)", re.ASCII)


def whole(shape: Iterable[int]) -> Slice:
    """All of a tensor."""
    return tuple((0, size) for size in shape)


def shape_of(part: Slice) -> tuple[int, ...]:
    """Its sizes."""
    return tuple(stop - first for first, stop in part)


def elements(part: Slice) -> int:
    """How many numbers it holds."""
    return math.prod(shape_of(part))


def to_text(part: Slice) -> str:
    """`((0, 48), (24, 32))` → `0:48,24:32`."""
    return ",".join(f"{first}:{stop}" for first, stop in part)


def from_text(text: str) -> Slice:
    """The other way. Raises `ValueError` for anything else."""
    found = [_RANGE.fullmatch(each) for each in text.split(",")]
    if not all(found):
        raise ValueError(f"{text!r} is not a slice")
    return tuple((int(match[1]), int(match[2])) for match in found if match)


def overlap(one: Slice, other: Slice) -> Slice | None:
    """What both have, in the whole tensor's numbers; None where they have nothing in common."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return common if all(first < stop for first, stop in common) else None


def inside(part: Slice, outer: Slice) -> tuple[slice, ...]:
    """The index of `part` in a tensor that is the slice `outer`."""
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(part, outer, strict=True))


def cut(part: Slice, most: int) -> list[Slice]:
    """The slice in runs of rows of at most `most` elements each (but at least one row)."""
    if not part or elements(part) <= most:
        return [part]
    (first, stop), rest = part[0], part[1:]
    rows = max(1, most // elements(rest))
    return [((row, min(row + rows, stop)), *rest) for row in range(first, stop, rows)]


def problem(shape: tuple[int, ...], parts: Iterable[Slice]) -> str:
    """What keeps slices from covering a tensor exactly, each element once; empty when nothing does."""
    parts = sorted(parts)
    if parts == [whole(shape)]:
        return ""
    for part in parts:
        fits = len(part) == len(shape) and all(0 <= a < b <= n for (a, b), n in zip(part, shape, strict=True))
        if not fits:
            return f"[{to_text(part)}] is no slice of {list(shape)}"
    reaching: list[Slice] = []
    for part in parts:
        reaching = [other for other in reaching if not part or other[0][1] > part[0][0]]
        if any(overlap(part, other) is not None for other in reaching):
            return f"[{to_text(part)}] is there twice"
        reaching.append(part)
    held, needed = sum(map(elements, parts)), math.prod(shape)
    return "" if held == needed else f"its slices hold {held} of {needed} elements"
