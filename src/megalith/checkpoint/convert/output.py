"""Files written while they are made: one thread makes the bytes, another hashes and writes them, a few blocks behind.

    chunks of file 0 ─┐
    chunks of file 1 ─┼─ in turns ─▶ queue (bounded) ─▶ SHA-256, os.write ─▶ fsync ─▶ FileRecord each
    …                 ┘

In turns, so that parts of one tensor that go to several files are made from one reading of it. Knows bytes, no tensors.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megalith.checkpoint.files import CHUNK, Buffer, FileRecord, Progress, write_all

AHEAD = 64
"""Blocks of at most `CHUNK` bytes that wait for the writing thread at most."""


@dataclass(frozen=True)
class Within:
    """A place in a file that is there: what is written goes to byte `offset` and behind it."""

    path: Path
    offset: int


Place = TypeVar("Place", bound=Path | Within)


class _File:
    """A new file, or a place in one: what was written to it, and its hash so far."""

    def __init__(self, place: Path | Within) -> None:
        flags = os.O_WRONLY | os.O_CLOEXEC
        if isinstance(place, Within):
            self.descriptor = os.open(place.path, flags)
            os.lseek(self.descriptor, place.offset, os.SEEK_SET)
        else:
            self.descriptor = os.open(place, flags | os.O_CREAT | os.O_EXCL, 0o666)
        self.digest, self.size = hashlib.sha256(), 0

    def take(self, chunk: memoryview) -> None:
        self.digest.update(chunk)
        write_all(self.descriptor, chunk)
        self.size += len(chunk)


class _Writer:
    """The thread. After an error, or once `abandoned`, it takes what it is given and does nothing."""

    def __init__(self) -> None:
        self.abandoned = False
        self.error: OSError | None = None
        self._queue: queue.Queue[tuple[_File, memoryview] | None] = queue.Queue(AHEAD)
        self._thread = threading.Thread(target=self._run, name="conversion-write", daemon=True)
        self._thread.start()

    def give(self, file: _File, chunk: memoryview) -> None:
        """Hands a block over. Raises what went wrong with an earlier one."""
        if self.error is not None:
            raise self.error
        self._queue.put((file, chunk))

    def close(self) -> None:
        """Returns when everything has been written."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            file, chunk = item
            item = None  # the block's tensor may be let go as soon as it is written
            try:
                if self.error is None and not self.abandoned:
                    file.take(chunk)
            except OSError as error:
                self.error = error
            del file, chunk


def write_files(
    contents: Mapping[Place, Iterator[Buffer]], progress: Progress | None = None
) -> dict[Place, FileRecord]:
    """Writes new files, or places in one, side by side, a block of each in turn, and forces them to disk. Raises `OSError` (a full disk, say)."""
    files: dict[Place, _File] = {}
    writer = _Writer()
    try:
        try:
            for path in contents:
                files[path] = _File(path)
            _in_turns({path: _pieces(chunks) for path, chunks in contents.items()}, files, writer, progress)
        except BaseException:
            writer.abandoned = True
            raise
        finally:
            writer.close()
        if writer.error is not None:
            raise writer.error
        for file in files.values():
            os.fsync(file.descriptor)
    finally:
        for file in files.values():
            os.close(file.descriptor)
    return {path: FileRecord(file.size, file.digest.hexdigest()) for path, file in files.items()}


def _in_turns(
    todo: dict[Place, Iterator[memoryview]],
    files: Mapping[Place, _File],
    writer: _Writer,
    progress: Progress | None,
) -> None:
    while todo:
        for path in list(todo):
            piece = next(todo[path], None)
            if piece is None:
                del todo[path]
                continue
            writer.give(files[path], piece)
            if progress is not None:
                progress(len(piece))


def _pieces(chunks: Iterator[Buffer]) -> Iterator[memoryview]:
    """The same bytes in pieces of at most `CHUNK`; nothing is held that was handed out."""
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        del chunk
        for start in range(0, len(view), CHUNK):
            yield view[start : start + CHUNK]
        del view
