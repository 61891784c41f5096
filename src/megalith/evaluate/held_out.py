"""The tokens that a perplexity is measured on: a split of the run's own data, token files, or a text file.

Knows data plans, token files and tokenizers. Knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megalith.data.indexed.mmap import open_indexed
from megalith.data.plan import DataPlan, Source
from megalith.errors import CheckpointError, DataError
from megalith.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class HeldOut:
    """A token stream (int64, one-dimensional) and what it is."""

    name: str
    tokens: np.ndarray


def from_plan(state: Mapping[str, Any], split: str, *, where: str) -> HeldOut:
    """The documents that the run's plan keeps for `split`, one after the other.

    Errors: `CheckpointError` when the plan has no such split, `DataError` when its files are gone or have changed.
    """
    plans = state.get("data_plan") or {}
    if split not in plans:
        known = ", ".join(plans) or "none"
        raise CheckpointError(
            f"the run has no {split} data (it has {known})",
            where=where,
            fix="name token files with --data PREFIX, or a text with --text-file FILE",
        )
    sources = DataPlan.from_json(plans[split]).sources
    return HeldOut(split, np.concatenate([source_tokens(source) for source in sources]))


def source_tokens(source: Source) -> np.ndarray:
    """All tokens of one source's range of documents."""
    indexed = open_indexed(Path(source.path))
    if indexed.content_hash() != source.idx_sha256:
        raise DataError(
            "is not the file that the run read",
            where=source.path,
            fix="put the old file back, or name another --data",
        )
    return read_items(indexed, source.first, source.last)


def read_items(indexed: Any, first: int, last: int) -> np.ndarray:
    """Items `first … last − 1` as one int64 array."""
    parts = [indexed.get(i) for i in range(first, last)]
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)


def from_files(prefix: str) -> HeldOut:
    """Everything in a pair of token files."""
    indexed = open_indexed(Path(prefix))
    return HeldOut(str(prefix), read_items(indexed, 0, len(indexed)))


def from_text(path: str, tokenizer: Tokenizer) -> HeldOut:
    """A text file as one document, behind an end of document where there is one, so that its first token counts too.

    Errors: `DataError` when it cannot be read or is not UTF-8.
    """
    start = [] if tokenizer.eod is None else [tokenizer.eod]
    return HeldOut(path, np.array(start + tokenizer.encode(read_text(path)), dtype=np.int64))


def read_text(path: str) -> str:
    """A whole file as it is, line ends included. Errors: `DataError` when it cannot be read or is not UTF-8."""
    try:
        return Path(path).expanduser().read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=path, fix="check the path") from None
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 (byte {error.start})", where=path, fix="convert it to UTF-8") from None


def text_bytes(tokens: np.ndarray, tokenizer: Tokenizer) -> int:
    """UTF-8 size of the text that the tokens after the first spell; an end of document spells nothing."""
    ids = tokens[1:]
    if tokenizer.eod is not None:
        ids = ids[ids != tokenizer.eod]
    return sum(
        len(tokenizer.decode(part.tolist()).encode()) for part in np.array_split(ids, len(ids) // 65536 + 1)
    )
