"""Writing to files with errors in words: a full disk, a folder without permission.

Knows `OSError`. Refuses to know what is written.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megalith.errors import DataError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` inside into a DataError about `path`."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: OSError) -> DataError:
    if error.errno in _FULL:
        return DataError(
            f"the disk is full ({error.strerror})",
            where=str(path),
            fix="make room and run the same command again: what is finished is kept, nothing half-done was published",
        )
    return DataError(
        f"cannot be written: {error.strerror or error}",
        where=str(path),
        fix="check the folder and its permissions",
    )


def open_new(path: Path) -> BinaryIO:
    """A file opened for writing from its start, unbuffered."""
    with writing(path):
        return path.open("wb", buffering=0)


def write_all(handle: int, data: memoryview | bytes, path: Path) -> int:
    """Write all of `data` at the file's position; returns its length."""
    view = memoryview(data).cast("B")
    done = 0
    with writing(path):
        while done < len(view):
            done += os.write(handle, view[done:])
    return done
