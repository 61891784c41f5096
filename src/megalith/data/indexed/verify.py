"""Reads every byte of a pair of token files and says everything that is wrong with it, in constant memory.

```
.idx ─ parse ─ sizes ≥ 0 · offsets follow sizes · documents rise from 0 to n ─┐
.bin ─ one pass: SHA-256 · every id in the vocabulary                         ├─▶ Report(problems, notes)
.meta.json ─ counts and hashes agree · documents end with eod                 ┘
```
Knows the files and their side-car. Refuses to judge the text.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megalith.data.indexed.format import Index, as_prefix, bin_path, existing_prefix, idx_path
from megalith.data.indexed.mmap import read_index
from megalith.data.indexed.sidecar import SideCar, read_side_car
from megalith.errors import DataError

_CHUNK_ITEMS = 1 << 20
_CHUNK_BYTES = 8 << 20

Progress = Callable[[int], None]
"""Called with the number of bytes read since the last call."""


@dataclass
class Report:
    """What `verify` found. Whole if `problems` is empty; `notes` say what could not be checked."""

    prefix: Path
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    items: int = 0
    documents: int = 0
    tokens: int = 0


def verify(
    prefix: str | os.PathLike[str], *, vocab_size: int | None = None, progress: Progress = lambda count: None
) -> Report:
    """Check a pair and its side-car. `vocab_size` overrides the side-car's; DataError where neither file exists."""
    report = Report(_located(prefix))
    side_car = _side_car(report)
    index = _index(report)
    if index is not None:
        report.items, report.documents = len(index.sizes), max(len(index.documents) - 1, 0)
        report.problems += structure_problems(index, bin_path(report.prefix))
    if side_car is not None and vocab_size is None and side_car.tokenizer is not None:
        vocab_size = side_car.tokenizer.vocab_size
    if vocab_size is None:
        report.notes.append("token ids were not checked against a vocabulary: its size is not known")
    digest = _scan_tokens(report, index, vocab_size, progress)
    if side_car is not None:
        _compare(report, side_car, index, digest)
        if index is not None and not report.problems:
            _check_ends_with_eod(report, side_car, index)
    return report


def _located(name: str | os.PathLike[str]) -> Path:
    """The prefix if at least one file of the pair exists: the other's absence is a finding."""
    prefix = as_prefix(name)
    if prefix.name and (bin_path(prefix).is_file() or idx_path(prefix).is_file()):
        return prefix
    return existing_prefix(name)


def _side_car(report: Report) -> SideCar | None:
    try:
        side_car = read_side_car(report.prefix)
    except DataError as error:
        report.problems.append(str(error.problem))
        return None
    if side_car is None:
        report.notes.append("there is no side-car (.meta.json): content and tokenizer were not compared")
    return side_car


def _index(report: Report) -> Index | None:
    path = idx_path(report.prefix)
    if not path.is_file():
        report.problems.append(f"{path}: missing")
        return None
    try:
        return read_index(path)
    except (DataError, OSError) as error:
        report.problems.append(str(error.problem) if isinstance(error, DataError) else f"{path}: {error}")
        return None


def structure_problems(index: Index, binary: Path) -> list[str]:
    """Every contradiction inside an index, and between it and the length of `.bin`."""
    total, problems = _sizes_and_offsets(index)
    problems += _documents(index)
    if binary.is_file():
        expected, found = total * index.dtype.itemsize, binary.stat().st_size
        if found < expected:
            problems.append(f"{binary}: truncated by {expected - found} bytes of {expected}")
        elif found > expected:
            problems.append(f"{binary}: {found - expected} bytes longer than its items")
    return problems


def _sizes_and_offsets(index: Index) -> tuple[int, list[str]]:
    """Sum of the sizes in tokens, and the problems of sizes and offsets (first place and count of each kind)."""
    negative, misplaced = (
        _Findings("items have a negative length"),
        _Findings("items are not where they should"),
    )
    end = 0
    for start in range(0, len(index.sizes), _CHUNK_ITEMS):
        sizes = index.sizes[start : start + _CHUNK_ITEMS].astype(np.int64)
        ends = end + np.cumsum(sizes)
        negative.add(sizes < 0, start)
        expected = (ends - sizes) * index.dtype.itemsize
        misplaced.add(index.pointers[start : start + _CHUNK_ITEMS] != expected, start)
        end = int(ends[-1])
    return end, [*negative.lines("item"), *misplaced.lines("item")]


def _documents(index: Index) -> list[str]:
    ends, items = index.documents, len(index.sizes)
    problems = []
    if len(ends) and int(ends[0]) != 0:
        problems.append(f"the document index begins with {ends[0]}, not 0")
    if (int(ends[-1]) if len(ends) else 0) != items:
        problems.append(f"the document index ends with {ends[-1] if len(ends) else 'nothing'}, not {items}")
    falling = _Findings("document boundaries lie before the one in front of them")
    for start in range(1, len(ends), _CHUNK_ITEMS):
        chunk = ends[start - 1 : start + _CHUNK_ITEMS]
        falling.add(np.diff(chunk) < 0, start - 1)
    return problems + falling.lines("document")


class _Findings:
    """Counts places where something is wrong and remembers the first."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.count = 0
        self.first: int | None = None

    def add(self, wrong: npt.NDArray[np.bool_], start: int) -> None:
        places = np.flatnonzero(wrong)
        if len(places) and self.first is None:
            self.first = start + int(places[0])
        self.count += len(places)

    def lines(self, unit: str) -> list[str]:
        return [f"{self.count} {self.what}; the first is {unit} {self.first}"] if self.count else []


def _scan_tokens(report: Report, index: Index | None, vocab_size: int | None, progress: Progress) -> str:
    """One pass over `.bin`: its SHA-256 (hex), and ids outside the vocabulary as problems."""
    path = bin_path(report.prefix)
    if not path.is_file():
        report.problems.append(f"{path}: missing")
        return ""
    try:
        return _scan(report, index, vocab_size, progress)
    except OSError as error:
        report.problems.append(f"{path}: cannot be read: {error.strerror or error}")
        return ""


def _scan(report: Report, index: Index | None, vocab_size: int | None, progress: Progress) -> str:
    path = bin_path(report.prefix)
    outside = _Findings(f"token ids are outside the vocabulary of {vocab_size}")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        start = 0
        while data := file.read(_CHUNK_BYTES):
            digest.update(data)
            progress(len(data))
            if index is not None:
                width = index.dtype.itemsize
                tokens = np.frombuffer(data[: len(data) // width * width], index.dtype)
                wrong = _outside(tokens, vocab_size)
                if wrong is not None:
                    outside.add(wrong, start)
                start += len(tokens)
    report.tokens = start
    if outside.first is not None and index is not None:
        item = int(np.searchsorted(index.pointers, outside.first * index.dtype.itemsize, side="right")) - 1
        report.problems.append(f"{outside.count} {outside.what}; the first is in item {item}")
    return digest.hexdigest()


def _outside(tokens: npt.NDArray, vocab_size: int | None) -> npt.NDArray[np.bool_] | None:
    """Where ids are negative or too large; None (nothing allocated) where all are right."""
    if not len(tokens) or vocab_size is None:
        return None
    if int(tokens.min()) >= 0 and int(tokens.max()) < vocab_size:
        return None
    wide = tokens.astype(np.int64)
    return (wide < 0) | (wide >= vocab_size)


def _compare(report: Report, side_car: SideCar, index: Index | None, digest: str) -> None:
    """Counts and hashes of the side-car against the files."""
    for name in ("items", "documents", "tokens") if index is not None else ():
        noted, found = getattr(side_car, name), getattr(report, name)
        if noted != found:
            report.problems.append(f"the side-car says {noted} {name}, the files hold {found}")
    if digest and digest != side_car.content.bin_sha256:
        report.problems.append(
            f"{bin_path(report.prefix)}: its content is not what was written (SHA-256 differs)"
        )
    path = idx_path(report.prefix)
    if path.is_file():
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != side_car.content.idx_sha256:
                report.problems.append(f"{path}: its content is not what was written (SHA-256 differs)")


def _check_ends_with_eod(report: Report, side_car: SideCar, index: Index) -> None:
    """With `append_eod`, the last token of every document is the end-of-document id."""
    eod = side_car.tokenizer.eod if side_car.tokenizer is not None else None
    if not side_car.append_eod or eod is None or not report.tokens:
        return
    tokens = np.memmap(bin_path(report.prefix), dtype=index.dtype, mode="r")
    missing = _Findings(f"documents do not end with the end-of-document id {eod}")
    for start in range(1, len(index.documents), _CHUNK_ITEMS):
        last = index.documents[start : start + _CHUNK_ITEMS] - 1
        stops = index.pointers[last] // index.dtype.itemsize + index.sizes[last]
        missing.add(tokens[np.maximum(stops - 1, 0)] != eod, start - 1)
    report.problems += missing.lines("document")
