"""Byte-level BPE, and any other Hugging Face `tokenizer.json`, through the `tokenizers` library: the reference.

Knows a definition and the roles of its special tokens. Refuses to know corpora and speed (`fast` does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from operator import itemgetter
from pathlib import Path
from typing import Any

import msgspec

import tokenizers
from megalith.errors import DataError
from megalith.tokenizers.base import SpecialIds, Tokenizer
from megalith.tokenizers.definition import Definition, fingerprint, guarded, vocabulary

FOLDER_VERSION = 1
TOKENIZER_FILE = "tokenizer.json"
ROLES_FILE = "megalith_tokenizer.json"


class DefinedTokenizer(SpecialIds):
    """A tokenizer given by a definition: ids equal those of `tokenizers`, special tokens in text are ordinary text.

    `roles` maps a role (`eod`, `bos`, …) to the token that fills it; each must be in the vocabulary.
    """

    def __init__(self, definition: Definition, roles: Mapping[str, str], *, type: str, where: str) -> None:
        self.definition = definition
        self.type = type
        self.where = where
        self.roles = dict(roles)
        self._ids = vocabulary(definition)
        check_roles(self.roles, self._ids, where)

    @cached_property
    def _encoder(self) -> tokenizers.Tokenizer:
        """Built on first use: loading a vocabulary for its size alone stays cheap."""
        return self._build(guarded(self.definition))

    @cached_property
    def _decoder(self) -> tokenizers.Tokenizer:
        if guarded(self.definition) is self.definition:
            return self._encoder
        return self._build(self.definition)

    def _build(self, definition: Definition) -> tokenizers.Tokenizer:
        try:
            engine = tokenizers.Tokenizer.from_str(msgspec.json.encode(definition).decode())
        except Exception as error:  # the library raises plain Exception
            raise DataError(
                f"the tokenizers library refuses it: {error}", where=self.where, fix="the file is damaged"
            ) from None
        engine.no_truncation()
        engine.no_padding()
        engine.encode_special_tokens = True
        return engine

    def check(self) -> None:
        """DataError if the definition cannot be built."""
        self._encoder  # noqa: B018

    @cached_property
    def vocab_size(self) -> int:
        return max(self._ids.values()) + 1

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """Every piece and its id."""
        return self._ids

    @cached_property
    def special(self) -> Mapping[str, int]:
        return {role: self._ids[token] for role, token in self.roles.items()}

    @cached_property
    def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids that its template (`post_processor`) puts before and behind a text; `encode` leaves them out."""
        found = self._decoder.encode("a", add_special_tokens=True)
        added = list(zip(found.ids, found.special_tokens_mask, strict=True))
        before = tuple(id for id, _ in takewhile(itemgetter(1), added))
        behind = tuple(id for id, _ in takewhile(itemgetter(1), reversed(added[len(before) :])))
        return before, behind[::-1]

    def encode(self, text: str) -> list[int]:
        return self._encoder.encode(scalar(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        rows = self._encoder.encode_batch_fast([scalar(text) for text in texts], add_special_tokens=False)
        return [row.ids for row in rows]

    def encode_from(self, text: str, place: int) -> tuple[list[int], int]:
        found = self._encoder.encode(scalar(text), add_special_tokens=False)
        behind = (i for i, (_, end) in enumerate(found.offsets) if end > place)
        return found.ids, next(behind, len(found.ids)) if place else 0

    def decode(self, ids: Sequence[int]) -> str:
        return self._decoder.decode(checked_ids(ids, self.vocab_size, self.where), skip_special_tokens=False)

    def piece(self, id: int) -> str:
        return self._pieces.get(id, "")

    @cached_property
    def _pieces(self) -> dict[int, str]:
        return {id: piece for piece, id in self._ids.items()}

    def hash(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.definition)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` (readable by Hugging Face's libraries) and `megalith_tokenizer.json` (type, roles)."""
        files = {TOKENIZER_FILE: msgspec.json.encode(self.definition), ROLES_FILE: notes(self, self.roles)}
        write_files(folder, files)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return _rebuild, (self.definition, self.roles, self.type, self.where)

    def __repr__(self) -> str:
        return f"{self.type}(vocab_size={self.vocab_size}, hash={self.hash()[:12]})"


def notes(tokenizer: Tokenizer, roles: Mapping[str, str], **more: Any) -> bytes:
    """Content of `megalith_tokenizer.json`: what a tokenizer's other files do not say."""
    content = {
        "format_version": FOLDER_VERSION,
        "type": tokenizer.type,
        "special_tokens": dict(roles),
        **more,
        "hash": tokenizer.hash(),
    }
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"


def check_roles(roles: Mapping[str, str], vocabulary: Mapping[str, int], where: str) -> None:
    """DataError for a role whose token is not in the vocabulary."""
    for role, token in roles.items():
        if token not in vocabulary:
            raise DataError(
                f"{token!r}, the {role} token, is not in the vocabulary",
                where=where,
                fix=f"name a token of the vocabulary as special_tokens.{role}",
            )


def checked_ids(ids: Sequence[int], vocab_size: int, where: str) -> list[int]:
    """The ids as plain integers; DataError for one outside the vocabulary."""
    numbers = [int(id) for id in ids]
    wrong = next((id for id in numbers if not 0 <= id < vocab_size), None)
    if wrong is not None:
        raise DataError(
            f"token id {wrong} is outside the vocabulary of {vocab_size}",
            where=where,
            fix="these ids were made by another tokenizer",
        )
    return numbers


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder, made if absent; DataError where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        raise DataError(
            f"cannot be written: {error.strerror}", where=str(folder), fix="choose another folder"
        ) from None


def _rebuild(definition: Definition, roles: Mapping[str, str], type: str, where: str) -> DefinedTokenizer:
    return DefinedTokenizer(definition, roles, type=type, where=where)


def scalar(text: str) -> str:
    """The text. Lone surrogates are no Unicode text; the engine would raise on them without saying so: DataError."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} is a lone surrogate (U+{ord(text[error.start]):04X}), which is not valid text",
            fix="decode the text again, or replace such characters",
        ) from None
    return text
