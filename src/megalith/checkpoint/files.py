"""Durable files: written whole, hashed on the way, forced to disk, published by a rename.

Knows bytes, folders and SHA-256. Knows nothing of tensors or of what a checkpoint is, and never imports torch. Every change
of the disk goes through a function of `os`, called by its full name, so that a test can stop the process at any of them.
"""

from __future__ import annotations

import hashlib
import os
import queue
import shutil
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

Buffer: TypeAlias = bytes | memoryview
Progress: TypeAlias = Callable[[int], None]

CHUNK = 1 << 20
"""Bytes handed to the disk and to the hash at once: few enough that the second finds them in the processor's cache."""


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of a file: `size` in bytes and the hexadecimal `sha256` of its content."""

    size: int
    sha256: str


class Hasher:
    """A thread that hashes beside the one that writes: both release the interpreter's lock, so the times overlap.

    Made by the caller of a save rather than by the saving thread: a thread may not be started once the process is ending,
    and a save may well run then. The buffers given to `update` must not change before `drain` returns.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Any, Buffer] | threading.Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="checkpoint-hash", daemon=True)
        self._thread.start()

    def update(self, digest: Any, chunk: Buffer) -> None:
        """Adds `chunk` to `digest`, in the order of the calls."""
        self._queue.put((digest, chunk))

    def drain(self) -> None:
        """Returns when everything given to `update` so far has been hashed."""
        done = threading.Event()
        self._queue.put(done)
        done.wait()

    def close(self) -> None:
        """Ends the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
            else:
                digest, chunk = item
                digest.update(chunk)


def write_file(path: Path, chunks: Iterable[Buffer], hasher: Hasher | None = None) -> FileRecord:
    """Writes a new file, forces it to disk, and returns its size and hash. Raises `OSError` (a full disk, say).

    `chunks` are buffers of any length that stay as they are until this returns.
    """
    digest = hashlib.sha256()
    size = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for chunk in _pieces(chunks):
            if hasher is None:
                digest.update(chunk)
            else:
                hasher.update(digest, chunk)
            write_all(descriptor, chunk)
            size += len(chunk)
        os.fsync(descriptor)
    finally:
        if hasher is not None:
            hasher.drain()
        os.close(descriptor)
    return FileRecord(size, digest.hexdigest())


def _pieces(chunks: Iterable[Buffer]) -> Iterator[Buffer]:
    """The same bytes in pieces of at most `CHUNK`."""
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        for start in range(0, len(view), CHUNK):
            yield view[start : start + CHUNK]


def write_all(descriptor: int, chunk: Buffer) -> None:
    """`os.write` until everything is written: one call may write less than it was given."""
    rest = memoryview(chunk)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def replace_file(path: Path, content: bytes, *, temporary: Path) -> None:
    """Puts `content` at `path` at once, durably: a reader sees the old file or the new one, whole."""
    temporary.unlink(missing_ok=True)
    write_file(temporary, [content])
    os.replace(temporary, path)
    sync_folder(path.parent)


def replace_link(path: Path, target: str, *, temporary: Path) -> None:
    """Makes `path` a symbolic link to `target` at once, whether or not it was one before."""
    temporary.unlink(missing_ok=True)
    os.symlink(target, temporary)
    os.replace(temporary, path)


def sync_folder(folder: Path) -> None:
    """Forces the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(folder: Path) -> None:
    """Removes a folder and what is in it; nothing happens when it is not there."""
    if folder.exists():
        shutil.rmtree(folder)


def free_bytes(folder: Path) -> int:
    """What an ordinary user may still write on the file system of `folder`."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def regular_size(path: Path) -> int:
    """Size in bytes of an ordinary file. Raises `OSError` for anything else: opening a pipe would wait for ever."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not an ordinary file")
    return status.st_size


def file_digest(path: Path, progress: Progress | None = None) -> str:
    """SHA-256 of a file's content, in hexadecimal. `progress` is told the number of bytes as they are read."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(min(CHUNK, regular_size(path) + 1)))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            if progress is not None:
                progress(count)
    return digest.hexdigest()


def file_digests(
    paths: list[Path], *, threads: int = 1, progress: Progress | None = None
) -> list[str | OSError]:
    """SHA-256 of each file, or the error that reading it gave; `threads` files at a time."""
    results: list[str | OSError] = [OSError("not read")] * len(paths)
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(paths)):
        todo.put(number)

    def work() -> None:
        while True:
            try:
                number = todo.get_nowait()
            except queue.Empty:
                return
            try:
                results[number] = file_digest(paths[number], progress)
            except OSError as error:
                results[number] = error

    helpers = [threading.Thread(target=work) for _ in range(min(threads, len(paths)) - 1)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()
    return results


def readable_bytes(count: float) -> str:
    """`1536000` → `1.5 MB` (powers of ten, as disks are sold)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")
