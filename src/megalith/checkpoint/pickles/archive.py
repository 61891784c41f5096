"""The members of an uncompressed zip file, as torch writes it: names and where their bytes lie.

Knows the zip format (central directory, zip64). Refuses what torch never writes and what hides something: compressed or
encrypted members, two of one name, names that lead out of a folder, members that overlap or reach beyond the directory.
"""

from __future__ import annotations

import bisect
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from megalith.checkpoint.pickles.source import PickleError, Stream, Window, shown

MAGIC = b"PK\x03\x04"
MAX_MEMBERS = 1_000_000
MAX_DIRECTORY = 1 << 28
"""Bytes of the central directory."""
_END, _END64, _LOCATOR = struct.Struct("<4s4H2IH"), struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
_ENTRY, _LOCAL = struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s5H3I2H")
_COMMENT = 1 << 16


@dataclass(frozen=True, slots=True)
class Member:
    """A file in the archive: `header` is where its local header begins, `end` what it may not reach beyond.

    `stored` says that it is neither compressed nor encrypted.
    """

    name: str
    header: int
    size: int
    check: int
    stored: bool
    end: int


class Archive:
    """The members of the zip file that a window holds."""

    def __init__(self, window: Window) -> None:
        self._window = window
        directory, size, count = _directory(window)
        entries = list(_entries(window, directory, size))
        if len(entries) != count:
            raise PickleError(f"its directory lists {len(entries)} members and announces {count}")
        starts = [*sorted(entry[1] for entry in entries), directory]
        if len(set(starts)) != len(starts):
            raise PickleError("two of its members lie at one place")
        self.members: dict[str, Member] = {}
        for name, header, length, check, stored in entries:
            if name in self.members:
                raise PickleError(f"it has two members named {shown(name)}")
            if header >= directory:
                raise PickleError(f"its member {shown(name)} lies beyond its directory")
            end = starts[bisect.bisect_right(starts, header)]
            self.members[name] = Member(name, header, length, check, stored, end)

    def place(self, name: str) -> tuple[int, int]:
        """(first byte in the window, size) of a member's content. Raises `PickleError`."""
        member = self.members.get(name)
        if member is None:
            raise PickleError(f"it has no member {shown(name)}")
        if not member.stored:
            raise PickleError(f"its member {shown(name)} is compressed or encrypted, which torch never does")
        head = _LOCAL.unpack(self._window.read(member.header, _LOCAL.size))
        length, extra = head[-2:]
        stored = self._window.read(member.header + _LOCAL.size, length)
        if head[0] != MAGIC or head[3] != 0 or stored != name.encode():
            raise PickleError(f"its member {shown(name)} does not begin where its directory says")
        first = member.header + _LOCAL.size + length + extra
        if first + member.size > member.end:
            raise PickleError(f"its member {shown(name)} reaches into the next one")
        return first, member.size

    def read(self, name: str, most: int) -> bytes:
        """The content of a small member. Raises `PickleError` beyond `most` bytes, or where its checksum differs."""
        first, size = self.place(name)
        if size > most:
            raise PickleError(f"its member {shown(name)} has {size} bytes, {most} are read at most")
        content = self._window.read(first, size)
        self._compare(name, zlib.crc32(content))
        return content

    def verify(self, name: str) -> None:
        """Compares a member's checksum with its content, block by block. Raises `PickleError`."""
        first, size = self.place(name)
        value = 0
        for at in range(first, first + size, 1 << 20):
            value = zlib.crc32(self._window.read(at, min(1 << 20, first + size - at)), value)
        self._compare(name, value)

    def _compare(self, name: str, found: int) -> None:
        if self.members[name].check not in (0, found):  # torch can be told to leave checksums out: 0
            raise PickleError(f"its member {shown(name)} is damaged: its checksum differs")


def _directory(window: Window) -> tuple[int, int, int]:
    """(first byte, size, members) of the central directory, which must end where the end record begins."""
    tail = min(window.length, _COMMENT + _END.size)
    content = window.read(window.length - tail, tail)
    at = content.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(content):
        raise PickleError("it is truncated: a zip file without its end")
    _, disk, first_disk, here, count, size, start, comment = _END.unpack_from(content, at)
    end = window.length - tail + at
    if end + _END.size + comment != window.length:
        raise PickleError("it goes on after the end of its zip file")
    if (
        window.read(max(0, end - _LOCATOR.size), 4) == b"PK\x06\x07"
    ):  # torch writes one even where it is not needed
        end, here, count, size, start = _directory64(window, end)
        disk = first_disk = 0
    if disk or first_disk or here != count or start + size != end:
        raise PickleError("its directory is not where its end says")
    if count > MAX_MEMBERS or size > MAX_DIRECTORY:
        raise PickleError(f"it has {count} members in {size} bytes of directory, more than are read")
    return start, size, count


def _directory64(window: Window, end: int) -> tuple[int, int, int, int, int]:
    locator = window.read(end - _LOCATOR.size, _LOCATOR.size)
    _, _, at, _ = _LOCATOR.unpack(locator)
    if at + _END64.size != end - _LOCATOR.size:
        raise PickleError("its zip64 end is not where it should be")
    mark, _, _, _, _, _, here, count, size, start = _END64.unpack(window.read(at, _END64.size))
    if mark != b"PK\x06\x06":
        raise PickleError("its zip64 end is damaged")
    return at, here, count, size, start


def _entries(window: Window, start: int, size: int) -> Iterator[tuple[str, int, int, int, bool]]:
    """(name, local header, size, checksum, stored as it is) of each member."""
    stream = Stream(window, start, start + size)
    while stream.left:
        entry = _ENTRY.unpack(stream.take(_ENTRY.size))
        mark, _, _, flags, method = entry[:5]
        check, packed, length, names, extras, comments = entry[7:13]
        if mark != b"PK\x01\x02":
            raise PickleError("its directory is damaged")
        name = stream.take(names).decode()
        extra = stream.take(extras)
        stream.take(comments)
        length, packed, header = _wide(extra, [length, packed, entry[16]])
        if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
            raise PickleError(f"its member {shown(name)} leads out of its folder")
        yield name, header, length, check, not method and not flags & 1 and packed == length


def _wide(extra: bytes, fields: list[int]) -> list[int]:
    """Size, packed size and header, those that do not fit 32 bits taken from the zip64 field."""
    if 0xFFFFFFFF not in fields:
        return fields
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            values = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            return [next(values, value) if value == 0xFFFFFFFF else value for value in fields]
        at += 4 + length
    return fields
