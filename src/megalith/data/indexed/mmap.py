"""Opens a pair of token files, whichever layout its index has, and hands out items as views of the mapped `.bin`.

Knows the MMIDIDX layout (with and without modes) and how to tell both layouts apart. Refuses to know what the tokens
mean, or in which order training wants them.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megalith.data.indexed.format import (
    LEGACY_MAGIC,
    MMAP_HEADER,
    MMAP_MAGIC,
    VERSION,
    Index,
    bin_path,
    check_length,
    dtype_of,
    existing_prefix,
    idx_path,
)
from megalith.data.indexed.legacy import read_legacy_index
from megalith.errors import DataError


def read_mmap_index(path: Path) -> Index:
    """Parse an MMIDIDX index as views of the mapped file, its length checked to the byte."""
    length = path.stat().st_size
    check_length(path, MMAP_HEADER.size, min(length, MMAP_HEADER.size), "the MMIDIDX header")
    mapped = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    _, version, code, items, ends = MMAP_HEADER.unpack(mapped[: MMAP_HEADER.size].tobytes())
    if version != VERSION:
        raise DataError(f"MMIDIDX version {version}; only version {VERSION} is known", where=str(path))
    dtype = dtype_of(code, path)
    expected = MMAP_HEADER.size + 12 * items + 8 * ends
    if length != expected + items:
        check_length(path, expected, length, f"{items} items and {ends} document boundaries")
    has_modes = items > 0 and length == expected + items
    pieces = np.split(mapped, MMAP_HEADER.size + np.cumsum([0, 4 * items, 8 * items, 8 * ends]))
    return Index(
        dtype=dtype,
        sizes=pieces[1].view("<i4"),
        pointers=pieces[2].view("<i8"),
        documents=pieces[3].view("<i8"),
        modes=pieces[4].view(np.int8) if has_modes else None,
        layout="MMIDIDX",
    )


def read_index(path: Path) -> Index:
    """Parse an index of either layout, told apart by its first bytes."""
    with path.open("rb") as file:
        magic = file.read(len(MMAP_MAGIC))
    if magic == MMAP_MAGIC:
        return read_mmap_index(path)
    if magic.startswith(LEGACY_MAGIC):
        return read_legacy_index(path)
    raise DataError(
        f"not a token index: it begins with {magic!r} instead of {MMAP_MAGIC!r} or {LEGACY_MAGIC!r}"
        if magic
        else "the index is empty",
        where=str(path),
        fix="give the prefix of files made by `megalith data preprocess` or Megatron's preprocess_data.py",
    )


class IndexedDataset:
    """Items (documents or sentences) of one pair of token files, read only, picklable by its prefix."""

    def __init__(self, prefix: Path, index: Index, tokens: npt.NDArray) -> None:
        self.prefix = prefix
        self.index = index
        self.tokens = tokens
        """Every token of the file, one mapped array: item i starts at `index.pointers[i] / dtype.itemsize`."""

    @property
    def sizes(self) -> npt.NDArray[np.int32]:
        """int32[n], tokens of each item. May be an unaligned view of the mapped file."""
        return self.index.sizes

    @property
    def document_indices(self) -> npt.NDArray[np.int64]:
        """int64[d]: 0, then the item number at which each document ends; the last is n."""
        return self.index.documents

    @property
    def dtype(self) -> np.dtype:
        return self.index.dtype

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return max(len(self.index.documents) - 1, 0)

    def __len__(self) -> int:
        return len(self.index.sizes)

    def get(self, i: int, offset: int = 0, length: int | None = None) -> npt.NDArray:
        """Tokens `offset … offset + length` of item `i`, a read-only view in the storage dtype.

        IndexError where item or range do not exist, DataError where the index points outside `.bin`.
        """
        size = int(self.index.sizes[i])
        length = size - offset if length is None else length
        if not (offset >= 0 and 0 <= length <= size - offset):
            raise IndexError(f"item {i} has {size} tokens; {offset}…{offset + length} is outside")
        byte, rest = divmod(int(self.index.pointers[i]), self.dtype.itemsize)
        start = byte + offset
        if rest or byte < 0 or start + length > len(self.tokens):
            raise DataError(
                f"item {i} lies outside the .bin file",
                where=str(self.prefix),
                fix=f"the index is corrupt: `megalith data verify {self.prefix}` lists every fault",
            )
        return self.tokens[start : start + length]

    def __getitem__(self, i: int) -> npt.NDArray:
        return self.get(i)

    def content_hash(self) -> str:
        """SHA-256 of the `.idx` file in hex: cheap, and different for any other splitting into items and documents."""
        with idx_path(self.prefix).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def __reduce__(self) -> tuple[object, tuple[Path, bool]]:
        return open_indexed, (self.prefix, True)


def open_indexed(prefix: str | os.PathLike[str], allow_empty: bool = False) -> IndexedDataset:
    """Open `PREFIX.bin` and `PREFIX.idx` (either layout; the suffix may be given).

    The index's length is checked to the byte, and its ends against `.bin`; `data verify` checks what lies between.
    A file without items is a DataError unless `allow_empty`.
    """
    found = existing_prefix(prefix)
    try:
        return _open(found, allow_empty)
    except OSError as error:
        raise DataError(
            f"cannot be read: {error.strerror or error}", where=str(found), fix="check its permissions"
        ) from error


def _open(found: Path, allow_empty: bool) -> IndexedDataset:
    index = read_index(idx_path(found))
    path = bin_path(found)
    _check_ends(index, path)
    if not allow_empty and not len(index.sizes):
        raise DataError(
            "holds no documents", where=str(found), fix="the corpus was empty or every line was rejected"
        )
    empty = path.stat().st_size == 0
    tokens = np.empty(0, index.dtype) if empty else np.memmap(path, dtype=index.dtype, mode="r")
    return IndexedDataset(found, index, tokens.view(np.ndarray))


def _check_ends(index: Index, path: Path) -> None:
    """The last item ends where `.bin` does, the document index goes from 0 to the number of items."""
    items = len(index.sizes)
    length = path.stat().st_size
    expected = int(index.pointers[-1]) + int(index.sizes[-1]) * index.dtype.itemsize if items else 0
    if items and (int(index.pointers[0]) != 0 or int(index.sizes[-1]) < 0 or expected % index.dtype.itemsize):
        raise DataError("impossible item offsets: the index is corrupt", where=str(path.with_suffix(".idx")))
    check_length(path, expected, length, f"the {items} items of the index")
    ends = index.documents
    if len(ends) and int(ends[0]) == 0 and int(ends[-1]) == items:
        return
    if not len(ends) and not items:
        return
    raise DataError(
        f"the document index must go from 0 to {items}, the number of items"
        + (f"; it goes from {ends[0]} to {ends[-1]}" if len(ends) else "; it is empty"),
        where=str(path.with_suffix(".idx")),
        fix="the index is corrupt, or was merged by a Megatron before 2.6, which lost it: merge the parts again",
    )
