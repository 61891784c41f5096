"""The fast path of BERT's WordPiece: tokie, for the characters on which it was found to agree with `tokenizers`.

```
document ─▶ all its characters in _ALIKE? ─ yes ─▶ tokie
                                          └ no ──▶ words with others ─▶ reference, what is between ─▶ tokie
```
BERT's scheme looks at a word by itself, and a space ends a word, so that cutting there changes no id. Knows characters.
Refuses to know whether tokie is right otherwise: `fast` compares.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from megalith.tokenizers.bpe import DefinedTokenizer
from megalith.tokenizers.definition import corpus_definition

try:
    import tokie
except ImportError:  # no build of it for this system
    tokie = None

# Every code point was tried alone, between words and inside one, with either case (tests/tokenizers/test_words.py does
# it again). The two differ on 820,408 of 1,112,064: those that are unassigned or younger than either's tables.
_ALIKE = (
    (0x00, 0x7E), (0x80, 0x377), (0x384, 0x38A), (0x38E, 0x3A1), (0x3A3, 0x52F), (0x531, 0x556), (0x561, 0x587),
    (0x5D0, 0x5EA), (0x61E, 0x70D), (0x8E3, 0x983), (0xE01, 0xE3A), (0x10D0, 0x1248), (0x1E00, 0x1F15), (0x2000, 0x2064),
    (0x20A0, 0x20BE), (0x2100, 0x218B), (0x2190, 0x2429), (0x2460, 0x2B73), (0x2FF0, 0x303F), (0x3041, 0x3096),
    (0x3099, 0x30FF), (0x3131, 0x318E), (0x3220, 0xA48C), (0xAC00, 0xD7A3), (0xF900, 0xFA6D), (0xFE00, 0xFE0F),
    (0xFEFF, 0xFEFF), (0xFF01, 0xFFBE), (0xFFFD, 0xFFFD), (0x1F100, 0x1F1AD), (0x1F300, 0x1F6D7), (0x1F900, 0x1FA53),
)  # fmt: skip
_PLAIN = bytes(range(0x7F))
_OTHER = re.compile("[^" + "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in _ALIKE) + "]")


class _Part(NamedTuple):
    document: int
    text: str
    odd: bool


class TokieEncoder:
    """tokie behind `FastEncoder`, of a definition with BERT's scheme; ValueError for another. Keeps no cache."""

    def __init__(self, tokenizer: DefinedTokenizer) -> None:
        if tokie is None:
            raise ValueError("tokie is not installed: pip install tokie")
        self.encoded_bytes = 0
        self._tokenizer = tokenizer
        definition = corpus_definition(tokenizer.definition)
        kinds = [(definition.get(part) or {}).get("type") for part in ("normalizer", "pre_tokenizer")]
        if kinds != ["BertNormalizer", "BertPreTokenizer"] or definition["added_tokens"]:
            raise ValueError("its scheme is not BERT's")
        with tempfile.TemporaryDirectory() as folder:  # the engine reads files only
            path = Path(folder) / "tokenizer.json"
            path.write_bytes(msgspec.json.encode(definition))
            self._engine = tokie.Tokenizer.from_json(str(path))

    def encode(self, documents: Sequence[bytes]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """`ids` uint32[total], `lengths` int64[len(documents)]; UnicodeDecodeError for bytes that are not UTF-8."""
        self.encoded_bytes += sum(map(len, documents))
        texts = [document.decode() for document in documents]
        if any(map(_has_other, documents)):
            return self._encode_parts(texts)
        return self._encode_alike(texts)

    def _encode_alike(self, texts: list[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        ids, lengths = self._engine.encode_batch_flat(texts, False)
        return ids, lengths.astype(np.int64)

    def _encode_parts(self, texts: list[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """All parts of a kind by the engine that may have them, put together in the order of the text."""
        parts = [part for number, text in enumerate(texts) for part in _parts(number, text)]
        odd = np.array([part.odd for part in parts])
        rows = np.empty(len(parts), object)
        counts = np.zeros(len(parts), np.int64)
        for kind, encode in ((True, self._encode_odd), (False, self._encode_alike)):
            ids, counts[odd == kind] = encode([part.text for part in parts if part.odd == kind])
            for place, end in zip(np.flatnonzero(odd == kind), np.cumsum(counts[odd == kind]), strict=True):
                rows[place] = ids[end - counts[place] : end]
        lengths = np.zeros(len(texts), np.int64)
        np.add.at(lengths, [part.document for part in parts], counts)
        return np.concatenate(list(rows)), lengths

    def _encode_odd(self, words: list[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        rows = self._tokenizer.encode_batch(words)
        ids = np.array([id for row in rows for id in row], np.uint32)
        return ids, np.fromiter(map(len, rows), np.int64, len(rows))

    def reset(self) -> None:
        """Nothing is gathered."""

    def __reduce__(self) -> tuple[type[TokieEncoder], tuple[DefinedTokenizer]]:
        return TokieEncoder, (self._tokenizer,)


def _has_other(document: bytes) -> bool:
    """Whether a character is outside `_ALIKE`; ASCII is dropped before anything looks at the rest."""
    rest = document.translate(None, _PLAIN)
    return bool(rest) and _OTHER.search(rest.decode()) is not None


def _parts(number: int, text: str) -> list[_Part]:
    """The text cut around the words that hold a character outside `_ALIKE`."""
    parts, at = [], 0
    while found := _OTHER.search(text, at):
        start = max(text.rfind(" ", at, found.start()) + 1, at)
        end = text.find(" ", found.end())
        end = len(text) if end < 0 else end
        parts += [_Part(number, text[at:start], False), _Part(number, text[start:end], True)]
        at = end
    return [*parts, _Part(number, text[at:], False)]
