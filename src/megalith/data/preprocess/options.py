"""What one run of the preprocessing was asked to do, checked before anything is read.

Knows flags and their limits. Refuses to know files (`sources`) and tokenizers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from megalith.data.indexed.format import IMPLEMENTATIONS
from megalith.data.sentences import Sentences
from megalith.errors import DataError
from megalith.tokenizers.names import TokenizerFiles

BLOCK_BYTES = 4 << 20
"""How much input a worker takes at a time. Also the limit of a record that is handled whole: see `long`."""
MEMORY_BYTES = 1 << 30
TEXT_DOCUMENTS = ("file", "line", "paragraph")
_PARENT_BYTES = 120 << 20
_WORKER_BYTES = {True: 150 << 20, False: 280 << 20}
"""By whether the fast tokenizer works."""
_SMALLEST_CACHE = 32 << 20
_LARGEST_CACHE = 128 << 20
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


@dataclass(frozen=True)
class Options:
    """One run. `inputs` as typed; `sentences` how documents are split, None if each is one item; `max_rejected` a fraction of the lines; `max_memory` bytes of the process tree.

    `workers`, `block_bytes`, `max_rejected`, `max_memory` and `log_interval` never change the bytes written.
    """

    inputs: tuple[str, ...]
    output_prefix: Path
    tokenizer: TokenizerFiles
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    sentences: Sentences | None = None
    workers: int = 1
    implementation: str = "mmap"
    txt_documents: str = "file"
    max_rejected: float = 0.001
    max_memory: int = MEMORY_BYTES
    log_interval: int = 1000
    restart: bool = False
    block_bytes: int = BLOCK_BYTES
    notices: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", tuple(dict.fromkeys(self.keys)))
        self._check_names()
        if not 0 <= self.max_rejected <= 1:
            raise DataError(
                f"{self.max_rejected} is no fraction",
                where="--max-rejected",
                fix="between 0 (no bad line) and 1; 0.001 is one line in a thousand",
            )
        if self.workers < 1:
            raise DataError(f"{self.workers} workers", where="--workers", fix="one or more")
        if self.max_memory < _PARENT_BYTES + _WORKER_BYTES[False] + 2 * _SMALLEST_CACHE:
            raise DataError(
                "too little to work in", where="--max-memory", fix="512M or more; 1G is the default"
            )

    def _check_names(self) -> None:
        if self.implementation not in IMPLEMENTATIONS:
            raise DataError(
                f"unknown implementation {self.implementation!r}",
                where="--dataset-impl",
                fix="mmap, cached or lazy",
            )
        if self.txt_documents not in TEXT_DOCUMENTS:
            raise DataError(
                f"unknown unit {self.txt_documents!r}",
                where="--txt-documents",
                fix="file (each file is one document), line, or paragraph (separated by blank lines)",
            )
        if not self.inputs:
            raise DataError("nothing to read", where="--input", fix="give files, folders or patterns")
        for key in self.keys:
            if not key or "/" in key or "\0" in key:
                raise DataError(
                    f"{key!r} cannot be part of a file name", where="--json-keys", fix="rename the key"
                )
        if not self.keys:
            raise DataError("no key", where="--json-keys", fix="the default is `text`")
        if not self.output_prefix.name or self.output_prefix.is_dir():
            raise DataError(
                "a folder, not a prefix", where="--output-prefix", fix="end it with a name, say `corpus`"
            )

    def prefix(self, key: str) -> Path:
        """Prefix of the pair of a key, as Megatron names it."""
        return self.output_prefix.with_name(f"{self.output_prefix.name}_{key}_{self.unit}")

    @property
    def unit(self) -> str:
        """What an item of the output is."""
        return "sentence" if self.sentences else "document"

    @property
    def parts(self) -> Path:
        """Folder of the unfinished run."""
        return self.output_prefix.with_name(self.output_prefix.name + ".parts")

    @property
    def rejected(self) -> Path:
        return self.output_prefix.with_name(self.output_prefix.name + ".rejected.jsonl")

    def affordable_workers(self, *, fast: bool) -> int:
        """How many workers fit in `max_memory` with the smallest cache each."""
        room = self.max_memory - _PARENT_BYTES
        return max(1, min(self.workers, room // (_WORKER_BYTES[fast] + 2 * _SMALLEST_CACHE)))

    def cache_bytes(self, *, fast: bool) -> int:
        """How far the word cache of one worker may grow before it is emptied. It may just have doubled its table then."""
        room = (self.max_memory - _PARENT_BYTES) // self.affordable_workers(fast=fast) - _WORKER_BYTES[fast]
        return max(_SMALLEST_CACHE, min(room // 2, _LARGEST_CACHE))


def parse_bytes(text: str, flag: str) -> int:
    """Bytes of `1G`, `512M`, `1.5GiB`, or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise DataError(f"{text!r} is no size", where=flag, fix="a number with K, M or G, say 2G")
    return int(float(match[1]) * _UNITS[match[2]])
