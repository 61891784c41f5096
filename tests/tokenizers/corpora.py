"""A sample of every text folder of the real data, whatever its form, for tests that compare ids on real text."""

from __future__ import annotations

import bz2
import gzip
import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

BYTES_A_FILE = 12_000
FILES_A_FOLDER = 6


def root() -> Path | None:
    value = os.environ.get("MEGALITH_DATA")
    return Path(value) if value and Path(value).is_dir() else None


def folders() -> list[str]:
    """Folders that hold text: all but weights."""
    base = root()
    if base is None:
        return []
    return sorted(
        path.name for path in base.iterdir() if path.is_dir() and not path.name.startswith("weights")
    )


def samples(folder: Path) -> Iterator[tuple[str, bytes]]:
    """(file, bytes from its middle), a few files a folder, evenly spread; UTF-8 text only."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    step = max(len(files) // FILES_A_FOLDER, 1)
    for path in files[::step]:
        data = _unpacked(path)
        middle = max(len(data) // 2 - BYTES_A_FILE // 2, 0)
        text = data[middle : middle + BYTES_A_FILE].decode("utf-8", errors="ignore")
        if text and "\x00" not in text:
            yield path.name, text.encode()


def _unpacked(path: Path) -> bytes:
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes()) if path.stat().st_size < 5_000_000 else b""
    if path.suffix == ".bz2":
        return bz2.BZ2File(path).read(4 * BYTES_A_FILE)
    if path.suffix == ".zip":
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
            return archive.read(largest)
    return path.read_bytes()
