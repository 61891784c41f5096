"""Bytes of a file by position, and one after another. Knows limits of reading; knows nothing of pickles' meaning.

Nothing is mapped into memory: a file that becomes shorter is an error here, and would be a crash there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

BLOCK = 1 << 16
"""Bytes read at once on the way through a pickle."""
MAX_LINE = 1 << 20
"""Bytes of a line of the text opcodes of protocol 0."""


MAX_SHOWN = 80
"""Characters of a value or name of the file in a message."""


def shown(value: object) -> str:
    """A value of the file for a message: short, printable, and made without looking into containers (they may hold themselves)."""
    if isinstance(value, (str, bytes)):
        short = value[:MAX_SHOWN]
        return ascii(short) + ("…" if len(value) > MAX_SHOWN else "")
    if (
        value is None
        or isinstance(value, (bool, float))
        or (isinstance(value, int) and value.bit_length() < 128)
    ):
        return str(value)
    return f"a {type(value).__name__}"


def printable(name: str) -> str:
    """A name of the file as text that a terminal shows as it is, of bounded length."""
    short = name[: 3 * MAX_SHOWN] + ("…" if len(name) > 3 * MAX_SHOWN else "")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in short)


class PickleError(ValueError):
    """The bytes are not what they claim to be; the message says why."""


class Refused(PickleError):
    """The pickle names something that runs code: `name` is `module.name` as it stands in the file."""

    def __init__(self, name: str, why: str = "") -> None:
        self.name = printable(name)
        super().__init__(f"loading it would have run {self.name}{why}")


class Unreadable(PickleError):
    """A kind of content that is harmless, but that is not read here (a sparse tensor, say); `fix` says what to do."""

    def __init__(
        self, what: str, fix: str = "save its tensors again, dense, of plain numbers, on the CPU"
    ) -> None:
        self.fix = fix
        super().__init__(what)


@dataclass(frozen=True)
class Window:
    """`length` bytes of an open file from byte `start`."""

    descriptor: int
    start: int
    length: int

    def read(self, position: int, count: int) -> bytes:
        """Exactly `count` bytes. Raises `PickleError` where there are fewer."""
        if not (position >= 0 and count >= 0 and position + count <= self.length):
            raise PickleError(f"it is truncated: {count} bytes at {position}, of {self.length}")
        blocks = []
        while count:
            block = os.pread(self.descriptor, min(count, 1 << 30), self.start + position)
            if not block:
                raise PickleError("it became shorter while it was read")
            blocks.append(block)
            position, count = position + len(block), count - len(block)
        return blocks[0] if len(blocks) == 1 else b"".join(blocks)


class Stream:
    """The bytes of a window from `position` to `stop`, in order."""

    def __init__(self, window: Window, position: int = 0, stop: int | None = None) -> None:
        self._window = window
        self._stop = window.length if stop is None else stop
        self._block = b""
        self._at = 0
        self._next = position

    @property
    def position(self) -> int:
        """Of the next byte, in the window."""
        return self._next - len(self._block) + self._at

    @property
    def left(self) -> int:
        """Bytes that are still to come."""
        return self._stop - self.position

    def take(self, count: int) -> bytes:
        """The next `count` bytes. Raises `PickleError` before any memory is taken where there are fewer."""
        end = self._at + count
        if end <= len(self._block):
            taken = self._block[self._at : end]
            self._at = end
            return taken
        if count > self.left:
            raise PickleError(f"it is truncated: {count} bytes wanted, {self.left} left")
        head = self._block[self._at :]
        rest = count - len(head)
        if rest >= BLOCK:
            taken = head + self._window.read(self._next, rest)
            self._next += rest
            self._block, self._at = b"", 0
            return taken
        self._refill()
        self._at = rest
        return head + self._block[:rest]

    def skip(self, count: int) -> None:
        """Goes on `count` bytes without reading them."""
        if not 0 <= count <= self.left:
            raise PickleError(f"it is truncated: {count} bytes wanted, {self.left} left")
        self._next = self.position + count
        self._block, self._at = b"", 0

    def line(self) -> bytes:
        """Up to the next newline, without it."""
        line = b""
        while (end := self._block.find(b"\n", self._at)) < 0:
            line += self._block[self._at :]
            if len(line) > MAX_LINE or self._next >= self._stop:
                raise PickleError("a line of it does not end")
            self._refill()
        line += self._block[self._at : end]
        self._at = end + 1
        return line

    def _refill(self) -> None:
        size = min(BLOCK, self._stop - self._next)
        self._block, self._at = self._window.read(self._next, size), 0
        self._next += size
