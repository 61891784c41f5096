"""What may be a key of a dict or an element of a set: Python would hash it, and some values make that endless or fatal."""

from __future__ import annotations

from typing import Any

from megalith.checkpoint.pickles.source import PickleError

MAX_KEY_DEPTH, MAX_KEY_WIDTH = 2, 32
"""Of tuples that are keys: hashing one that is nested a million deep would overflow the processor's stack."""
MAX_KEY_BITS = 60
"""Of whole numbers that are keys: of longer ones, any number can be had with the same hash, and a dict of those takes for ever."""


def fill(target: dict[Any, Any], flat: list[Any]) -> dict[Any, Any]:
    """Puts keys and values, one after the other, into a dict, and returns it. Raises `PickleError`."""
    if len(flat) % 2:
        raise PickleError("a key without a value")
    for index in range(0, len(flat), 2):
        target[as_key(flat[index])] = flat[index + 1]
    return target


def as_key(value: Any, depth: int = 0) -> Any:
    """A value that is to be a key. Raises `PickleError` for one that may not be."""
    if isinstance(value, (list, dict, set, bytearray)) or depth > MAX_KEY_DEPTH:
        raise PickleError("a key of a kind that keys cannot be")
    if type(value) is int and value.bit_length() > MAX_KEY_BITS:
        raise PickleError(f"a key of {value.bit_length()} bits")
    if isinstance(value, tuple):
        if len(value) > MAX_KEY_WIDTH:
            raise PickleError(f"a key of {len(value)} values")
        for each in value:
            as_key(each, depth + 1)
    return value
