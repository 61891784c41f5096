"""From a finished parts folder to published pairs, and the numbers that describe them.

```
N.lengths ─▶ PREFIX_KEY_document.idx.partial      then, each by one rename:  .bin   .idx   .meta.json
N.tokens  ───────────────────────────────────────────────────────────────────▶
```
Knows the order of publication, and how to count duplicates in bounded memory. Refuses to know text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megalith.data.indexed.builder import open_partial, sync_folder, write_index
from megalith.data.indexed.format import bin_path, idx_path, side_car_path
from megalith.data.indexed.sidecar import ContentRecord, SideCar, TokenizerRecord, write_side_car
from megalith.data.preprocess.files import writing
from megalith.data.preprocess.journal import Store

_CHUNK_ITEMS = 1 << 20
_HASHES_AT_ONCE = 16 << 20
"""128 MiB of hashes are sorted at a time; more documents are counted in several passes over their file."""


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
class EveryItem:
    """The document index where each item is a document: 0, 1, …, length − 1."""

    length: int

    def chunks(self) -> Iterator[npt.NDArray]:
        for start in range(0, self.length, _CHUNK_ITEMS):
            yield np.arange(start, min(start + _CHUNK_ITEMS, self.length), dtype="<i8")


@dataclass(frozen=True)
class KeySummary:
    """One published pair. `histogram[i]` counts documents of 2^i ≤ tokens < 2^(i+1); `duplicates` the documents whose
    tokens equal an earlier one's (by 64 bits of SHA-256).
    """

    key: str
    prefix: Path
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
        sizes = LoggedArray(store.path(f"{number}.lengths"), "<i4", summary.documents)
        write_index(idx, implementation, dtype, sizes, EveryItem(summary.documents + 1))
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
            items=summary.documents,
            documents=summary.documents,
            tokens=summary.tokens,
            append_eod=append_eod,
            created_by="megalith data preprocess",
            sources=sources,
            details=details,
        )
        write_side_car(prefix, side_car)


def summarise(store: Store, number: int, key: str, prefix: Path, itemsize: int) -> KeySummary:
    """Count what a key's files hold."""
    state = store.state.files
    documents = state[f"{number}.lengths"].length // 4
    histogram = np.zeros(32, np.int64)
    longest = 0
    for lengths in LoggedArray(store.path(f"{number}.lengths"), "<i4", documents).chunks():
        histogram += np.bincount(np.frexp(lengths)[1] - 1, minlength=32)
        longest = max(longest, int(lengths.max()))
    return KeySummary(
        key=key,
        prefix=prefix,
        documents=documents,
        tokens=state[f"{number}.tokens"].length // itemsize,
        empty=store.state.empty[number],
        duplicates=count_duplicates(LoggedArray(store.path(f"{number}.hashes"), "<u8", documents)),
        longest=longest,
        histogram=tuple(np.trim_zeros(histogram, "b").tolist()),
    )


def count_duplicates(hashes: LoggedArray, at_once: int = _HASHES_AT_ONCE) -> int:
    """How many values equal an earlier one. Sorts one range of values at a time, so that memory stays bounded."""
    passes = max(1, -(-hashes.length // at_once))
    passes = 1 << (passes - 1).bit_length()
    duplicates = 0
    for number in range(passes):
        parts = [
            chunk if passes == 1 else chunk[(chunk >> np.uint64(65 - passes.bit_length())) == number]
            for chunk in hashes.chunks()
        ]
        values = np.concatenate(parts) if parts else np.zeros(0, np.uint64)
        values.sort()
        duplicates += int(np.count_nonzero(values[1:] == values[:-1]))
    return duplicates
