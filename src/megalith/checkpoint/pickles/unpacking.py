"""Members of archives as windows, and windows as the files that Python's archive libraries want.

Knows limits of unpacking. A member is copied to a temporary file: a zip file inside an archive is read from its end.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from megalith.checkpoint.pickles.source import PickleError, Window

MAX_UNPACKED = 1 << 36
"""Bytes of an archive that are unpacked at most."""


@contextmanager
def copied(file: IO[bytes], size: int) -> Iterator[Window]:
    """A member's content, which claims `size` bytes. Raises `PickleError` beyond what is unpacked, or than it claims."""
    if size > MAX_UNPACKED:
        raise PickleError(f"it unpacks to {size} bytes, {MAX_UNPACKED} are unpacked at most")
    with file, tempfile.TemporaryFile() as target:
        written = 0
        while block := file.read(1 << 20):
            written += len(block)
            if written > size:
                raise PickleError(f"it unpacks to more than the {size} bytes that it claims")
            target.write(block)
        target.flush()
        yield Window(target.fileno(), 0, written)


class View(io.RawIOBase):
    """A window as a file."""

    def __init__(self, window: Window) -> None:
        super().__init__()
        self._window, self._at = window, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """The new position."""
        self._at = offset + (0, self._at, self._window.length)[whence]
        if self._at < 0:
            raise OSError("before the beginning")
        return self._at

    def readinto(self, target: Any) -> int:
        """How many bytes were read: 0 at the end."""
        count = max(0, min(len(target), self._window.length - self._at))
        target[:count] = self._window.read(self._at, count) if count else b""
        self._at += count
        return count
