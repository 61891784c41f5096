"""Texts of input files one after another, for tools that look at text and store nothing (training a tokenizer).

Knows lines and keys. Refuses to keep more than a block or a line in memory; bad lines are counted and left out
(`data preprocess` is the one that reports each).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from megalith.data.preprocess.sources import Source
from megalith.data.preprocess.streams import ByteStream

_BLOCK_BYTES = 1 << 20


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
    for block in _blocks(source):
        for line in block.split(b"\n"):
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
    for block in _blocks(source):
        yield block.decode("utf-8", errors="replace")


def _blocks(source: Source) -> Iterator[bytes]:
    """Whole lines, about 1 MiB at a time; a longer line comes whole."""
    stream, buffer = ByteStream(source), memoryview(bytearray(_BLOCK_BYTES))
    held: list[bytes] = []
    try:
        while count := stream.fill(buffer):
            data = bytes(buffer[:count])
            end = data.rfind(b"\n") + 1
            if end:
                yield b"".join([*held, data[:end]])
                held = []
            held.append(data[end:])
    finally:
        stream.close()
    if any(held):
        yield b"".join(held)
