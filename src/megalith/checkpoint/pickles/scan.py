"""What the pickles of a file or a folder would do if they were loaded, without loading them.

    a folder ─▶ its files ─▶ torch files, plain pickles, .distcp, zip and tar archives (.nemo) and what is in them
             ─▶ `Found`: each name with its verdict, or why it could not be read

Knows containers. Never raises for what is in a file: that is what it reports.
"""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megalith.checkpoint.files import regular_size
from megalith.checkpoint.pickles.archive import MAGIC
from megalith.checkpoint.pickles.distributed import METADATA, items_of
from megalith.checkpoint.pickles.names import Verdict
from megalith.checkpoint.pickles.recording import BROKEN, Recording, record
from megalith.checkpoint.pickles.source import PickleError, Stream, Window
from megalith.checkpoint.pickles.unpacking import MAX_UNPACKED, View, copied
from megalith.errors import CheckpointError

SUFFIXES = (
    ".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".th",
    ".distcp", METADATA, ".nemo", ".zip", ".tar", ".tgz", ".tar.gz",
)  # fmt: skip
"""Files that are looked into for their names; others only where they begin like a pickle or a torch file."""
MAX_NESTING = 3
"""Archives in archives."""
_END = b"PK\x05\x06"


@dataclass(frozen=True)
class Found:
    """One pickle-like file: `names` with what each would do, and `problem`, why it (or the rest of it) could not be read."""

    file: str
    names: dict[str, Verdict]
    problem: str = ""

    @property
    def verdict(self) -> Verdict:
        """The worst of its names."""
        found = set(self.names.values())
        return next((each for each in (Verdict.RUNS, Verdict.INERT) if each in found), Verdict.ALLOWED)

    def record(self) -> dict[str, Any]:
        """Everything, as plain values."""
        names = {name: verdict.value for name, verdict in self.names.items()}
        return {"file": self.file, "verdict": self.verdict.value, "names": names, "problem": self.problem}


def scan(path: Path) -> list[Found]:
    """What every pickle-like file of a folder (or one file) names. Raises `CheckpointError` where there is nothing at `path`."""
    path = Path(path)
    if path.is_dir():
        files = sorted(Path(folder) / name for folder, _, names in os.walk(path) for name in names)
        return [
            found for file in files if _likely(file) for found in _file(file, str(file.relative_to(path)))
        ]
    if not path.exists():
        raise CheckpointError(
            "there is no such file or folder", where=str(path), fix="give a file or a folder"
        )
    return list(_file(path, path.name))


def _likely(path: Path) -> bool:
    """Whether a file of a folder may be loaded as a pickle."""
    if path.name.lower().endswith(SUFFIXES):
        return True
    try:
        regular_size(path)
        with open(path, "rb") as file:
            head = file.read(4)
    except OSError:
        return False
    return head == MAGIC or (head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"))


def _file(path: Path, label: str) -> Iterator[Found]:
    try:
        size = regular_size(path)
        with open(path, "rb", buffering=0) as file:
            window = Window(file.fileno(), 0, size)
            if path.suffix == ".distcp":
                yield _distributed(path, window, label)
            else:
                yield from _content(window, label)
    except OSError as error:
        yield Found(label, {}, f"it cannot be read ({error.strerror or error})")


def _content(window: Window, label: str, depth: int = 0) -> Iterator[Found]:
    head = window.read(0, min(512, window.length))
    if depth > MAX_NESTING:
        yield Found(label, {}, f"archives in archives, more than {MAX_NESTING} deep")
    elif head.startswith(MAGIC):
        yield from _unpacked(_zip, window, label, depth)
    elif head[257:262] == b"ustar" or head.startswith(b"\x1f\x8b"):
        yield from _unpacked(_tar, window, label, depth)
    else:
        world = Recording()
        yield Found(label, world.names, record(Stream(window), world))


def _unpacked(opener: Any, window: Window, label: str, depth: int) -> Iterator[Found]:
    """What an archive holds. What the libraries for them raise for a damaged one becomes its problem."""
    found = 0
    try:
        for each in opener(window, label, depth):
            found += 1
            yield each
    except (
        *BROKEN,
        OSError,
        EOFError,
        RuntimeError,
        zipfile.BadZipFile,
        tarfile.TarError,
        zlib.error,
    ) as error:
        yield Found(label, {}, f"it cannot be unpacked ({error or type(error).__name__})")
        return
    if not found:
        yield Found(label, {}, "no pickle in it")


def _zip(window: Window, label: str, depth: int) -> Iterator[Found]:
    """The pickles of a torch file, or of any zip file."""
    with zipfile.ZipFile(io.BufferedReader(View(window))) as archive:
        for member in archive.infolist():
            name = member.filename.lower()
            if name.endswith(".pkl"):
                yield _program(archive.open(member), member.file_size, _under(label, member.filename))
            elif name.endswith(SUFFIXES):
                yield from _member(
                    archive.open(member), member.file_size, f"{label}:{member.filename}", depth
                )


def _under(label: str, name: str) -> str:
    """A torch file's one pickle is the file."""
    return label if name.endswith("/data.pkl") and name.count("/") == 1 else f"{label}:{name}"


def _program(file: IO[bytes], size: int, label: str) -> Found:
    with copied(file, size) as window:
        world = Recording()
        return Found(label, world.names, record(Stream(window), world, alone=True))


def _member(file: IO[bytes], size: int, label: str, depth: int) -> Iterator[Found]:
    with copied(file, size) as window:
        yield from _content(window, label, depth + 1)


def _tar(window: Window, label: str, depth: int) -> Iterator[Found]:
    left = MAX_UNPACKED
    with tarfile.open(fileobj=io.BufferedReader(View(window)), mode="r:*") as archive:
        for member in archive:
            left -= member.size
            if left < 0:
                raise PickleError(f"it unpacks to more than {MAX_UNPACKED} bytes")
            name = f"{label}:{member.name}"
            file = archive.extractfile(member) if member.isreg() else None
            if file is not None and name.lower().endswith(SUFFIXES):
                yield from _member(file, member.size, name, depth)


def _distributed(path: Path, window: Window, label: str) -> Found:
    """The torch files that follow one another in a .distcp: where `.metadata` beside it says, else wherever one ends."""
    world = Recording()
    problems: dict[str, None] = {}
    for start, length in _torch_files(path, window):
        inner = Window(window.descriptor, window.start + start, min(length, window.length - start))
        for found in _content(inner, label):
            problems.update(dict.fromkeys(filter(None, [found.problem])))
            for name, verdict in found.names.items():
                world.note(name, verdict)
    return Found(label, world.names, "; ".join(list(problems)[:3]))


def _torch_files(path: Path, window: Window) -> Iterator[tuple[int, int]]:
    try:
        items = [item for item in items_of(path.parent) if item.path == path]
    except CheckpointError:
        items = []
    if items:
        yield from ((item.offset, item.length) for item in items if 0 <= item.offset <= window.length)
        return
    start = position = 0
    while position < window.length:
        block = window.read(position, min(1 << 23, window.length - position))
        at = block.find(_END)
        if at < 0:
            position += max(1, len(block) - 3) if len(block) > 3 else len(block)
            continue
        end = min(position + at + 22, window.length)
        yield start, end - start
        start = position = end
    if start == 0:
        yield 0, window.length
