"""Writes a pair of token files, byte for byte as Megatron's builders do, in constant memory, published atomically.

```
tokens ─▶ PREFIX.bin.partial          finish(): index assembled in chunks ─▶ PREFIX.idx.partial, fsync,
sizes, document ends ─▶ spools        then .bin renamed, .idx last: a pair with an index is complete
```
Knows the layouts. Refuses to know text, tokenizers and what a document is worth. A killed writer leaves `*.partial`
files, which the next writer of the same prefix replaces.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from megalith.data.indexed.format import (
    IMPLEMENTATIONS,
    LEGACY_HEADER,
    LEGACY_MAGIC,
    MMAP_HEADER,
    MMAP_MAGIC,
    VERSION,
    as_prefix,
    bin_path,
    dtype_code,
    idx_path,
    side_car_path,
)
from megalith.data.indexed.mmap import IndexedDataset
from megalith.errors import DataError, UnsupportedError

_SPOOL_BYTES = 16 << 20
_CHUNK_ITEMS = 1 << 20
_COPY_BYTES = 8 << 20


@dataclass(frozen=True)
class Written:
    """What `finish` published: counts, bytes and SHA-256 (hex) of both files."""

    items: int
    documents: int
    tokens: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str


class Chunked(Protocol):
    """A long array of integers that comes in pieces: item sizes as `<i4`, document ends as `<i8`."""

    @property
    def length(self) -> int: ...

    def chunks(self) -> Iterator[npt.NDArray]:
        """From the start, at every call."""
        ...


class _Spool:
    """A growing integer array kept in memory up to 16 MiB, then in an unnamed file."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.dtype = np.dtype(dtype)
        self.length = 0
        self._folder = folder
        self._file = tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES, dir=str(folder))  # noqa: SIM115

    def append(self, values: npt.NDArray) -> None:
        try:
            self._file.write(np.ascontiguousarray(values, dtype=self.dtype).data)
        except OSError as error:
            raise cannot_write(self._folder, error) from error
        self.length += len(values)

    def chunks(self) -> Iterator[npt.NDArray]:
        self._file.seek(0)
        while data := self._file.read(_CHUNK_ITEMS * self.dtype.itemsize):
            yield np.frombuffer(data, dtype=self.dtype)

    def close(self) -> None:
        self._file.close()


class HashedFile:
    """A file that knows the SHA-256 and length of what was written to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.length = 0
        self._digest = hashlib.sha256()
        self._file: IO[bytes] = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb", 1 << 20)
        _lock(self._file, path)
        self._file.truncate()

    def write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        try:
            self._file.write(data)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self.length += len(data) if isinstance(data, bytes) else data.nbytes

    def sync(self) -> str:
        """Flush to the disk, close, and return the digest."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise cannot_write(self.path, error) from error
        return self._digest.hexdigest()

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # a full disk refuses what is still buffered
            self._file.close()
        self.path.unlink(missing_ok=True)


class IndexedWriter:
    """Writes `PREFIX.bin` and `PREFIX.idx`.

    `implementation` "mmap" writes MMIDIDX; "cached" and "lazy" the legacy TNTIDX. As a context manager it publishes on
    a clean exit and leaves nothing behind on an exception. Tokens that do not fit `dtype` are a DataError.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: npt.DTypeLike, impl: str = "mmap") -> None:
        if impl not in IMPLEMENTATIONS:
            raise DataError(f"unknown dataset implementation {impl!r}", fix="mmap, cached or lazy")
        self.prefix = as_prefix(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.implementation = impl
        dtype_code(self.dtype)  # refuses what tokens cannot be stored as
        if not self.prefix.parent.is_dir():
            raise DataError("no such folder", where=str(self.prefix.parent), fix="create it first")
        self._bin = open_partial(bin_path(self.prefix))
        self._sizes = _Spool(self.prefix.parent, "<i4")
        self._documents = _Spool(self.prefix.parent, "<i8")
        self._documents.append(np.zeros(1, np.int64))
        self._last_end = 0
        self._published = False

    @property
    def items(self) -> int:
        return self._sizes.length

    def add_item(self, tokens: npt.ArrayLike) -> None:
        """Append one item (a document or a sentence): its tokens, one dimension, possibly none."""
        array = np.asarray(tokens)
        if array.ndim != 1:
            raise ValueError(f"an item is one row of tokens, not an array of shape {array.shape}")
        self._write_tokens(array if len(array) else array.astype(self.dtype))
        self._sizes.append(np.array([len(array)]))

    def end_document(self) -> None:
        """Close the document that the items since the last call make up."""
        self._documents.append(np.array([self.items], np.int64))
        self._last_end = self.items

    def add_block(
        self, tokens: npt.NDArray, lengths: npt.NDArray, items_per_document: npt.NDArray | None = None
    ) -> None:
        """Append many items at once.

        `tokens` holds them back to back, `lengths` the tokens of each. Each item is a document of its own, unless
        `items_per_document` says how many items each document takes (their sum is `len(lengths)`).
        """
        if int(lengths.sum()) != len(tokens):
            raise ValueError(f"lengths add up to {int(lengths.sum())}, there are {len(tokens)} tokens")
        counts = np.ones(len(lengths), np.int64) if items_per_document is None else items_per_document
        if int(counts.sum()) != len(lengths):
            raise ValueError(f"documents hold {int(counts.sum())} items, there are {len(lengths)}")
        if self._last_end != self.items:
            raise ValueError("the last document is still open: call end_document first")
        self._write_tokens(tokens)
        self._documents.append(self.items + np.cumsum(counts, dtype=np.int64))
        self._sizes.append(lengths)
        self._last_end = self.items

    def add_dataset(
        self, dataset: IndexedDataset, progress: Callable[[int], None] = lambda count: None
    ) -> None:
        """Append every item and document of another pair (any layout, the same dtype), streaming.

        `progress` is called with the number of bytes of `.bin` copied since the last call.
        """
        if dataset.dtype != self.dtype:
            raise DataError(
                f"holds {dataset.dtype}, the output {self.dtype}: token files of one dtype only can be merged",
                where=str(dataset.prefix),
                fix="preprocess both with the same tokenizer",
            )
        if dataset.index.modes is not None:
            raise UnsupportedError(
                "multimodal files (with modes) cannot be merged", where=str(dataset.prefix)
            )
        first = self.items
        with bin_path(dataset.prefix).open("rb") as file:
            while data := file.read(_COPY_BYTES):
                self._bin.write(data)
                progress(len(data))
        for start in range(0, len(dataset), _CHUNK_ITEMS):
            self._sizes.append(dataset.sizes[start : start + _CHUNK_ITEMS])
        ends = dataset.document_indices
        for start in range(1, len(ends), _CHUNK_ITEMS):
            self._documents.append(ends[start : start + _CHUNK_ITEMS] + first)
        self._last_end = self.items

    def finish(self) -> Written:
        """Publish the pair: index written, both files on disk, `.bin` renamed, `.idx` last."""
        if self._last_end != self.items:
            raise ValueError("the last document is still open: call end_document first")
        tokens = self._bin.length // self.dtype.itemsize
        idx = open_partial(idx_path(self.prefix))
        write_index(idx, self.implementation, self.dtype, self._sizes, self._documents)
        written = Written(
            items=self._sizes.length,
            documents=self._documents.length - 1,
            tokens=tokens,
            bin_bytes=self._bin.length,
            idx_bytes=idx.length,
            bin_sha256=self._bin.sync(),
            idx_sha256=idx.sync(),
        )
        self._publish(idx)
        return written

    def abort(self) -> None:
        """Close and remove what was written so far; nothing was published."""
        self._bin.discard()
        partial_path(idx_path(self.prefix)).unlink(missing_ok=True)
        self._close_spools()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        if kind is not None:
            self.abort()
        elif not self._published:
            try:
                self.finish()
            except BaseException:
                self.abort()
                raise
        return False

    def _write_tokens(self, tokens: npt.NDArray) -> None:
        if tokens.dtype != self.dtype:
            tokens = _fitting(tokens, self.dtype)
        self._bin.write(np.ascontiguousarray(tokens).data)

    def _publish(self, idx: HashedFile) -> None:
        """Replace an earlier pair so that no moment shows a new `.bin` under an old index."""
        for stale in (idx_path(self.prefix), side_car_path(self.prefix)):
            stale.unlink(missing_ok=True)
        self._bin.path.replace(bin_path(self.prefix))
        idx.path.replace(idx_path(self.prefix))
        sync_folder(self.prefix.parent)
        self._published = True
        self._close_spools()

    def _close_spools(self) -> None:
        self._sizes.close()
        self._documents.close()


def write_index(
    file: HashedFile, implementation: str, dtype: np.dtype, sizes: Chunked, documents: Chunked
) -> None:
    """Write the index of items of `sizes` tokens and of the document index `documents`, both read twice at most."""
    if implementation == "mmap":
        _write_mmap_index(file, dtype, sizes, documents)
    else:
        _write_legacy_index(file, dtype, sizes, documents)


def _write_mmap_index(file: HashedFile, dtype: np.dtype, sizes: Chunked, documents: Chunked) -> None:
    file.write(MMAP_HEADER.pack(MMAP_MAGIC, VERSION, dtype_code(dtype), sizes.length, documents.length))
    for chunk in sizes.chunks():
        file.write(chunk.data)
    _write_offsets(file, sizes, dtype.itemsize)
    for chunk in documents.chunks():
        file.write(chunk.data)


def _write_legacy_index(file: HashedFile, dtype: np.dtype, sizes: Chunked, documents: Chunked) -> None:
    items = sizes.length
    header = LEGACY_MAGIC, VERSION, dtype_code(dtype), dtype.itemsize, items, items, documents.length
    file.write(LEGACY_HEADER.pack(*header))
    for start in range(0, items + 1, _CHUNK_ITEMS):
        file.write(np.arange(start, min(start + _CHUNK_ITEMS, items + 1), dtype="<i8").data)
    total = _write_offsets(file, sizes, 1)
    file.write(np.array([total], "<i8").data)
    for chunk in sizes.chunks():
        file.write(chunk.astype("<i8").data)
    for chunk in documents.chunks():
        file.write(chunk.data)


def _write_offsets(file: HashedFile, sizes: Chunked, unit: int) -> int:
    """Where each item starts, in units of a token; returns where the last one ends."""
    total = 0
    for chunk in sizes.chunks():
        ends = total + np.cumsum(chunk, dtype=np.int64) * unit
        starts = ends - chunk.astype(np.int64) * unit
        file.write(starts.astype("<i8", copy=False).data)
        total = int(ends[-1])
    return total


def partial_path(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable; a file system that cannot is left alone."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def cannot_write(path: Path, error: OSError) -> DataError:
    """What to tell the user of a full disk or a missing permission."""
    return DataError(
        f"cannot be written: {error.strerror or error}",
        where=str(path),
        fix="free space or mend the permissions, then run again: nothing was published",
    )


def _lock(file: IO[bytes], path: Path) -> None:
    """Refuse a second writer of the same file at the same time. The lock dies with its process."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise DataError(
            "another process is writing it",
            where=str(path),
            fix="wait for it, or choose another output prefix",
        ) from None
    except OSError:
        return  # some network file systems have no locks: then nobody is stopped


def open_partial(path: Path) -> HashedFile:
    try:
        return HashedFile(partial_path(path))
    except OSError as error:
        raise cannot_write(path, error) from error


def _fitting(tokens: npt.NDArray, dtype: np.dtype) -> npt.NDArray:
    """Tokens in the storage dtype; DataError where one does not fit instead of a wrapped number."""
    if len(tokens):
        limits = np.iinfo(dtype)
        low, high = int(tokens.min()), int(tokens.max())
        if low < limits.min or high > limits.max:
            raise DataError(
                f"token ids from {low} to {high} do not fit {dtype}",
                fix="give the vocabulary's true size: 65500 entries and more are stored as int32",
            )
    return tokens.astype(dtype)
