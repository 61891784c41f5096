"""Opens the token files that a configuration names and says what they hold, for the plan; refuses files that do not fit.

Knows side-cars and what a user may have mixed up: files of another tokenizer, splits without documents, documents without
an end. Refuses to know orders and batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megalith.data.indexed.format import bin_path
from megalith.data.indexed.mmap import IndexedDataset, open_indexed
from megalith.data.indexed.sidecar import SideCar, TokenizerRecord, read_side_car
from megalith.data.orders import Items
from megalith.data.plan import Source
from megalith.data.splits import Range
from megalith.errors import DataError
from megalith.tokenizers.base import Tokenizer

_WARM_UP_BYTES = 64 << 20


@dataclass(frozen=True)
class Vocabulary:
    """What the run's tokenizer is, as far as token files must agree with it. `Vocabulary.of(tokenizer)` makes it."""

    type: str
    hash: str
    size: int
    eod: int | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        return cls(tokenizer.type, tokenizer.hash(), tokenizer.vocab_size, tokenizer.eod)


@dataclass(frozen=True)
class OpenFile:
    """One opened pair of token files."""

    indexed: IndexedDataset
    side_car: SideCar | None
    idx_sha256: str

    @property
    def path(self) -> str:
        return str(self.indexed.prefix)

    @cached_property
    def _sizes(self) -> npt.NDArray[np.int32]:
        """A copy in memory: the file's are not aligned, which makes every pass over them slow."""
        return np.array(self.indexed.sizes, dtype=np.int32)

    def source(self, split: Range) -> Source:
        """The plan's record of items `split.first … split.last − 1`."""
        indexed = self.indexed
        return Source(
            path=self.path,
            items=len(indexed),
            tokens=indexed.num_tokens,
            idx_sha256=self.idx_sha256,
            bin_bytes=indexed.num_tokens * indexed.dtype.itemsize,
            bin_sha256=self.side_car.content.bin_sha256 if self.side_car else None,
            first=split.first,
            last=split.last,
            split_tokens=self.tokens(split),
        )

    @property
    def name(self) -> str:
        return Path(self.path).name

    def tokens(self, items: Range) -> int:
        """Tokens of some items."""
        return int(self.indexed.sizes[items.first : items.last].sum(dtype=np.int64))

    def items(self, items: Range, split: str) -> Items:
        """The lengths that an order is made of."""
        sizes = np.ascontiguousarray(self.indexed.sizes)
        if not sizes.flags.aligned:
            sizes = sizes.copy()
        return Items(sizes, items, f"{self.name}.{split}", self.idx_sha256)


class Files:
    """Opens each path once, checked against `vocabulary`. `ends_needed`: a mask looks for end-of-document tokens."""

    def __init__(
        self, vocabulary: Vocabulary | None, *, ends_needed: bool = False, warm_up: bool = False
    ) -> None:
        self._vocabulary = vocabulary
        self._ends_needed = ends_needed
        self._warm_up = warm_up
        self._open: dict[str, OpenFile] = {}

    def open(self, path: str) -> OpenFile:
        """DataError where a file is missing, damaged, or made by another tokenizer."""
        if path not in self._open:
            self._open[path] = self._opened(path)
        return self._open[path]

    def reopen(self, source: Source) -> OpenFile:
        """The file that a plan knows, wherever it was opened from; DataError where its contents have changed."""
        for file in self._open.values():
            if file.idx_sha256 == source.idx_sha256 and file.source(Range(0, 0)).same_content(source):
                return file
        file = self.open(source.path)
        if not file.source(Range(0, 0)).same_content(source):
            raise DataError(
                "is not the file that the run read", where=source.path, fix="put the old file back"
            )
        return file

    def _opened(self, path: str) -> OpenFile:
        indexed = open_indexed(Path(path).expanduser())
        side_car = read_side_car(indexed.prefix)
        if side_car is not None:
            self._check(str(indexed.prefix), side_car)
        if self._warm_up:
            read_through(bin_path(indexed.prefix))
        return OpenFile(indexed, side_car, indexed.content_hash())

    def _check(self, path: str, side_car: SideCar) -> None:
        if self._vocabulary and side_car.tokenizer:
            check_vocabulary(path, side_car.tokenizer, self._vocabulary)
        if self._ends_needed and not side_car.append_eod:
            raise DataError(
                "the documents have no end-of-document tokens, which eod_mask_loss, reset_position_ids and "
                "reset_attention_mask look for",
                where=path,
                fix="preprocess the corpus with --append-eod, or switch these keys off",
            )


def check_vocabulary(path: str, made_with: TokenizerRecord, wanted: Vocabulary) -> None:
    """DataError where the file's ids mean other tokens than the run's tokenizer says."""
    if made_with.hash == wanted.hash:
        return
    raise DataError(
        f"made with another tokenizer: {made_with.type} with {made_with.vocab_size} tokens "
        f"({made_with.hash[:12]}), the run has {wanted.type} with {wanted.size} ({wanted.hash[:12]})",
        where=path,
        fix=f"set model.tokenizer to the file's own{_as_keys(made_with)}, or preprocess the corpus with the run's "
        f"(if you know that the ids mean the same, delete {Path(path).name}.meta.json)",
    )


def _as_keys(record: TokenizerRecord) -> str:
    keys = [f"model.tokenizer.{key}={value}" for key, value in record.config.items() if value is not None]
    return f" ({' '.join(keys)})" if keys else ""


def read_through(path: Path, notice: Callable[[str], None] | None = None) -> None:
    """Read a file once from end to end, so that the system keeps it in memory."""
    if notice:
        notice(f"reading {path} into memory (model.data.skip_warmup=false)")
    buffer = bytearray(_WARM_UP_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
