"""`PREFIX.meta.json`, the side-car of a pair of token files: which tokenizer made them, from what, and their hashes.

Megatron knows nothing of it and does not miss it. Training compares the tokenizer's hash with its own; `data verify`
compares the content hashes. Refuses to know how text became tokens.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from megalith.data.indexed.builder import Written, cannot_write, partial_path, sync_folder
from megalith.data.indexed.format import as_prefix, side_car_path
from megalith.errors import DataError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer that made the ids: its type, `Tokenizer.hash()`, true size, end-of-document id.

    `config` are the fields of its `TokenizerConfig` that were set, files as absolute paths, so that `data inspect` can
    find it again.
    """

    type: str
    hash: str
    vocab_size: int
    eod: int | None = None
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ContentRecord:
    """SHA-256 (hex) and length of both files."""

    bin_sha256: str
    bin_bytes: int
    idx_sha256: str
    idx_bytes: int


@dataclass(frozen=True)
class SideCar:
    """What `PREFIX.meta.json` holds. `details` is free for what the tool that made the files wants to keep."""

    tokenizer: TokenizerRecord | None
    content: ContentRecord
    items: int
    documents: int
    tokens: int
    append_eod: bool
    created_by: str
    sources: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def content_record(written: Written) -> ContentRecord:
    """The content hashes of what `IndexedWriter.finish` published."""
    return ContentRecord(written.bin_sha256, written.bin_bytes, written.idx_sha256, written.idx_bytes)


def write_side_car(prefix: str | os.PathLike[str], side_car: SideCar) -> Path:
    """Write `PREFIX.meta.json` atomically; returns its path."""
    path = side_car_path(as_prefix(prefix))
    partial = partial_path(path)
    try:
        with partial.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(side_car), indent=2) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    sync_folder(path.parent)
    return path


def read_side_car(prefix: str | os.PathLike[str]) -> SideCar | None:
    """The side-car of a pair, None where there is none; DataError where it cannot be understood."""
    path = side_car_path(as_prefix(prefix))
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    fix = "delete it to use the token files without it, or preprocess the corpus again"
    try:
        side_car = msgspec.json.decode(data, type=SideCar)
    except msgspec.MsgspecError as error:
        raise DataError(f"damaged side-car: {error}", where=str(path), fix=fix) from None
    if side_car.format_version > FORMAT_VERSION:
        raise DataError(
            f"format version {side_car.format_version}; this program knows up to {FORMAT_VERSION}",
            where=str(path),
            fix="use a newer Megalith, or delete the side-car to do without",
        )
    return side_car
