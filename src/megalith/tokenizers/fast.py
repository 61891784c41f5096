"""The fast path from corpus text to ids: another engine, trusted only after it has agreed with the reference.

```
first documents ─┬─▶ reference (`tokenizers`) ──────────────┬─ equal ─▶ FastEncoder
                 └─▶ gigatoken (BPE), or tokie (WordPiece) ─┴─ else ──▶ None and a notice: use ReferenceEncoder
```
SentencePiece needs none: its own library is fast.
Knows bytes in, ids out. Refuses to know files, JSON and workers; the encoders pickle as the definition they were built
from, so a worker can rebuild them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Protocol

import gigatoken
import msgspec
import numpy as np
import numpy.typing as npt

from megalith.tokenizers.base import END_OF_TEXT, Tokenizer
from megalith.tokenizers.bpe import DefinedTokenizer
from megalith.tokenizers.definition import corpus_definition, model_type
from megalith.tokenizers.words import TokieEncoder

_SEPARATOR = b"\xff"  # cannot occur in UTF-8
_CHECKED_BYTES = 1 << 18
_SHORT_DOCUMENT = 2048
_SINGLE_BYTES = 32 << 20

PROBES = (
    "a" + END_OF_TEXT + "b " + END_OF_TEXT,
    "It's we'll I'M  they've 12345 3.14\t\ttabs  \n\n  spaces   \r\n end ",
    "naïve Ünïcödé 中文字符 日本語 한국어 العربية हिन्दी 👩‍👩‍👧‍👦🇫🇷 ﬁ ͏\u200b\u00a0\u3000 \ufeff",
    " ", "\n", "\n\n\n", "   x", "<s></s>[CLS][PAD]<unk>",
)  # fmt: skip
"""Texts checked besides the user's: special tokens, white space, scripts."""


class Encoder(Protocol):
    """Documents as UTF-8 bytes → ids of all of them, back to back, and how many each took."""

    def encode(self, documents: Sequence[bytes]) -> tuple[npt.NDArray, npt.NDArray[np.int64]]: ...

    def reset(self) -> None:
        """Give back the memory that encoding has gathered."""
        ...


class FastEncoder(Encoder, Protocol):
    """An `Encoder` that is not the reference. `encoded_bytes` counts what it saw since the last `reset`."""

    encoded_bytes: int


class GigatokenEncoder:
    """gigatoken behind `FastEncoder`, for byte-level BPE, on the calling thread only (workers are processes).

    Its word cache grows with every new word and is never emptied: `encoded_bytes` counts what it saw since the last
    `reset`, which takes about 0.15 s for GPT-2's vocabulary.
    """

    def __init__(self, definition: bytes) -> None:
        self.definition = definition
        self.encoded_bytes = 0
        self._short_bytes = 0
        self._engine: Any = gigatoken.Tokenizer.from_json(definition)

    def encode(self, documents: Sequence[bytes]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """`ids` uint32[total], `lengths` int64[len(documents)]. The bytes must be valid UTF-8; ValueError if found not to be.

        Document by document, or where many are short, in one call: that saves 1 µs a document once the engine's array
        library is imported (0.3 s).
        """
        total = sum(map(len, documents))
        self.encoded_bytes += total
        if total < _SHORT_DOCUMENT * len(documents):
            self._short_bytes += total
            if self._short_bytes > _SINGLE_BYTES:
                return self._encode_batch(documents)
        if any(_SEPARATOR in document for document in documents):
            raise ValueError("a document is not valid UTF-8")
        rows = [self._engine.encode(document) for document in documents]
        if not rows:
            return np.empty(0, np.uint32), np.zeros(0, np.int64)
        return np.concatenate(rows), np.fromiter(map(len, rows), np.int64, len(rows))

    def _encode_batch(
        self, documents: Sequence[bytes]
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        lengths = np.zeros(len(documents), np.int64)
        full = np.flatnonzero(np.fromiter(map(len, documents), np.int64, len(documents)))
        if not len(full):
            return np.empty(0, np.uint32), lengths
        source = gigatoken.BytesSource(_SEPARATOR.join(documents), separator=_SEPARATOR)
        layout: Any = self._engine.encode_batch(source, parallel=False).layout
        ends = np.asarray(layout.offsets.data)
        if len(ends) != len(full) + 1:
            raise ValueError("a document is not valid UTF-8")
        lengths[full] = np.diff(ends)
        return np.asarray(layout.content.data)[ends[0] : ends[-1]], lengths

    def reset(self) -> None:
        del self._engine  # first, lest there be two
        self._engine = gigatoken.Tokenizer.from_json(self.definition)
        self.encoded_bytes = 0

    def __reduce__(self) -> tuple[type[GigatokenEncoder], tuple[bytes]]:
        return GigatokenEncoder, (self.definition,)


class ReferenceEncoder:
    """Any tokenizer behind `Encoder`: what fast ones fall back to, 3 to 8 MB/s a core (SentencePiece: 15 to 20)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, documents: Sequence[bytes]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """`ids` int32[total], `lengths` int64[len(documents)]; UnicodeDecodeError for bytes that are not UTF-8."""
        encoded = self.tokenizer.encode_batch([document.decode("utf-8") for document in documents])
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        ids = np.fromiter(chain.from_iterable(encoded), np.int32, int(lengths.sum()))
        return ids, lengths

    def reset(self) -> None:
        """Nothing is gathered."""


def fast_encoder(tokenizer: Tokenizer, samples: Sequence[str | bytes]) -> tuple[FastEncoder | None, str]:
    """The fast encoder of a tokenizer and "", or None and a notice that says why the reference must be used ("" where it
    is as fast).

    Checked id by id against the reference on `PROBES` and on `samples`, the user's own first documents (their first
    256 KiB).
    """
    encoder, notice = unchecked_encoder(tokenizer)
    if encoder is not None:
        notice = disagreement(encoder, tokenizer, samples)
    return (None, notice) if notice else (encoder, "")


def unchecked_encoder(tokenizer: Tokenizer) -> tuple[FastEncoder | None, str]:
    """A fast encoder that has yet to agree with the reference, or None and a notice ("" where there is nothing to gain)."""
    if not isinstance(tokenizer, DefinedTokenizer):
        return None, ""
    try:
        if model_type(tokenizer.definition) == "WordPiece":
            return TokieEncoder(tokenizer), ""
        return GigatokenEncoder(msgspec.json.encode(corpus_definition(tokenizer.definition))), ""
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of the engine is not an Exception
        return None, _cannot_run(error)


def disagreement(encoder: FastEncoder, tokenizer: Tokenizer, samples: Sequence[str | bytes]) -> str:
    """ "" if the encoder gives the reference's ids on `PROBES` and `samples`, else a notice."""
    documents = check_documents(samples)
    return difference(encoder, documents, *ReferenceEncoder(tokenizer).encode(documents))


def check_documents(samples: Sequence[str | bytes], limit: int = _CHECKED_BYTES) -> list[bytes]:
    """What the encoders are compared on: `PROBES` and the first `limit` bytes of `samples`."""
    return [text.encode() for text in PROBES] + _leading(samples, limit)


def difference(
    encoder: FastEncoder, documents: Sequence[bytes], ids: npt.NDArray, lengths: npt.NDArray[np.int64]
) -> str:
    """ "" if the encoder gives these ids, the reference's, for the documents, else a notice."""
    try:
        found = encoder.encode(documents)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of the engine is not an Exception
        return _cannot_run(error)
    for number, (own, reference) in enumerate(zip(_rows(*found), _rows(ids, lengths), strict=True)):
        if not np.array_equal(own, reference):
            text = documents[number].decode()
            return _notice(f"its ids differ from the reference's on {text[:60]!r}")
    encoder.encoded_bytes = 0
    return ""


def _cannot_run(error: BaseException) -> str:
    return _notice(f"it cannot run this tokenizer ({(str(error).splitlines() or [type(error).__name__])[0]})")


def _notice(reason: str) -> str:
    return (
        f"fast tokenizer off: {reason}. The reference is used instead: the same ids, about 30 times slower."
    )


def _leading(samples: Sequence[str | bytes], limit: int) -> list[bytes]:
    """The first documents up to `limit` bytes; a long one is cut at a character."""
    room, kept = limit, []
    for sample in samples:
        text = sample if isinstance(sample, bytes) else sample.encode()
        kept.append(text[:room].decode(errors="ignore").encode())
        room -= len(kept[-1])
        if room <= 0 or len(kept[-1]) < len(text):
            break
    return kept


def _rows(ids: npt.NDArray, lengths: npt.NDArray[np.int64]) -> list[npt.NDArray]:
    return np.split(ids, np.cumsum(lengths))[:-1]
