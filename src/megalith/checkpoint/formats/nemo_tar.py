"""An archive whose members are written in any order, by whoever has them: sizes first, so that everything has its place.

    sizes ─ lay_out ─▶ places ─ begin ─▶ headers in a file of full length ─ each member at its place ─ append ─▶ done

As NeMo writes them: a plain tar, `./` before every name, folders as members. Nothing in it says when or by whom it was made: the
same members are the same bytes. Knows the tar format; not what the members are. Never imports torch.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from megalith.checkpoint.files import write_all

_BLOCK = tarfile.BLOCKSIZE
_END = 2 * _BLOCK
"""Zeros behind the last member."""


@dataclass(frozen=True)
class Laid:
    """`headers`: first byte → what stands there; `places`: member → its first byte; `end`, behind the last member."""

    headers: Mapping[int, bytes]
    places: Mapping[str, int]
    end: int

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.end + _END


def lay_out(sizes: Mapping[str, int]) -> Laid:
    """Places of members of these sizes, by name, a folder before what is in it."""
    folders = {str(parent) for name in sizes for parent in PurePosixPath(name).parents}
    headers: dict[int, bytes] = {}
    places: dict[str, int] = {}
    at = 0
    for name in sorted({*folders, *sizes}):
        headers[at] = _header("./" if name == "." else f"./{name}", sizes.get(name))
        at += _BLOCK
        if name in sizes:
            places[name] = at
            at += _padded(sizes[name])
    return Laid(headers, places, at)


def begin(path: Path, laid: Laid) -> None:
    """A new file of full length, with headers; members are zeros still. Raises `OSError`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(descriptor, laid.size)
        for at, header in laid.headers.items():
            os.lseek(descriptor, at, os.SEEK_SET)
            write_all(descriptor, header)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append(path: Path, laid: Laid, name: str, content: bytes) -> None:
    """One more member, behind the others. Raises `OSError`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.lseek(descriptor, laid.end, os.SEEK_SET)
        write_all(descriptor, _header(f"./{name}", len(content)) + content)
        os.ftruncate(descriptor, laid.end + _BLOCK + _padded(len(content)) + _END)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _header(name: str, size: int | None) -> bytes:
    """Of a file, or of a folder (None)."""
    entry = tarfile.TarInfo(name)
    entry.type = tarfile.DIRTYPE if size is None else tarfile.REGTYPE
    entry.mode, entry.size = (0o755 if size is None else 0o644), size or 0
    return entry.tobuf(tarfile.GNU_FORMAT)
