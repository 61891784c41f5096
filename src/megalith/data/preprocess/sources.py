"""The input files of a run: found, put in order, and recognised again when a stopped run is continued.

Knows paths, suffixes and the first bytes of a file. Refuses to parse records.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megalith.errors import DataError, UnsupportedError

_HEAD_BYTES = 1 << 16
_TEXT_SUFFIXES = (".txt",)
_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}
_REFUSED = {
    ".bz2": "bzip2",
    ".xz": "xz",
    ".zip": "zip",
    ".tar": "tar",
    ".parquet": "Parquet",
    ".arrow": "Arrow",
    ".csv": "CSV",
    ".tsv": "TSV",
    ".bin": "token",
    ".idx": "index",
}


@dataclass(frozen=True)
class Source:
    """One input file. `text`: plain text, not one JSON object a line. `head`: SHA-256 of its first 64 KiB."""

    path: str
    text: bool
    compression: str
    size: int
    modified: int
    head: str

    def fingerprint(self) -> dict[str, Any]:
        return asdict(self)


def find_sources(inputs: Sequence[str]) -> tuple[Source, ...]:
    """Input files in the order given; a folder's and a pattern's files sorted by path.

    DataError for what is missing, unreadable or of a kind that is not read.
    """
    paths = [path for text in inputs for path in _expand(text)]
    return tuple(_describe(path) for path in paths)


def _expand(text: str) -> Iterable[Path]:
    path = Path(text).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.exists() or not glob.has_magic(text):
        return [path]
    found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    files = [name for name in found if name.is_file()]
    if not files:
        raise DataError("no file matches this pattern", where=text, fix="check it; quote it for the shell")
    return files


def _in_folder(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.is_file())
    known = sorted(path for path in files if not _hidden(path, folder) and _known(path))
    if not known:
        raise DataError(
            "the folder holds no .jsonl, .json or .txt file (plain, .gz or .zst)",
            where=str(folder),
            fix="name the files themselves if they are called otherwise",
        )
    return known


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _known(path: Path) -> bool:
    return _inner_suffix(path) in _TEXT_SUFFIXES + _JSON_SUFFIXES


def _inner_suffix(path: Path) -> str:
    """`.jsonl` of `x.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _describe(path: Path) -> Source:
    suffix = path.suffix.lower()
    if suffix in _REFUSED:
        raise UnsupportedError(
            f"{_REFUSED[suffix]} files are not read",
            where=str(path),
            fix="give .jsonl, .json or .txt, plain, .gz or .zst",
        )
    compression = _COMPRESSIONS.get(suffix, "")
    if path.exists() and not path.is_file():
        raise DataError(
            "a pipe or device, not a file: it cannot be read again when a stopped run is continued",
            where=str(path),
            fix="write it to a file first; .gz and .zst are read as they are",
        )
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
            status = os.fstat(file.fileno())
    except OSError as error:
        raise unreadable(path, error) from None
    if compression and head and not head.startswith(_MAGIC[compression]):
        raise DataError(f"named {suffix}, but it is no {compression} file", where=str(path), fix="rename it")
    for name, magic in _MAGIC.items():
        if not compression and head.startswith(magic):
            ending = {"gzip": ".gz", "zstd": ".zst"}[name]
            raise DataError(f"{name}-compressed, but not named {ending}", where=str(path), fix="rename it")
    return Source(
        path=str(path),
        text=_inner_suffix(path) in _TEXT_SUFFIXES,
        compression=compression,
        size=status.st_size,
        modified=status.st_mtime_ns,
        head=hashlib.sha256(head).hexdigest(),
    )


def unreadable(path: str | Path, error: OSError) -> DataError:
    """The DataError of an input that cannot be opened or read."""
    if isinstance(error, FileNotFoundError):
        return DataError(
            "no such file", where=str(path), fix="check the path, and that nobody removes it meanwhile"
        )
    if isinstance(error, IsADirectoryError):
        return DataError("a folder, not a file", where=str(path))
    return DataError(
        f"cannot be read: {error.strerror or error}", where=str(path), fix="check its permissions"
    )


def check_unchanged(sources: Sequence[Source]) -> None:
    """DataError if an input was changed, replaced or removed since `find_sources`."""
    for source in sources:
        try:
            status = os.stat(source.path)
        except OSError as error:
            raise unreadable(source.path, error) from None
        if (status.st_size, status.st_mtime_ns) != (source.size, source.modified):
            raise DataError(
                "changed while it was being read: the tokens may be a mixture",
                where=source.path,
                fix="run again with --restart when nothing writes to it",
            )
