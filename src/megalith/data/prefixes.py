"""Reads what users write for `data_prefix`: one path, several, or weights and paths.

    "corpus/books"            ["corpus/books", "corpus/web"]             "0.3 corpus/books 0.7 corpus/web"
    [0.3, corpus/books, 0.7, corpus/web]                                 [[0.3, corpus/books], [0.7, corpus/web]]

Knows text and numbers. Opens no file.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FORMS = "one path, a list of paths, or [weight, path, weight, path, …]"


@dataclass(frozen=True)
class Prefixes:
    """Paths without suffix, and their weights; None when none were given."""

    paths: tuple[str, ...]
    weights: tuple[float, ...] | None


def parse_prefixes(value: Any) -> Prefixes:
    """Paths and weights. ValueError, with the fix on a second line, for anything else."""
    flat = _flat(value)
    numbers = [_number(piece) for piece in flat]
    if not flat:
        raise ValueError(f"names no file\nfix: {FORMS}")
    if len(flat) == 1 or all(number is None for number in numbers):
        return Prefixes(tuple(str(piece) for piece in flat), None)
    alternate = all((number is None) == bool(i % 2) for i, number in enumerate(numbers))
    if len(flat) % 2 or not alternate:
        shown = " ".join(str(piece) for piece in flat)
        raise ValueError(f"weights and paths do not alternate in: {shown}\nfix: {FORMS}")
    weights = tuple(number for number in numbers[::2] if number is not None)
    bad = [weight for weight in weights if not (weight > 0 and math.isfinite(weight))]
    if bad:
        raise ValueError(f"a weight is {bad[0]:g}\nfix: weights above 0; leave out files that are not wanted")
    return Prefixes(tuple(str(piece) for piece in flat[1::2]), weights)


def _flat(value: Any) -> list[Any]:
    if isinstance(value, str):
        return _split(value)
    if not isinstance(value, Sequence):
        return [value]
    if len(value) == 1:
        return _flat(value[0])
    return [piece for item in value for piece in (item if isinstance(item, list | tuple) else [item])]


def _split(text: str) -> list[str]:
    """A text that begins with a number and goes on is weights and paths; any other is one path, blanks and all."""
    words = shlex.split(text) if text.count('"') % 2 == 0 and text.count("'") % 2 == 0 else text.split()
    if len(words) > 1 and _number(words[0]) is not None:
        return words
    return [text] if text.strip() else []


def _number(piece: Any) -> float | None:
    try:
        return float(piece)
    except (TypeError, ValueError):
        return None
