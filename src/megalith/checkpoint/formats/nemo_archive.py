"""The members of a `.nemo`: a tar whose files are read where they lie, one that gzip shrank, or an unpacked folder.

    .nemo ─ gzip? ─▶ a temporary tar ─┐
    .nemo, plain ─────────────────────┼─▶ name → Member(file, first byte, bytes)
    folder ───────────────────────────┘

Unpacks nothing: no name of an archive ever becomes a name on the disk. Refuses what leads out of a folder, what is no ordinary
file, and what unpacks to far more than it is. Knows tar and gzip; not what the members mean. Never imports torch.
"""

from __future__ import annotations

import os
import shutil
import struct
import tarfile
import tempfile
import weakref
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from gzip import GzipFile
from pathlib import Path, PosixPath, PurePosixPath
from typing import IO

from megalith.checkpoint.files import readable_bytes
from megalith.checkpoint.pickles.source import printable
from megalith.errors import CheckpointError

SUFFIX = ".nemo"
WEIGHTS = "model_weights.ckpt"
"""A rank's torch file in an archive."""
MAX_MEMBERS = 100_000
MAX_TEXT = 1 << 28
"""Bytes of a member that is read whole: a configuration, a vocabulary."""
MAX_GROWTH = 1 << 30
"""Bytes to which an archive may unpack whatever its size; beyond them, `MAX_RATIO` times that."""
MAX_RATIO = 100
_BLOCK = tarfile.BLOCKSIZE
_GZIP, _USTAR = b"\x1f\x8b", (257, b"ustar")
DAMAGED = "get the archive again: a copy that was cut short or changed on the way cannot be mended"
SUSPICIOUS = "no program that saves models writes such an archive: take it from somebody you trust"
_BROKEN = (
    tarfile.TarError, EOFError, zlib.error, struct.error, ValueError, OverflowError, LookupError, TypeError,
    RecursionError,
)  # fmt: skip
"""What the standard library raises for damaged archives."""


class Temporary(PosixPath):
    """A file or folder that goes when nobody refers to this path any more: every tensor that lies in it does."""

    @classmethod
    def file(cls, suffix: str) -> tuple[Temporary, IO[bytes]]:
        """A new file, open for writing."""
        descriptor, name = tempfile.mkstemp(suffix=suffix, prefix="megalith-")
        return cls._watched(name), open(descriptor, "wb")

    @classmethod
    def folder(cls) -> Temporary:
        """A new, empty folder."""
        return cls._watched(tempfile.mkdtemp(prefix="megalith-"))

    @classmethod
    def _watched(cls, name: str) -> Temporary:
        path = cls(name)
        weakref.finalize(path, _remove, name, os.getpid())
        return path


def _remove(name: str, owner: int) -> None:
    if os.getpid() != owner:  # a copy of this process, which ends before it
        return
    if os.path.isdir(name):
        shutil.rmtree(name, ignore_errors=True)
    elif os.path.exists(name):
        os.unlink(name)


@dataclass(frozen=True)
class Member:
    """`length` bytes of `path` from byte `offset`."""

    path: Path
    offset: int
    length: int


@dataclass(frozen=True)
class Archive:
    """`members` by their names in the archive, without `./`; `path`, what a person named."""

    path: Path
    members: Mapping[str, Member]

    def where(self, name: str) -> str:
        """A member for a message."""
        return f"{self.path}:{name}"

    def read(self, name: str) -> bytes:
        """A small member. Errors: `CheckpointError` where it is not there, or is not small."""
        member = self.members.get(name)
        if member is None:
            held = ", ".join(sorted(self.members)[:6]) or "nothing"
            raise CheckpointError(f"there is no {name} in it; it holds {held}", where=str(self.path))
        if member.length > MAX_TEXT:
            raise CheckpointError(
                f"it has {member.length} bytes, {MAX_TEXT} are read at most", where=self.where(name)
            )
        try:
            with open(member.path, "rb") as file:
                file.seek(member.offset)
                return file.read(member.length)
        except OSError as error:
            what = f"it cannot be read ({error.strerror or error})"
            raise CheckpointError(what, where=self.where(name)) from None


def is_archive(path: Path) -> bool:
    """Does a file begin as a tar or a gzip does, or is it called `.nemo`?"""
    with open(path, "rb") as file:
        head = file.read(_BLOCK)
    first, magic = _USTAR
    return path.suffix == SUFFIX or head.startswith(_GZIP) or head[first : first + len(magic)] == magic


def open_archive(path: Path) -> Archive:
    """The members of a file or of an unpacked folder.

    Errors: `CheckpointError` for damage, for members that lead out of a folder or are no ordinary files (by name), for what is
    too large, and for a full temporary folder.
    """
    try:
        if path.is_dir():
            return Archive(path, dict(_in_folder(path)))
        tar = _unzipped(path) if _begins(path, _GZIP) else path
        with open(tar, "rb") as file:
            return Archive(path, _in_tar(tar, file, str(path)))
    except OSError as error:
        what = f"it cannot be read ({error.strerror or error})"
        raise CheckpointError(what, where=str(path), fix="TMPDIR names where archives are unpacked") from None
    except _BROKEN as error:
        what = f"it is damaged, or no tar archive ({printable(str(error)) or type(error).__name__})"
        raise CheckpointError(what, where=str(path), fix=DAMAGED) from None


def _begins(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic


def _in_folder(root: Path) -> Iterator[tuple[str, Member]]:
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            if not path.resolve().is_relative_to(root.resolve()):
                raise CheckpointError(
                    f"its member {printable(relative)!r} leads out of it", where=str(root), fix=SUSPICIOUS
                )
            if path.is_file():
                yield relative, Member(path, 0, path.stat().st_size)


def _in_tar(tar: Path, file: IO[bytes], where: str) -> dict[str, Member]:
    size = os.fstat(file.fileno()).st_size
    found: dict[str, Member] = {}
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for count, entry in enumerate(archive):
            if count == MAX_MEMBERS:
                raise CheckpointError(f"it has more than {MAX_MEMBERS} members", where=where, fix=SUSPICIOUS)
            name = _safe_name(entry, where)
            if entry.isdir():
                continue
            if name in found:
                raise CheckpointError(f"it has two members {printable(name)!r}", where=where, fix=SUSPICIOUS)
            if entry.offset_data + entry.size > size:
                raise CheckpointError(
                    f"it is truncated: {printable(name)!r} ends at byte {entry.offset_data + entry.size} of {size}",
                    where=where,
                    fix=DAMAGED,
                )
            found[name] = Member(tar, entry.offset_data, entry.size)
        end = archive.offset  # of what follows the last header that made sense: zeros in a whole archive
    file.seek(min(end, size))
    if any(file.read(_BLOCK) or b"\1"):
        raise CheckpointError("it is truncated or damaged: its end is missing", where=where, fix=DAMAGED)
    return found


def _safe_name(entry: tarfile.TarInfo, where: str) -> str:
    """The member's name without `./`. Errors: `CheckpointError` for one that could write elsewhere, or that is no file."""
    path = PurePosixPath(entry.name)
    shown = printable(entry.name)
    if path.is_absolute() or ".." in path.parts or "\\" in entry.name or "\0" in entry.name:
        raise CheckpointError(f"its member {shown!r} leads out of its folder", where=where, fix=SUSPICIOUS)
    if entry.issym() or entry.islnk():
        what = f"its member {shown!r} is a link to {printable(entry.linkname)!r}"
        raise CheckpointError(what, where=where, fix=SUSPICIOUS)
    if not (entry.isreg() or entry.isdir()) or entry.issparse():
        raise CheckpointError(f"its member {shown!r} is no ordinary file", where=where, fix=SUSPICIOUS)
    return path.as_posix()


def _unzipped(path: Path) -> Path:
    """A temporary tar of what gzip shrank. Errors: `CheckpointError` where it grows beyond all measure."""
    limit = max(MAX_GROWTH, MAX_RATIO * path.stat().st_size)
    made, target = Temporary.file(".tar")
    written = 0
    with target, GzipFile(path) as source:
        while block := source.read(1 << 20):
            written += len(block)
            if written > limit:
                raise CheckpointError(
                    f"it unpacks to more than {readable_bytes(limit)}, {MAX_RATIO} times its size",
                    where=str(path),
                    fix=SUSPICIOUS,
                )
            target.write(block)
    return made
