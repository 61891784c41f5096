"""From a finished parts folder to published pairs, and the numbers that describe them.

```
N.lengths, N.counts ─▶ PREFIX_KEY_document.idx.partial      then, each by one rename:  .bin   .idx   .meta.json
N.tokens  ─────────────────────────────────────────────────────────────────────────────▶
```
Knows the order of publication, and how to count duplicates in bounded memory. Refuses to know text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megalith.data.indexed.builder import open_partial, sync_folder, write_index
from megalith.data.indexed.format import bin_path, idx_path, side_car_path
from megalith.data.indexed.sidecar import ContentRecord, SideCar, TokenizerRecord, write_side_car
from megalith.data.preprocess.files import open_new, writing
from megalith.data.preprocess.journal import Store

_CHUNK_ITEMS = 1 << 20
_HASHES_AT_ONCE = 4 << 20
_MOST_PART_BITS = 9


@dataclass(frozen=True)
class LoggedArray:
    """A file of integers, in chunks: the sizes that `write_index` wants."""

    path: Path
    dtype: str
    length: int

    def chunks(self) -> Iterator[npt.NDArray]:
        size = np.dtype(self.dtype).itemsize
        with self.path.open("rb") as file:
            left = self.length
            while left:
                count = min(left, _CHUNK_ITEMS)
                yield np.frombuffer(file.read(count * size), self.dtype)
                left -= count


@dataclass(frozen=True)
class DocumentEnds:
    """The document index of documents with so many items each: 0, and the item behind each document's last."""

    counts: LoggedArray

    @property
    def length(self) -> int:
        return self.counts.length + 1

    def chunks(self) -> Iterator[npt.NDArray]:
        end = 0
        yield np.zeros(1, "<i8")
        for counts in self.counts.chunks():
            ends = end + np.cumsum(counts, dtype="<i8")
            yield ends
            end = int(ends[-1])


@dataclass(frozen=True)
class KeySummary:
    """One published pair; `unit` says what an item of it is: a document, or a sentence. `histogram[i]` counts items of 2^i ≤ tokens < 2^(i+1); `duplicates` the documents whose
    tokens equal an earlier one's (by 64 bits of SHA-256).
    """

    key: str
    prefix: Path
    unit: str
    items: int
    documents: int
    tokens: int
    empty: int
    duplicates: int
    longest: int
    histogram: tuple[int, ...]


def publish(
    store: Store,
    number: int,
    summary: KeySummary,
    *,
    dtype: np.dtype,
    implementation: str,
    tokenizer: TokenizerRecord,
    append_eod: bool,
    sources: list[str],
    details: dict[str, Any],
) -> None:
    """Publish key `number` of a store that is `publishing`. May be repeated after a kill at any moment."""
    prefix = summary.prefix
    state = store.state.files
    idx_target = idx_path(prefix)
    with writing(idx_target):
        idx = open_partial(idx_target)
        sizes = LoggedArray(store.path(f"{number}.lengths"), "<i4", summary.items)
        counts = LoggedArray(store.path(f"{number}.counts"), "<i4", summary.documents)
        write_index(idx, implementation, dtype, sizes, DocumentEnds(counts))
        idx_sha256 = idx.sync()
        side_car_path(prefix).unlink(missing_ok=True)
        tokens = store.path(f"{number}.tokens")
        if tokens.exists():
            idx_target.unlink(missing_ok=True)
            tokens.replace(bin_path(prefix))
        idx.path.replace(idx_target)
        sync_folder(prefix.parent)
        content = ContentRecord(
            bin_sha256=state[f"{number}.tokens"].sha256,
            bin_bytes=state[f"{number}.tokens"].length,
            idx_sha256=idx_sha256,
            idx_bytes=idx.length,
        )
        side_car = SideCar(
            tokenizer=tokenizer,
            content=content,
            items=summary.items,
            documents=summary.documents,
            tokens=summary.tokens,
            append_eod=append_eod,
            created_by="megalith data preprocess",
            sources=sources,
            details=details,
        )
        write_side_car(prefix, side_car)


def summarise(store: Store, number: int, key: str, prefix: Path, *, itemsize: int, unit: str) -> KeySummary:
    """Count what a key's files hold."""
    state = store.state.files
    items = state[f"{number}.lengths"].length // 4
    documents = state[f"{number}.counts"].length // 4
    histogram = np.zeros(32, np.int64)
    longest = 0
    for lengths in LoggedArray(store.path(f"{number}.lengths"), "<i4", items).chunks():
        histogram += np.bincount(np.frexp(lengths)[1] - 1, minlength=32)
        longest = max(longest, int(lengths.max()))
    return KeySummary(
        key=key,
        prefix=prefix,
        unit=unit,
        items=items,
        documents=documents,
        tokens=state[f"{number}.tokens"].length // itemsize,
        empty=store.state.empty[number],
        duplicates=count_duplicates(
            LoggedArray(store.path(f"{number}.hashes"), "<u8", documents), store.folder
        ),
        longest=longest,
        histogram=tuple(np.trim_zeros(histogram, "b").tolist()),
    )


def count_duplicates(hashes: LoggedArray, scratch: Path, at_once: int = _HASHES_AT_ONCE) -> int:
    """How many values equal an earlier one, with no more than a few times `at_once` of them in memory.

    More are first sorted into files in the folder `scratch` by their leading bits, which takes their size on the disk.
    """
    parts = -(-hashes.length // at_once)
    if parts <= 1:
        return hashes.length - len(_distinct(hashes.chunks(), at_once))
    bits = min((parts - 1).bit_length(), _MOST_PART_BITS)
    paths = [scratch / f"duplicates-{number}" for number in range(1 << bits)]
    distinct = 0
    try:
        _distribute(hashes.chunks(), paths, bits)
        for path in paths:
            part = LoggedArray(path, "<u8", path.stat().st_size // 8)
            distinct += len(_distinct(part.chunks(), at_once))
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
    return hashes.length - distinct


def _distribute(chunks: Iterator[npt.NDArray], paths: list[Path], bits: int) -> None:
    """Append every value to the file of its leading `bits`, values of a chunk once."""
    with ExitStack() as stack:
        files = [stack.enter_context(open_new(path)) for path in paths]
        for chunk in chunks:
            values = _unique(chunk)
            starts = np.searchsorted(
                values >> np.uint64(64 - bits), np.arange(len(files) + 1, dtype=np.uint64)
            )
            for file, path, start, end in zip(files, paths, starts, starts[1:], strict=False):
                with writing(path):
                    file.write(values[start:end].data)


def _distinct(chunks: Iterator[npt.NDArray], at_once: int) -> npt.NDArray:
    """The distinct values, gathered `at_once` at a time."""
    distinct, gathered, count = np.zeros(0, np.uint64), [], 0
    for chunk in chunks:
        gathered.append(chunk)
        count += len(chunk)
        if count >= at_once:
            distinct, gathered, count = _unique(np.concatenate([distinct, *gathered])), [], 0
    return _unique(np.concatenate([distinct, *gathered]))


def _unique(values: npt.NDArray) -> npt.NDArray:
    """Sorted, each value once. (NumPy's own goes through a hash table: ten times slower, and larger.)"""
    values = np.sort(values)
    new = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=new[1:])
    return values[new]
