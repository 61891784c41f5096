"""The head of a safetensors file: eight bytes of length, then JSON that says where each tensor lies.

Knows the layout and refuses anything that does not fill its file exactly. Knows nothing of torch or of what tensors mean.
Layout: the safetensors format description (length as unsigned 64-bit little endian, offsets relative to the end of the JSON).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalith.checkpoint.files import regular_size

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8,
}  # fmt: skip
"""Name of a dtype in the file → bytes an element takes."""
MAX_HEADER = 100_000_000
"""Bytes of JSON that readers accept at most: the limit of the safetensors library too."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: `dtype` as the file names it, `shape`, and its first byte and the one after its last."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """`entries` (name → place, relative to `data`, in the order of the bytes), `metadata`, and `data`, the first byte after the JSON."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data: int


class HeaderError(ValueError):
    """The file is not a well-formed safetensors file; the message says why."""


def layout(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Entry]:
    """Places tensors (name → dtype, shape) without gaps, widest elements first so that each starts aligned, then by name."""
    entries: dict[str, Entry] = {}
    position = 0
    for name in sorted(tensors, key=lambda n: (-ITEM_BYTES[tensors[n][0]], n)):
        dtype, shape = tensors[name]
        stop = position + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = Entry(dtype, shape, position, stop)
        position = stop
    return entries


def encode(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """The head of a file with these tensors: length and JSON, padded with spaces to a multiple of eight bytes."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, entry in entries.items():
        table[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (entry.start, entry.stop)}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_header(path: Path) -> Header:
    """Reads and checks the head of a file. Raises `HeaderError` where it is malformed, `OSError` where it cannot be read."""
    size = regular_size(path)
    with open(path, "rb", buffering=0) as file:
        head = os.pread(file.fileno(), 8, 0)
        if len(head) < 8:
            raise HeaderError(f"{size} bytes are too few for a safetensors file")
        (length,) = struct.unpack("<Q", head)
        if length > min(MAX_HEADER, size - 8):
            raise HeaderError(f"its header claims {length} bytes, the file has {size - 8} after the length")
        text = os.pread(file.fileno(), length, 8)
    if len(text) < length:
        raise HeaderError("it became shorter while it was read")
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"its header is not JSON ({error})") from None
    if not isinstance(table, dict):
        raise HeaderError("its header is not a JSON object")
    return _checked(table, data=8 + length, size=size)


def _checked(table: dict[str, Any], *, data: int, size: int) -> Header:
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise HeaderError("its __metadata__ is not an object")
    entries = sorted(
        ((name, _entry(name, value)) for name, value in table.items()), key=lambda e: (e[1].start, e[1].stop)
    )
    position = 0
    for name, entry in entries:
        if entry.start != position:
            raise HeaderError(
                f"{name} starts at byte {entry.start}, not at {position} where the one before ends"
            )
        position = entry.stop
    if data + position != size:
        raise HeaderError(f"its tensors end at byte {data + position}, the file at {size}")
    return Header(dict(entries), metadata, data)


def _entry(name: str, value: Any) -> Entry:
    try:
        dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        numbers = [*shape, start, stop]
        if any(type(number) is not int or number < 0 for number in numbers):
            raise TypeError
        expected = math.prod(shape) * ITEM_BYTES[dtype]
    except (TypeError, KeyError, ValueError):
        raise HeaderError(f"its header describes {name} as {value!r:.100}") from None
    if stop - start != expected:
        raise HeaderError(f"{name} is {dtype} {list(shape)}, {expected} bytes, but takes {stop - start}")
    return Entry(dtype, shape, start, stop)
