"""Compressed files as streams of bytes, in bounded memory whatever they unpack to.

Knows gzip and zstd, cut-off and damaged files. Refuses to know lines.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol

import zstandard

from megalith.data.preprocess.sources import Source, unreadable
from megalith.errors import DataError

_FEED_BYTES = 1 << 10
"""zstd unpacks one byte to at most 32 KiB, and what one feed unpacks to is held in memory."""
_LARGEST_WINDOW = 1 << 27
_FIX = "copy or download the file again"


class Stream(Protocol):
    def readinto(self, view: memoryview) -> int: ...


class ByteStream:
    """A source's uncompressed bytes in order; every fault is a DataError that names the file."""

    def __init__(self, source: Source) -> None:
        self._path = source.path
        self._pushed = b""
        try:
            self._file = Path(source.path).open("rb")  # noqa: SIM115
        except OSError as error:
            raise unreadable(self._path, error) from None
        openers: dict[str, Callable[[BinaryIO], Stream]] = {
            "": lambda file: file,  # type: ignore[dict-item,return-value]
            "gzip": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),  # type: ignore[dict-item,return-value]
            "zstd": _ZstdStream,
        }
        self._stream = openers[source.compression](self._file)

    @property
    def position(self) -> int:
        """How far the file has been read, in bytes as stored."""
        return self._file.tell()

    def push_back(self, data: bytes) -> None:
        """Give back what was read last: it is read again."""
        self._pushed = data + self._pushed

    def fill(self, view: memoryview) -> int:
        """Read until `view` is full or the stream ends; returns the bytes read."""
        filled = min(len(self._pushed), len(view))
        view[:filled] = self._pushed[:filled]
        self._pushed = self._pushed[filled:]
        while filled < len(view):
            count = self._read(view[filled:])
            if count == 0:
                break
            filled += count
        return filled

    def skip(self, count: int) -> None:
        """Read and forget; DataError if the stream ends before."""
        scratch = memoryview(bytearray(min(count, 1 << 20)))
        while count:
            got = self.fill(scratch[: min(count, len(scratch))])
            if got == 0:
                raise DataError(
                    "ends before the place where the stopped run had got to", where=self._path, fix=_FIX
                )
            count -= got

    def close(self) -> None:
        self._file.close()

    def _read(self, view: memoryview) -> int:
        try:
            return self._stream.readinto(view)
        except EOFError:
            raise DataError("cut off: the compressed data ends early", where=self._path, fix=_FIX) from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"damaged gzip data ({error})", where=self._path, fix=_FIX) from None
        except zstandard.ZstdError as error:
            raise DataError(f"damaged zstd data ({error})", where=self._path, fix=_FIX) from None
        except OSError as error:
            raise unreadable(self._path, error) from None


class _ZstdStream:
    """zstd frames one after another. The library's own reader takes a cut-off file for a complete one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        self._frame = self._decompressor.decompressobj()
        self._started = False
        self._pending = memoryview(b"")
        self._rest = b""

    def readinto(self, view: memoryview) -> int:
        while not self._pending:
            if not self._decompress():
                return 0
        count = min(len(view), len(self._pending))
        view[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def _decompress(self) -> bool:
        """Unpack the next few bytes; False at the end of the file."""
        data, self._rest = self._rest or self._file.read(_FEED_BYTES), b""
        if not data:
            if self._started and not self._frame.eof:
                raise EOFError
            return False
        if self._frame.eof:
            self._frame = self._decompressor.decompressobj()
        self._started = True
        self._pending = memoryview(self._frame.decompress(data))
        if self._frame.eof:
            self._rest = self._frame.unused_data
        return True
