"""`PREFIX.parts`: the growing output of an unfinished run, and a journal that says how far each file of it is good.

```
plan.json                what is being made of what: a run continues only its own parts
journal.jsonl            a line a part: where in the input it ends, how long each file then is, and hashes
N.tokens                 key number N: becomes PREFIX_KEY_document.bin (_sentence)
N.lengths                int32 by item: document, or sentence
N.counts  N.hashes       int32 (items) and uint64 by document
rejected.jsonl
```
Files only grow. After a kill the last journal line whose hashes are right decides, and what lies beyond is cut off; so
nothing depends on what the system had written when it went down. Data reach the disk every 30 s and at publication.

Knows offsets and hashes. Refuses to know what a token, a line or a reason is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from megalith.data.preprocess.feed import Position
from megalith.data.preprocess.files import cannot_write, write_all, writing
from megalith.errors import DataError

try:
    import fcntl
except ImportError:  # no locks on this system
    fcntl = None  # type: ignore[assignment]

FORMAT_VERSION = 2
_SYNC_SECONDS = 30.0
_READ_BYTES = 8 << 20
_PUSHED_BYTES = 8 << 20
_OVERVIEW = (
    "tokenizer",
    "keys",
    "append_eod",
    "implementation",
    "txt_documents",
    "split_sentences",
    "format_version",
)


class FileState(msgspec.Struct, array_like=True):
    """How long a file is, and the SHA-256 (hex) of that."""

    length: int
    sha256: str


class Commit(msgspec.Struct):
    """The end of a part: everything before `offset` of `source` is in the files, up to these lengths.

    `line` counts the lines of the current source, `lines` those of all; `empty` the empty documents by key.
    """

    part: int = 0
    source: int = 0
    offset: int = 0
    line: int = 0
    lines: int = 0
    blank: int = 0
    rejected: int = 0
    empty: list[int] = []
    files: dict[str, FileState] = {}
    publishing: bool = False


class _Log:
    """A file that only grows, with a running hash."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.length = 0
        self.digest = hashlib.sha256()
        self._on_its_way = 0
        with writing(path):
            self.handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_CREAT, 0o666)

    def append(self, data: memoryview | bytes) -> None:
        self.length += write_all(self.handle, data, self.path)
        self.digest.update(data)
        if self.length - self._on_its_way >= _PUSHED_BYTES:
            self._push()

    def _push(self) -> None:
        """Let the system begin to write, so that little is left to wait for at the end.

        That is what "not needed" does to pages that are not on the disk yet; they stay in memory.
        """
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(
                self.handle, self._on_its_way, self.length - self._on_its_way, os.POSIX_FADV_DONTNEED
            )
        self._on_its_way = self.length

    def cut(self, length: int) -> None:
        with writing(self.path):
            os.ftruncate(self.handle, length)
            os.lseek(self.handle, length, os.SEEK_SET)
        self.length = self._on_its_way = length

    def state(self) -> FileState:
        return FileState(self.length, self.digest.hexdigest())


class Store:
    """The parts folder of one run, open for writing. `state` is the last commit.

    `finals` are where the tokens of each key go in the end: a run killed while publishing has moved some there already.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Any], finals: list[Path], *, restart: bool) -> None:
        self.folder = folder
        self.state = Commit(empty=[0] * len(finals))
        self._finals = {f"{number}.tokens": path for number, path in enumerate(finals)}
        self._names = ["rejected.jsonl"]
        for number in range(len(finals)):
            self._names += [f"{number}.tokens", f"{number}.lengths"]
            self._names += [f"{number}.counts", f"{number}.hashes"]
        self._files: dict[str, _Log] = {}
        self._journal: _Log | None = None
        self._held: list[bytes] | None = []
        self._lock: int | None = None
        self._last_sync = time.monotonic()
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        try:
            self._begin(plan, restart)
        except BaseException:
            self.close()
            raise
        self.resumed_parts = self.state.part

    def _begin(self, plan: Mapping[str, Any], restart: bool) -> None:
        found = self._read_plan()
        wanted = msgspec.json.decode(msgspec.json.encode({**plan, "format_version": FORMAT_VERSION}))
        if found is not None and found != wanted and not restart:
            raise _other_run(self.folder, found, wanted)
        if found != wanted or restart:
            self._clear()
            path = self.folder / "plan.json"
            with writing(path):
                partial = path.with_suffix(".partial")
                partial.write_bytes(msgspec.json.format(msgspec.json.encode(wanted), indent=1))
                partial.replace(path)
        self._recover()

    def _take_lock(self) -> None:
        path = self.folder / "lock"
        with writing(path):
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if fcntl is None:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise DataError(
                "another process is preprocessing to this prefix",
                where=str(self.folder),
                fix="wait for it, or choose another --output-prefix",
            ) from None
        except OSError:
            return  # some network file systems have no locks: then nobody is stopped

    def _read_plan(self) -> dict[str, Any] | None:
        try:
            return msgspec.json.decode((self.folder / "plan.json").read_bytes())
        except FileNotFoundError:
            return None
        except (msgspec.DecodeError, UnicodeDecodeError):
            return {}
        except OSError as error:
            raise cannot_write(self.folder, error) from None

    def _clear(self) -> None:
        with writing(self.folder):
            for path in self.folder.iterdir():
                if path.name != "lock":
                    path.unlink()

    def _recover(self) -> None:
        """Hash everything again up to each commit, keep the last one that is right, cut the rest off."""
        self._journal = _Log(self.folder / "journal.jsonl")
        readers = {name: _Reader(self._existing(name)) for name in self._names}
        digests = {name: hashlib.sha256() for name in self._names}
        good = 0
        for end, commit in _commits(self._journal.path):
            if commit.files.keys() != readers.keys():
                break
            if not all(readers[name].reaches(state) for name, state in commit.files.items()):
                break
            good, self.state = end, commit
            digests = {name: reader.digest.copy() for name, reader in readers.items()}
        for reader in readers.values():
            reader.close()
        self._journal.cut(good)
        for name in self._names:
            if self.state.publishing and self._existing(name) != self.folder / name:
                continue
            log = self._files[name] = _Log(self.folder / name)
            log.cut(self.state.files[name].length if good else 0)
            log.digest = digests[name]
        for spill in self.folder.glob("spill-*"):
            spill.unlink()

    def _existing(self, name: str) -> Path:
        """Where a file is: in the folder, or at its final place already."""
        path = self.folder / name
        return path if path.exists() else self._finals.get(name, path)

    @property
    def position(self) -> Position:
        return Position(self.state.source, self.state.offset)

    def append(
        self,
        key: int,
        tokens: npt.NDArray,
        lengths: npt.NDArray[np.int32],
        counts: npt.NDArray[np.int32],
        hashes: npt.NDArray[np.uint64],
    ) -> None:
        """Add tokens, and the items and documents that end in them."""
        columns = {"tokens": tokens, "lengths": lengths, "counts": counts, "hashes": hashes}
        for name, column in columns.items():
            if len(column):
                self._files[f"{key}.{name}"].append(column.data.cast("B"))

    def reject(self, lines: bytes, count: int) -> None:
        self._files["rejected.jsonl"].append(lines)
        self.state.rejected += count

    def commit(self) -> None:
        """Note in the journal that the files are good as they are now, at `state`'s position."""
        self.state.part += 1
        self._write_commit()
        if time.monotonic() - self._last_sync > _SYNC_SECONDS:
            self.sync()

    def _write_commit(self) -> None:
        self.state.files = {name: log.state() for name, log in self._files.items()}
        line = msgspec.json.encode(self.state) + b"\n"
        if self._held is None:
            self._open_journal().append(line)
        else:
            self._held.append(line)

    def trust(self) -> None:
        """The encoder was found right: what was made so far counts. Until then a kill forgets it."""
        held, self._held = self._held, None
        if held:
            self._open_journal().append(b"".join(held))

    def _open_journal(self) -> _Log:
        assert self._journal is not None
        return self._journal

    def sync(self) -> None:
        """Bring everything to the disk, the journal last."""
        for log in (*self._files.values(), self._open_journal()):
            with writing(log.path):
                os.fsync(log.handle)
        self._last_sync = time.monotonic()

    def begin_publishing(self) -> None:
        """From here on the tokens may be found under their final names."""
        self.trust()
        if not self.state.publishing:
            self.state.publishing = True
            self._write_commit()
            self.sync()

    def path(self, name: str) -> Path:
        return self.folder / name

    def remove(self) -> None:
        """All is published: the folder goes, its plan first, so that a kill leaves nothing that looks unfinished."""
        with suppress(FileNotFoundError):
            (self.folder / "plan.json").unlink()
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        for log in (*self._files.values(), *([self._journal] if self._journal else [])):
            os.close(log.handle)
        self._files, self._journal = {}, None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class _Reader:
    """Goes through a file from its start, hashing."""

    def __init__(self, path: Path) -> None:
        self.digest = hashlib.sha256()
        self._done = 0
        self._file = path.open("rb", buffering=0) if path.exists() else None

    def reaches(self, state: FileState) -> bool:
        """Read up to a state; whether the file holds what it says."""
        while self._done < state.length:
            data = self._file.read(min(state.length - self._done, _READ_BYTES)) if self._file else b""
            if not data:
                return False
            self.digest.update(data)
            self._done += len(data)
        return self.digest.hexdigest() == state.sha256

    def close(self) -> None:
        if self._file:
            self._file.close()


def _commits(path: Path) -> Iterator[tuple[int, Commit]]:
    """Commits of a journal, each with the offset behind its line; stops at the first torn or damaged line."""
    decoder = msgspec.json.Decoder(Commit)
    end = 0
    with path.open("rb") as file:
        for line in file:
            end += len(line)
            if not line.endswith(b"\n"):
                return
            try:
                yield end, decoder.decode(line)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                return


def _other_run(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> DataError:
    different = [name for name in _OVERVIEW if found.get(name) != wanted.get(name)]
    if found.get("sources") != wanted["sources"]:
        different.append("the inputs (files, sizes, times or first bytes)")
    return DataError(
        "holds the unfinished parts of another run; different here: " + ", ".join(different),
        where=str(folder),
        fix="repeat that run's command to finish it, or add --restart to throw its parts away and start over",
    )
