"""Keeps built index arrays on disk, so that the processes of one machine share them and the next start is instant.

```
key (index hash, split, seed, length, samples, algorithm, epoch)
    ─▶ FOLDER/NAME.<digest of the key>.index/ {documents,samples,shuffle}.npy + key.json (shapes, dtypes, CRC-32)
                                              (a file for each array of the index's dataclass)
```
An entry is written to a folder of its own and renamed, so a reader sees all of it or nothing, and two processes that
build the same entry at once do not disturb each other: the second one throws its own away. Nothing is shared but
files, nobody waits for anybody: a machine without a shared disk builds its own.

The folders are tried in order: `index_mapping_dir` where given, else beside the data; then the user's cache folder;
then memory, with a notice. An index too small to be worth a file is only kept in memory. A damaged entry is rebuilt,
with a notice. Knows names, bytes and folders. Refuses to know how an index is made.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megalith.data.index import GPTIndex

Notice = Callable[[str], None]
Key = Mapping[str, str | int]
Index = TypeVar("Index")
"""A dataclass of arrays."""

SMALLEST = 1 << 20
"""Rows (items plus samples) below which building takes less than opening files would."""

_DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError)
"""What reading a file that does not hold what was written can raise."""


def no_notice(_: str) -> None:
    """For callers who want no notices."""


@dataclass
class IndexCache:
    """Where entries are looked for and written. `folders` first to last; `smallest` in rows (items plus samples)."""

    folders: list[Path]
    notice: Notice = no_notice
    smallest: int = SMALLEST
    _noticed: set[str] = field(default_factory=set, repr=False)

    def get(
        self,
        name: str,
        key: Key,
        rows: int,
        build: Callable[[], Index],
        *,
        kind: type[Index] = GPTIndex,  # type: ignore[assignment]  # the default goes with builders of it
    ) -> Index:
        """The index of `key`, from disk or by `build`. `name` is for people; `rows` decides whether disk is worth it."""
        if rows < self.smallest:
            return build()
        entry = entry_name(name, key)
        for folder in self.folders:
            found = self._read(folder / entry, key, kind)
            if found is not None:
                return found
        index = build()
        written = self._write(entry, key, index)
        return index if written is None else written

    def _read(self, entry: Path, key: Key, kind: type[Index]) -> Index | None:
        if not entry.is_dir():
            return None
        try:
            return read_entry(entry, key, kind)
        except _DAMAGE as error:
            self._say(f"{entry}: the cached index is damaged ({error}); building it again")
            shutil.rmtree(entry, ignore_errors=True)
            return None

    def _write(self, entry: str, key: Key, index: Index) -> Index | None:
        """Write to the first folder that takes it and return the mapped arrays; None where no folder does."""
        for folder in self.folders:
            try:
                write_entry(folder / entry, key, index)
                return read_entry(folder / entry, key, type(index))
            except _DAMAGE as error:
                self._say(f"{folder}: index cache cannot be used ({error}); trying the next place")
        self._say(
            "no folder for the index cache: the index stays in memory (set model.data.index_mapping_dir)"
        )
        return None

    def _say(self, text: str) -> None:
        if text not in self._noticed:
            self._noticed.add(text)
            self.notice(text)


def cache_folders(prefix: Path, index_mapping_dir: str | None) -> list[Path]:
    """Where the index of a token file may lie: the folder asked for, else beside the data; then the user's cache."""
    first = Path(index_mapping_dir).expanduser() if index_mapping_dir else prefix.parent
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return [first, Path(home).expanduser() / "megalith" / "index"]


def entry_name(name: str, key: Key) -> str:
    """Folder name of an entry: readable first part, digest of everything the arrays depend on."""
    digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
    return f"{name}.{digest[:16]}.index"


def write_entry(entry: Path, key: Key, index: object) -> None:
    """Publish an entry by one rename. An equal entry that appeared meanwhile is left in place."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
    try:
        partial.chmod(0o755)
        record: dict[str, object] = {"key": dict(key)}
        for name in _arrays(type(index)):
            array = np.ascontiguousarray(getattr(index, name))
            np.save(partial / f"{name}.npy", array, allow_pickle=False)
            record[name] = _describe(array)
        (partial / "key.json").write_text(json.dumps(record, indent=1))
        partial.rename(entry)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if not entry.is_dir():
            raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_entry(
    entry: Path,
    key: Key,
    kind: type[Index] = GPTIndex,  # type: ignore[assignment]  # as in `get`
) -> Index:
    """Map the arrays of an entry. ValueError, KeyError or OSError where anything differs from what was written."""
    record = json.loads((entry / "key.json").read_text())
    if record["key"] != dict(key):
        raise ValueError("it belongs to another index")
    arrays = {}
    for name in _arrays(kind):
        array = np.load(entry / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        if _describe(array) != record[name]:
            raise ValueError(f"{name}.npy does not hold what was written")
        arrays[name] = array.view(np.ndarray)
    return kind(**arrays)


def _arrays(kind: type[Any]) -> list[str]:
    return [part.name for part in fields(kind)]


def _describe(array: np.ndarray) -> dict[str, object]:
    return {
        "dtype": array.dtype.str,
        "shape": list(array.shape),
        "crc32": zlib.crc32(array.reshape(-1).view(np.uint8).data),
    }
