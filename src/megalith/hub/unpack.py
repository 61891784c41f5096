"""A zip from the network, unpacked into a folder that it cannot leave. Knows no model."""

from __future__ import annotations

import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from megalith.errors import DataError

Report = Callable[[int, int], None]
CHUNK = 1 << 20
MEMBERS = 10_000
RATIO, SMALL = 20, 1 << 24
"""Bytes out for bytes in, at most, and so many in any case: weights hardly shrink at all."""
_PLAIN = (0, stat.S_IFREG, stat.S_IFDIR)


def unpack(archive: Path, folder: Path, report: Report) -> list[Path]:
    """Every file of `archive`, written below the new `folder`; all names are judged before anything is written.

    `report` is told the bytes that are written, and how many there will be.

    Errors: `DataError` for damage, for members that are links or would lie outside, and for more than an honest file holds.
    """
    where = str(archive)
    try:
        with zipfile.ZipFile(archive) as opened:
            members = opened.infolist()
            if problems := list(_problems(members, archive.stat().st_size)):
                raise DataError("\n    ".join(["it is not unpacked:", *problems[:8]]), where=where)
            folder.mkdir(parents=True)
            return list(_write(opened, members, folder, report))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as error:
        raise DataError(f"is no zip that can be read ({error})", where=where) from None


def _problems(members: list[zipfile.ZipInfo], size: int) -> Iterator[str]:
    seen: set[str] = set()
    for member in members:
        name = member.filename
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not path.parts:
            yield f"{name!r} would lie outside the folder"
        elif stat.S_IFMT(member.external_attr >> 16) not in _PLAIN:
            yield f"{name!r} is a link or a device"
        elif member.flag_bits & 1:
            yield f"{name!r} is encrypted"
        elif str(path).casefold() in seen:
            yield f"{name!r} is there twice"
        seen.add(str(path).casefold())
    total = sum(member.file_size for member in members)
    if total > max(RATIO * size, SMALL):
        yield f"{total:,} bytes would come out of {size:,}"
    if len(members) > MEMBERS:
        yield f"it has {len(members):,} members"


def _write(
    opened: zipfile.ZipFile, members: list[zipfile.ZipInfo], folder: Path, report: Report
) -> Iterator[Path]:
    done, total = 0, sum(member.file_size for member in members)
    for member in members:
        if member.is_dir():
            continue
        target = folder / PurePosixPath(member.filename)
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            opened.open(member) as source,
            open(target, "xb") as file,
        ):  # no more than the member says; its CRC
            while chunk := source.read(CHUNK):
                done += file.write(chunk)
                report(done, total)
        yield target
