"""A job's bytes as batches of whole records, small enough to stay in the processor's cache.

```
plain file:  … start ──────────────────── stop …     a job owns the lines that start in [start, stop)
                 ╰first line start      ╰last line may end beyond
```
A record longer than `record_bytes` is not loaded: it comes out as a `Span` of the file, and is handled by `long`.
Knows offsets and newlines. Refuses to parse.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from megalith.data.preprocess.sources import unreadable
from megalith.errors import DataError

BATCH_BYTES = 1 << 19
_SEARCH_BYTES = 1 << 20
_TAIL_BYTES = 1 << 14


@dataclass(frozen=True)
class Limits:
    """Bytes. `record`: a longer one is not loaded. The rest is for those (`long`): a `piece` of text is cut once that
    much has gathered, text of `uncut` without a place to cut is refused, `reading` is read at once, a `string` that is
    longer is taken out of its line, of which `skeleton` may remain.
    """

    record: int = 4 << 20
    piece: int = 4 << 20
    uncut: int = 8 << 20
    reading: int = 1 << 20
    string: int = 1 << 16
    skeleton: int = 4 << 20


@dataclass(frozen=True)
class Span:
    """Bytes [start, end) of a plain file: one record, without its newline."""

    start: int
    end: int


class PlainFile:
    """A file read at offsets, errors in words."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise unreadable(path, error) from None
        self.size = os.fstat(self.handle).st_size

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill `view` from `offset`; less than asked for only at the file's end."""
        filled = 0
        while filled < len(view):
            try:
                count = os.preadv(self.handle, [view[filled:]], offset + filled)
            except OSError as error:
                raise unreadable(self.path, error) from None
            if count == 0:
                break
            filled += count
        return filled

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes; DataError if the file ends before."""
        buffer = bytearray(length)
        if self.read_into(memoryview(buffer), offset) != length:
            raise self.truncated()
        return bytes(buffer)

    def find_newline(self, offset: int, end: int) -> int:
        """Offset of the first newline in [offset, end), or `end`."""
        while offset < end:
            length = min(_SEARCH_BYTES, end - offset)
            found = self.read(offset, length).find(b"\n")
            if found >= 0:
                return offset + found
            offset += length
        return end

    def truncated(self) -> DataError:
        return DataError(
            "became shorter while it was being read",
            where=self.path,
            fix="run again with --restart when nothing writes to it",
        )

    def close(self) -> None:
        os.close(self.handle)


class LineReader:
    """Batches of the lines of plain files. Keeps one buffer for all of them."""

    def __init__(self, batch_bytes: int = BATCH_BYTES, record_bytes: int = Limits.record) -> None:
        self.batch_bytes = min(
            batch_bytes, record_bytes
        )  # so that a long line is the first one in the buffer
        self.record_bytes = record_bytes
        self._buffer = bytearray(record_bytes + self.batch_bytes)

    def batches(self, file: PlainFile, start: int, stop: int) -> Iterator[memoryview | Span]:
        """Lines that start in [start, stop): batches that end in a newline (or the file's end), and long lines.

        A batch is valid until the next one is asked for.
        """
        stop = min(stop, file.size)
        offset = start and file.find_newline(start - 1, stop - 1) + 1
        held = 0  # bytes of an unfinished line at the buffer's start; `offset` is where they begin
        while offset < stop:
            held += self._fill(file, offset, held, stop)
            if held > self.record_bytes and self._buffer.find(b"\n", 0, self.record_bytes + 1) < 0:
                end = file.find_newline(offset + self.record_bytes, file.size)
                yield Span(offset, end)
                offset, held = end + 1, 0
            elif cut := self._last_line_end(file, offset, held, stop):
                yield memoryview(self._buffer)[:cut]
                self._buffer[: held - cut] = self._buffer[cut:held]
                offset, held = offset + cut, held - cut

    def _fill(self, file: PlainFile, offset: int, held: int, stop: int) -> int:
        """Read on behind what is held: up to a batch, and not much beyond `stop`."""
        missing = stop - offset - held
        wanted = missing + _TAIL_BYTES if missing > 0 else max(_TAIL_BYTES, held)
        wanted = min(wanted, self.batch_bytes, file.size - offset - held)
        count = file.read_into(memoryview(self._buffer)[held : held + wanted], offset + held)
        if count != wanted:
            raise file.truncated()
        return count

    def _last_line_end(self, file: PlainFile, offset: int, held: int, stop: int) -> int:
        """Length of the whole lines held that start before `stop`; 0 if not even one is complete."""
        if offset + held < stop:
            return self._buffer.rfind(b"\n", 0, held) + 1
        found = self._buffer.find(b"\n", stop - 1 - offset, held)
        if found >= 0:
            return found + 1
        if offset + held == file.size:
            return held
        return self._buffer.rfind(b"\n", 0, stop - 1 - offset) + 1


def memory_batches(data: memoryview, batch_bytes: int = BATCH_BYTES) -> Iterator[memoryview]:
    """Whole lines that are in memory already, batch by batch; the last line may lack its newline."""
    start = 0
    while start < len(data):
        end = min(start + batch_bytes, len(data)) - 1
        while end < len(data):
            found = bytes(data[end : end + _TAIL_BYTES]).find(b"\n")
            if found >= 0:
                end += found + 1
                break
            end += _TAIL_BYTES
        end = min(end, len(data))
        yield data[start:end]
        start = end
