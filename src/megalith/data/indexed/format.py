"""The two index layouts, their headers and dtype codes, and the names of a pair's files.

Knows bytes and names. Refuses to know how an index is read or written (`mmap`, `legacy`, `builder` do), or what a token
means.

```
MMIDIDX (mmap)                                TNTIDX (legacy "lazy" and "cached")
  0  9 bytes  "MMIDIDX\\0\\0"                      0  8 bytes  "TNTIDX\\0\\0"
  9  u64      version 1                          8  u64      version 1
 17  u8       dtype code                        16  u64 u64  dtype code, bytes an element
 18  u64      n items                           32  u64 u64  n items, S entries of `sizes`
 26  u64      d = documents + 1                 48  u64      d
 34  i32[n]   item lengths, tokens              56  i64[n+1] dim offsets
     i64[n]   item offsets, bytes                   i64[n+1] item offsets, elements
     i64[d]   document index                        i64[S]   sizes
     i8[n]    modes (multimodal files only)         i64[d]   document index
```
Everything is little endian. The document index starts with 0 and ends with n.
"""

from __future__ import annotations

import difflib
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megalith.errors import DataError, UnsupportedError

MMAP_MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
MMAP_HEADER = struct.Struct("<9sQBQQ")
LEGACY_HEADER = struct.Struct("<8sQQQQQQ")

DTYPES: dict[int, np.dtype] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
"""Storage dtype of each code. 6 and 7 are floats, and which is float32 depends on the program that wrote them."""

LARGEST_UINT16_VOCABULARY = 65500
"""Megatron stores uint16 below this vocabulary size, int32 from it on."""

IMPLEMENTATIONS = ("mmap", "cached", "lazy")


@dataclass(frozen=True)
class Index:
    """A parsed index. n items, d − 1 documents.

    `sizes` int32[n] tokens, `pointers` int64[n] bytes into `.bin`, `documents` int64[d] item numbers, `modes` int8[n] or
    None. The arrays may be unaligned views of the mapped file.
    """

    dtype: np.dtype
    sizes: npt.NDArray[np.int32]
    pointers: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]
    modes: npt.NDArray[np.int8] | None
    layout: str


def storage_dtype(vocab_size: int | None, implementation: str = "mmap") -> np.dtype:
    """dtype that Megatron's tools store: uint16 if the vocabulary has fewer than 65500 entries, else int32.

    The legacy layouts are always int32.
    """
    if implementation == "mmap" and vocab_size is not None and vocab_size < LARGEST_UINT16_VOCABULARY:
        return DTYPES[8]
    return DTYPES[4]


def dtype_code(dtype: npt.DTypeLike) -> int:
    """Code of a storage dtype; UnsupportedError for a float or any other that tokens cannot have."""
    wanted = np.dtype(dtype).newbyteorder("<")
    for code, known in DTYPES.items():
        if known == wanted:
            return code
    raise UnsupportedError(
        f"tokens cannot be stored as {np.dtype(dtype)}",
        fix="use one of " + ", ".join(str(known) for known in DTYPES.values()),
    )


def dtype_of(code: int, path: Path) -> np.dtype:
    """Storage dtype of a code read from `path`; DataError where it names no integer type."""
    if code in (6, 7):
        raise DataError(
            f"dtype code {code} is a float, and tokens are not "
            "(which of float32 and float64 it means differs between Megatron versions)",
            where=str(path),
            fix="preprocess the corpus again",
        )
    if code not in DTYPES:
        raise DataError(f"dtype code {code} is unknown: the index is corrupt", where=str(path))
    return DTYPES[code]


def check_length(path: Path, expected: int, found: int, holds: str) -> None:
    """DataError that says by how much an index of `found` bytes is too short or too long."""
    if found == expected:
        return
    difference = (
        f"truncated by {expected - found} bytes" if found < expected else f"{found - expected} bytes too long"
    )
    raise DataError(
        f"{difference}: {holds} take {expected} bytes, the file has {found}",
        where=str(path),
        fix="copy the file again or preprocess the corpus again",
    )


def bin_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


def side_car_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".meta.json")


def as_prefix(name: str | os.PathLike[str]) -> Path:
    """The prefix that a user means: `corpus_text_document`, with `.bin` or `.idx` accepted."""
    path = Path(name)
    if path.suffix in (".bin", ".idx"):
        return path.with_suffix("")
    return path


def existing_prefix(name: str | os.PathLike[str]) -> Path:
    """`as_prefix`, with both files of the pair present; else a DataError that names the nearest pairs."""
    prefix = as_prefix(name)
    if not prefix.name:
        raise DataError("a folder, not a prefix", where=str(prefix), fix=_suggest(prefix, ""))
    present = bin_path(prefix).is_file(), idx_path(prefix).is_file()
    if all(present):
        return prefix
    if any(present):
        missing = bin_path(prefix) if present[1] else idx_path(prefix)
        raise DataError(
            "missing, though the other file of the pair exists",
            where=str(missing),
            fix="a pair is published .bin first, .idx last: run the preprocessing again",
        )
    if prefix.is_dir():
        raise DataError("a folder, not a prefix", where=str(prefix), fix=_suggest(prefix, ""))
    raise DataError(
        "no such token files (.bin and .idx)", where=str(prefix), fix=_suggest(prefix.parent, prefix.name)
    )


def pairs_in(folder: Path) -> list[Path]:
    """Prefixes of the complete pairs in a folder, sorted by name."""
    found = (path.with_suffix("") for path in folder.glob("*.idx"))
    return sorted(prefix for prefix in found if bin_path(prefix).is_file())


def _suggest(folder: Path, name: str) -> str:
    if not folder.is_dir():
        return f"there is no folder {folder}"
    names = [prefix.name for prefix in pairs_in(folder)]
    if not names:
        return f"{folder} holds no token files; `megalith data preprocess` makes them"
    near = [known for known in names if name and known.startswith(name)]
    near = near or difflib.get_close_matches(name, names, n=3) or names[:5]
    return "did you mean " + " or ".join(str(folder / known) for known in near) + "?"
