"""Reads the legacy TNTIDX index that Megatron's "lazy" and "cached" datasets share.

Knows that layout only. The result is the same `Index` as of a mmap file, so nothing above can tell them apart.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megalith.data.indexed.format import (
    LEGACY_HEADER,
    VERSION,
    Index,
    check_length,
    dtype_of,
)
from megalith.errors import DataError, UnsupportedError


def read_legacy_index(path: Path) -> Index:
    """Parse a TNTIDX index, its length checked to the byte."""
    length = path.stat().st_size
    check_length(path, LEGACY_HEADER.size, min(length, LEGACY_HEADER.size), "the TNTIDX header")
    with path.open("rb") as file:
        _, version, code, width, items, entries, documents = LEGACY_HEADER.unpack(
            file.read(LEGACY_HEADER.size)
        )
    if version != VERSION:
        raise DataError(f"TNTIDX version {version}; only version {VERSION} is known", where=str(path))
    dtype = dtype_of(code, path)
    if width != dtype.itemsize:
        raise DataError(
            f"dtype code {code} has {dtype.itemsize} bytes, the header says {width}", where=str(path)
        )
    if entries != items:
        raise UnsupportedError(
            f"{items} items with {entries} dimensions: items of more than one dimension are not tokens",
            where=str(path),
        )
    expected = LEGACY_HEADER.size + 8 * (2 * (items + 1) + entries + documents)
    check_length(path, expected, length, f"{items} items and {documents} document boundaries")
    words = np.fromfile(path, dtype="<i8", offset=LEGACY_HEADER.size)
    _, offsets, sizes, ends = np.split(words, np.cumsum([items + 1, items + 1, items]))
    if items and (sizes.min() < 0 or sizes.max() > np.iinfo(np.int32).max):
        raise DataError("an item length is negative or beyond 2³¹: the index is corrupt", where=str(path))
    return Index(
        dtype=dtype,
        sizes=sizes.astype(np.int32),
        pointers=offsets[:-1] * width,
        documents=ends,
        modes=None,
        layout="TNTIDX",
    )
