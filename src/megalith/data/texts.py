"""Texts of input files one after another, for tools that look at text and store nothing (training a tokenizer).

Knows the file forms that `preprocess.sources` finds. Refuses to keep more than a line or a piece in memory; bad lines
are counted and left out (`data preprocess` is the one that reports each).
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import msgspec
import zstandard

from megalith.data.preprocess.sources import Source, unreadable
from megalith.errors import DataError

_PIECE_BYTES = 1 << 20


@dataclass
class Tally:
    """What was read: documents (pieces of plain text), UTF-8 bytes of text, lines left out."""

    documents: int = 0
    bytes: int = 0
    bad_lines: int = 0


def read_texts(
    sources: Sequence[Source], key: str, tally: Tally, *, max_bytes: int | None = None
) -> Iterator[str]:
    """The `key` of each JSON line; plain text in pieces of about 1 MiB that end with a line. Stops after `max_bytes`."""
    for source in sources:
        texts = _plain(source) if source.text else _json_lines(source, key, tally)
        for text in texts:
            tally.documents += 1
            tally.bytes += len(text.encode("utf-8"))
            yield text
            if max_bytes is not None and tally.bytes >= max_bytes:
                return


def _json_lines(source: Source, key: str, tally: Tally) -> Iterator[str]:
    decoder = msgspec.json.Decoder(dict[str, Any])
    for line in _lines(source):
        if not line.strip():
            continue
        try:
            text = decoder.decode(line)[key]
        except (msgspec.MsgspecError, UnicodeDecodeError, KeyError):
            text = None
        if isinstance(text, str):
            yield text
        else:
            tally.bad_lines += 1


def _plain(source: Source) -> Iterator[str]:
    piece, size = [], 0
    for line in _lines(source):
        piece.append(line)
        size += len(line)
        if size >= _PIECE_BYTES:
            yield b"".join(piece).decode("utf-8", errors="replace")
            piece, size = [], 0
    if piece:
        yield b"".join(piece).decode("utf-8", errors="replace")


def _lines(source: Source) -> Iterator[bytes]:
    try:
        with _open(source) as file:
            yield from file
    except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
        raise DataError(
            f"truncated or damaged {source.compression} file: {error}",
            where=source.path,
            fix="copy the file again",
        ) from None
    except OSError as error:
        raise unreadable(source.path, error) from None


def _open(source: Source) -> AbstractContextManager[Iterable[bytes]]:
    if source.compression == "gzip":
        return gzip.open(source.path, "rb")
    if source.compression == "zstd":
        return io.BufferedReader(zstandard.open(source.path, "rb"), 1 << 20)
    return open(source.path, "rb")
