"""The jobs of a run in order, cut from the sources as workers ask for them.

```
plain .jsonl, lines of .txt ─▶ ranges of the file: the worker reads them itself
.gz, .zst, paragraphs ───────▶ unpacked here into shared input slots, cut behind the last whole record
                               a record larger than a slot goes to a file of its own (`spill`)
```
A thread runs it, so that unpacking goes on while the parent writes. Knows where records end. Refuses to parse them.
"""

from __future__ import annotations

import os
import queue
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megalith.data.preprocess.files import open_new, writing
from megalith.data.preprocess.sources import Source
from megalith.data.preprocess.streams import ByteStream
from megalith.data.preprocess.wire import Job, SharedMemory

_PARAGRAPH_END = re.compile(rb"\n[ \t\r]*\n")
_BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
_LEADING_BLANK_LINES = re.compile(rb"(?:[ \t\r]*\n)*")
_SPILL_READ = 1 << 20
_QUEUED_JOBS = 64

Cut = Callable[[bytes], tuple[int, int] | None]
"""In bytes that start a record: (its end, where the next one starts) of the first record, None if it goes on."""


@dataclass(frozen=True)
class Position:
    """Everything before byte `offset` (uncompressed) of source number `source` is done."""

    source: int = 0
    offset: int = 0


def is_streamed(source: Source, txt_documents: str) -> bool:
    """Whether a source goes through input slots rather than being read by the workers."""
    return bool(source.compression) or (source.text and txt_documents == "paragraph")


class Feed:
    """Iterates over the jobs from `position` on. `close` must be called, and removes what was spilled.

    `input_slots` is 0 where nothing is streamed. `fileno` is readable when `next` has something to say.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        txt_documents: str,
        *,
        position: Position,
        block_bytes: int,
        shared: SharedMemory,
        input_slots: int,
        folder: Path,
    ) -> None:
        self._sources = sources
        self._txt_documents = txt_documents
        self._position = position
        self._block_bytes = block_bytes
        self._shared = shared
        self._folder = folder
        self._free: queue.Queue[int] = queue.Queue()
        for slot in range(input_slots):
            self._free.put(slot)
        self._ready: queue.Queue[Job | BaseException | None] = queue.Queue(_QUEUED_JOBS)
        self._number = 0
        self._closed = False
        self.finished = False
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        return self._wake_read

    def next(self) -> Job | None:
        """The next job, or None: ask again when readable, or `finished`. Raises what the thread ran into."""
        try:
            if self.finished or not os.read(self._wake_read, 1):
                return None
        except BlockingIOError:
            return None
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        self.finished = item is None
        return item

    def release(self, job: Job) -> None:
        """The job was written: its input slot is free, its spill file superfluous."""
        if job.slot >= 0:
            self._free.put(job.slot)
        if job.spill:
            Path(job.spill).unlink(missing_ok=True)

    def close(self) -> None:
        self._closed = True
        self._free.put(-1)
        while self._thread.is_alive():
            try:
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)
        for spill in self._folder.glob("spill-*"):
            spill.unlink(missing_ok=True)
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _run(self) -> None:
        try:
            for job in self._jobs():
                self._put(job)
                if self._closed:
                    return
            self._put(None)
        except _Closed:
            pass
        except BaseException as error:
            self._put(error)

    def _put(self, item: Job | BaseException | None) -> None:
        self._ready.put(item)
        os.write(self._wake_write, b"x")

    def _jobs(self) -> Iterator[Job]:
        for number in range(self._position.source, len(self._sources)):
            source = self._sources[number]
            start = self._position.offset if number == self._position.source else 0
            if is_streamed(source, self._txt_documents):
                yield from self._streamed(number, source, start)
            elif source.text and self._txt_documents == "file":
                yield self._job(number, (0, source.size), source.size, last=True)
            else:
                yield from self._ranges(number, source, start)

    def _job(self, source: int, span: tuple[int, int], read: int, *, last: bool) -> Job:
        self._number += 1
        return Job(self._number - 1, source, *span, read, last)

    def _ranges(self, number: int, source: Source, start: int) -> Iterator[Job]:
        while start < source.size:
            stop = min(start + self._block_bytes, source.size)
            yield self._job(number, (start, stop), stop, last=stop == source.size)
            start = stop

    def _streamed(self, number: int, source: Source, start: int) -> Iterator[Job]:
        stream = ByteStream(source)
        try:
            stream.skip(start)
            if source.text and self._txt_documents == "file":
                cut: Cut = _never
            elif source.text and self._txt_documents == "paragraph":
                cut = _paragraph_end
            else:
                cut = _line_end
            yield from self._blocks(number, stream, start, cut)
        finally:
            stream.close()

    def _blocks(self, number: int, stream: ByteStream, start: int, cut: Cut) -> Iterator[Job]:
        """Slots of whole records; what follows the last one is read again for the next slot."""
        ended = False
        while not ended:
            slot = self._take_slot()
            view = self._shared.input(slot)
            length, end, ended = self._fill(stream, view, cut)
            if end or ended:
                stream.push_back(bytes(view[end:length]))
                job = self._job(number, (start, start + end), stream.position, last=ended)
                job.slot, job.length = slot, end
            else:
                stream.push_back(bytes(view))
                self._free.put(slot)
                path = self._folder / f"spill-{self._number}"
                size, ended = self._spill(path, stream, cut)
                job = self._job(number, (start, start + size), stream.position, last=ended)
                job.spill = str(path)
            yield job
            start = job.stop

    def _fill(self, stream: ByteStream, view: memoryview, cut: Cut) -> tuple[int, int, bool]:
        """A block of the stream, or a whole slot if no record ends in a block: (bytes read, those of whole records, ended)."""
        length = end = 0
        for size in (min(self._block_bytes, len(view)), len(view)):
            length += stream.fill(view[length:size])
            if length < size:
                return length, length, True
            end = _last_record(view[:size], cut)
            if end:
                break
        return length, end, False

    def _spill(self, path: Path, stream: ByteStream, cut: Cut) -> tuple[int, bool]:
        """Write the next record to a file of its own; returns how much was read with what separates it from the next,
        and whether the stream ended.
        """
        size = 0
        buffer = memoryview(bytearray(_SPILL_READ))
        held = b""
        with open_new(path) as file:
            while count := stream.fill(buffer):
                if self._closed:
                    raise _Closed
                held += buffer[:count]
                if place := cut(held):
                    size += _write(file, path, held[: place[0]]) + place[1] - place[0]
                    return size + _to_next(stream, held[place[1] :], cut), False
                keep = _undecided(held, cut)
                size += _write(file, path, held[: len(held) - keep])
                held = held[len(held) - keep :]
            return size + _write(file, path, held), True

    def _take_slot(self) -> int:
        slot = self._free.get()
        if slot < 0 or self._closed:
            raise _Closed
        return slot


class _Closed(Exception):
    """The run ends while the thread waits."""


def _line_end(data: bytes) -> tuple[int, int] | None:
    end = data.find(b"\n")
    return None if end < 0 else (end, end + 1)


def _paragraph_end(data: bytes) -> tuple[int, int] | None:
    match = _PARAGRAPH_END.search(data)
    return None if match is None else (match.start(), match.end())


def _never(data: bytes) -> tuple[int, int] | None:
    return None


def _last_record(view: memoryview, cut: Cut) -> int:
    """Length of the whole records in a full slot; 0 if the first one does not end in it."""
    data = bytes(view)
    if cut is _line_end:
        return data.rfind(b"\n") + 1
    if cut is _never:
        return 0
    ends = [match.end() for match in _BLANK_LINES.finditer(data)]
    while ends and not data[ends[-1] :].strip():
        ends.pop()
    return ends[-1] if ends else 0


def _undecided(data: bytes, cut: Cut) -> int:
    """How many bytes at the end may yet turn out to be the start of a separator."""
    if cut is not _paragraph_end:
        return 0
    newline = data.rfind(b"\n")
    tail = len(data) - newline
    return tail if newline >= 0 and tail < _SPILL_READ and not data[newline:].strip() else 0


def _to_next(stream: ByteStream, rest: bytes, cut: Cut) -> int:
    """Puts back what was read behind a separator, further blank lines left out; returns how many bytes these have."""
    skipped = 0
    buffer = memoryview(bytearray(_SPILL_READ if cut is _paragraph_end else 0))
    while cut is _paragraph_end:
        match = _LEADING_BLANK_LINES.match(rest)
        blank = match.end() if match else 0
        skipped, rest = skipped + blank, rest[blank:]
        if rest.strip() or len(rest) >= _SPILL_READ or not (count := stream.fill(buffer)):
            break
        rest += buffer[:count]
    stream.push_back(rest)
    return skipped


def _write(file: BinaryIO, path: Path, data: bytes) -> int:
    with writing(path):
        file.write(data)
        file.flush()
    return len(data)
