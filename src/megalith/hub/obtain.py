"""From a name to files on this machine: what is there already, what a person put there, or what the network has.

    name ─ resolve ─▶ entry ─ obtain ─▶ one process at a time: fetch ─▶ checksum ─▶ its name ─▶ unpack ─▶ hub.json ─▶ path

A file has its name only when it is whole, and a folder its hub.json only when all of it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from megalith.errors import CheckpointError, DataError
from megalith.hub.catalogue import Entry, File, entry_of, vocabulary_of
from megalith.hub.fetch import CHUNK, Patience, Source, fetch, forget
from megalith.hub.store import FORMAT_VERSION, RECORD, by_hand, hub_folder, installed, offline, url_of
from megalith.hub.unpack import unpack

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

PART = ".part"
UNPACKING = ".unpacking"


def say(text: str) -> None:
    """A line on stderr; of a host's processes, one says it."""
    if all(os.environ.get(name, "0") in ("", "0") for name in ("LOCAL_RANK", "SLURM_LOCALID")):
        print(f"megalith: {text}", file=sys.stderr, flush=True)


def _no_report(file: str, done: int, total: int | None) -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class Watch:
    """Who is told: `notice` of lines worth reading, `report` of a file's bytes that have come, and of all where known."""

    notice: Callable[[str], None] = say
    report: Callable[[str, int, int | None], None] = _no_report
    patience: Patience | None = None


def resolve(path: str | Path, watch: Watch | None = None) -> Path:
    """A path as it is; where nothing lies there and it is the name of a published model, that model, fetched if need be.

    Errors: `CheckpointError` for the name of a vocabulary; those of `obtain`.
    """
    entry = entry_of(str(path))
    if entry is None or Path(path).exists():
        return Path(path)
    if entry.kind != "model":
        raise CheckpointError(
            f"{entry.name} is a vocabulary, not a model", where=str(path), fix="megalith hub list"
        )
    return obtain(entry, watch=watch)


def obtain_vocabulary(name: str | None, watch: Watch | None = None) -> None:
    """Sees to it that a published vocabulary, or that of a model, is on this machine; nothing happens for any other name."""
    entry = vocabulary_of(name) if name else None
    if entry is not None:
        obtain(entry, watch=watch)


def obtain(entry: Entry, root: Path | None = None, *, watch: Watch | None = None) -> Path:
    """What a reader is given of an entry: its folder below `root` (default: the hub's), or a file in that.

    Only one process fetches; others wait for it. A model's vocabulary comes first, and is copied beside the weights.
    Errors: `DataError` without a network, with what to fetch by hand and where to put it, and for a file whose checksum is
    not the published one, or not that of the first download: that file is removed.
    """
    root, watch = root or hub_folder(), watch or Watch()
    if (found := installed(entry, root)) is not None:
        return found
    parts = [part for part in (entry_of(entry.vocabulary), entry) if part is not None]
    for part in parts:
        folder = root / part.name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _only_one(root / f".{part.name}.lock", watch.notice) as alone:
                if installed(part, root) is None:
                    _Download(part, root, watch, alone, wanted=entry).run()
        except OSError as error:
            what = f"cannot be written: {error.strerror or error}"
            fix = "make room and see that you may write there, or name another folder with MEGALITH_HOME or --to"
            raise DataError(what, where=str(error.filename or folder), fix=fix) from None
    return root / entry.name / entry.opens


@contextmanager
def _only_one(path: Path, notice: Callable[[str], None]) -> Iterator[bool]:
    """Within, no other process of this or another host downloads the same. Yields whether the file system can promise it."""
    with open(path, "a+", encoding="utf-8") as file:
        yield fcntl is not None and _locked(file, notice)


def _locked(file: IO[str], notice: Callable[[str], None]) -> bool:
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            notice(f"another process is downloading {file.name}: waiting for it".replace(".lock", ""))
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class _Download:
    """One entry on its way into one folder. `alone`: nobody else writes there. `wanted`: what somebody asked for, with it."""

    entry: Entry
    root: Path
    watch: Watch
    alone: bool
    wanted: Entry

    @property
    def folder(self) -> Path:
        return self.root / self.entry.name

    @property
    def trusted(self) -> Path:
        """Checksums of first downloads, as sha256sum writes them."""
        return self.root / f".{self.entry.name}.sha256"

    def run(self) -> None:
        """Everything, and the record last."""
        sums = {file.name: self._get(file) for file in self.entry.files}
        kept = [file.name for file in self.entry.files if not file.is_archive]
        for file in self.entry.files:
            if file.is_archive:
                kept += self._unpack(file)
        self._trust({file.name: sums[file.name] for file in self.entry.files if file.sha256 is None})
        vocabulary = entry_of(self.entry.vocabulary)
        if vocabulary is not None:
            for file in vocabulary.files:
                shutil.copyfile(self.root / vocabulary.name / file.name, self.folder / file.name)
                kept.append(file.name)
        record = {
            "format_version": FORMAT_VERSION,
            "name": self.entry.name,
            "files": {name: (self.folder / name).stat().st_size for name in kept},
            "sha256": sums,
            "from": {file.name: url_of(self.entry, file) for file in self.entry.files},
            "config": dict(self.entry.config),
        }
        _publish(self.folder / RECORD, json.dumps(record, indent=1) + "\n")
        for file in self.entry.files:
            if file.is_archive:
                (self.folder / file.name).unlink()

    def _get(self, file: File) -> str:
        """The file under its name, and its SHA-256."""
        target = self.folder / file.name
        if target.is_file():  # a person put it there, or an earlier download ended after this one
            return self._check(file, target, remove=False)
        if variable := offline():
            raise DataError(
                f"{self.wanted.name} is not on this machine, and {variable} forbids the network",
                where=str(self.folder),
                fix=by_hand(self.wanted, self.root),
            )
        part = target.with_name(
            file.name + (PART if self.alone else f".{socket.gethostname()}.{os.getpid()}{PART}")
        )
        source = Source(
            url_of(self.entry, file),
            by_hand(self.wanted, self.root),
            room=2 if file.is_archive else 1,
            notice=self.watch.notice,
        )
        source.notice(f"{self.entry.name}: {source.url} → {target}")
        fetch(
            source, part, lambda done, total: self.watch.report(file.name, done, total), self.watch.patience
        )
        found = self._check(file, part, remove=True)
        part.replace(target)
        forget(part)
        return found

    def _check(self, file: File, path: Path, *, remove: bool) -> str:
        """SHA-256 of a file that is what was published. Errors: `DataError` where it is not."""
        found = self._digest(path, f"{file.name}: checksum")
        wanted = file.sha256 or self._trusted().get(file.name)
        if wanted is not None and found != wanted:
            who = "the published one" if file.sha256 else f"that of the first download ({self.trusted})"
            what = f"its SHA-256 is {found}, {who} is {wanted}"
            if not remove:
                raise DataError(what, where=str(path), fix="remove the file: it is another one, or damaged")
            forget(path)
            fix = "try again; a mirror (MEGALITH_HUB_URL) or a proxy may change files"
            raise DataError(f"{what}; what came was removed", where=url_of(self.entry, file), fix=fix)
        return found

    def _digest(self, path: Path, label: str) -> str:
        digest, done, size = hashlib.sha256(), 0, path.stat().st_size
        with open(path, "rb") as opened:
            while chunk := opened.read(CHUNK):
                digest.update(chunk)
                done += len(chunk)
                self.watch.report(label, done, size)
        return digest.hexdigest()

    def _trusted(self) -> dict[str, str]:
        try:
            lines = self.trusted.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return {}
        return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}

    def _trust(self, sums: dict[str, str]) -> None:
        """Keeps checksums that nobody published, of files that could be read, and says so."""
        before = self._trusted()
        for name in sums.keys() - before.keys():
            self.watch.notice(
                f"{name}: no checksum was published; its SHA-256 {sums[name]} is kept in {self.trusted}, and later "
                "downloads must have it"
            )
        if sums.keys() - before.keys():
            lines = [f"{digest}  {name}\n" for name, digest in {**sums, **before}.items()]
            _publish(self.trusted, "".join(lines))

    def _unpack(self, file: File) -> list[str]:
        """What an archive holds, moved into the folder; names there, folders apart from their files."""
        beside = self.folder / UNPACKING
        shutil.rmtree(beside, ignore_errors=True)
        try:
            report = partial(self.watch.report, f"{file.name}: unpacking")
            names = [
                str(path.relative_to(beside)) for path in unpack(self.folder / file.name, beside, report)
            ]
            for found in sorted(beside.iterdir()):
                target = self.folder / found.name
                if target.is_dir():
                    shutil.rmtree(target)
                found.replace(target)
        except DataError:
            (self.folder / file.name).unlink()
            raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return names


def _publish(path: Path, text: str) -> None:
    """Replaces a small file by one rename."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
