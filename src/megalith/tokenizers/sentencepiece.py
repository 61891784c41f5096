"""SentencePiece: a `.model` run by its own library, and the tokens that Megatron adds behind it.

```
.model ─▶ sentencepiece: text ↔ ids of pieces      the ids are the library's by construction, whatever the text
           + <CLS> <SEP> <EOD> <MASK> <PAD> <BOS> <EOS>, those it lacks, + <extra_id_0> …
```
Knows the model file and the additions. Refuses to parse a special token out of text: where a model declares one as a
user's symbol, which the library would parse, the copy that encodes declares it a control symbol.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path

import msgspec
from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from sentencepiece.sentencepiece_pb2 import SentencePieceText

from megalith.errors import DataError
from megalith.tokenizers.base import SpecialIds, sentinel
from megalith.tokenizers.bpe import check_roles, checked_ids, notes, scalar, write_files

MODEL_FILE = "tokenizer.model"
MEGATRON_ROLES = {"cls": "<CLS>", "sep": "<SEP>", "eod": "<EOD>", "mask": "<MASK>"}
_OWN_ROLES = {"pad": "<PAD>", "bos": "<BOS>", "eos": "<EOS>"}
"""What the model fills itself, if it does, and the token that Megatron adds if it does not."""


class SentencePieceTokenizer(SpecialIds):
    """A tokenizer given by the bytes of a `.model`; `added` tokens follow its pieces, in order.

    `roles` maps a role to its token, a piece or an added one. Implements `Tokenizer`.
    """

    def __init__(
        self, model: bytes, roles: Mapping[str, str], *, added: Sequence[str] = (), type: str, where: str
    ) -> None:
        self.model = model
        self.roles = dict(roles)
        self.type = type
        self.where = where
        self._proto = _parsed(model, where)
        pieces = [piece.piece for piece in self._proto.pieces]
        known = set(pieces)
        self.added = tuple(token for token in dict.fromkeys(added) if token not in known)
        self._pieces = (*pieces, *self.added)
        self._ids = {piece: id for id, piece in enumerate(self._pieces)}
        check_roles(self.roles, self._ids, where)

    @cached_property
    def _processor(self) -> SentencePieceProcessor:
        """The library's engine, over a copy in which no special token is a symbol to be found in text."""
        special = {*self.special.values(), *self.sentinels}
        guarded = ModelProto()
        guarded.CopyFrom(self._proto)
        for id in special:
            if id < len(guarded.pieces) and guarded.pieces[id].type == ModelProto.SentencePiece.USER_DEFINED:
                guarded.pieces[id].type = ModelProto.SentencePiece.CONTROL
        try:
            return SentencePieceProcessor(model_proto=guarded.SerializeToString())
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"the sentencepiece library refuses it: {error}", where=self.where, fix="the file is damaged"
            ) from None

    def check(self) -> None:
        """DataError if the library cannot load the model."""
        self._processor  # noqa: B018

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    @property
    def vocabulary(self) -> Mapping[str, int]:
        return self._ids

    @cached_property
    def special(self) -> Mapping[str, int]:
        return {role: self._ids[token] for role, token in self.roles.items()}

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(scalar(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode([scalar(text) for text in texts], num_threads=1)

    def encode_from(self, text: str, place: int) -> tuple[list[int], int]:
        found = SentencePieceText.FromString(
            self._processor.encode(scalar(text), out_type="serialized_proto")
        )
        border = len(text[:place].encode())  # the library counts bytes
        behind = (i for i, piece in enumerate(found.pieces) if max(piece.begin + 1, piece.end) > border)
        return [piece.id for piece in found.pieces], next(behind, len(found.pieces))

    def decode(self, ids: Sequence[int]) -> str:
        """As Megatron's `detokenize`: special tokens as they are written, a space before and behind each but at the ends."""
        numbers = checked_ids(ids, self.vocab_size, self.where)
        written = {*self.special.values(), *self.sentinels, *range(len(self._proto.pieces), self.vocab_size)}
        written.discard(self._processor.unk_id())
        parts: list[str] = []
        for special, run in groupby(numbers, written.__contains__):
            ids_of_run = list(run)
            parts += map(self.piece, ids_of_run) if special else [self._processor.decode(ids_of_run)]
        return " ".join(parts)

    def piece(self, id: int) -> str:
        return self._pieces[id] if 0 <= id < len(self._pieces) else ""

    def hash(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        """Of pieces, scores, kinds, rules and additions, T5's sentinels left out: no text becomes one."""
        sentinels = {self._pieces[id] for id in self.sentinels}
        rules, trainer = self._proto.normalizer_spec, self._proto.trainer_spec
        content = {
            "pieces": [[piece.piece, piece.score, piece.type] for piece in self._proto.pieces],
            "charsmap": hashlib.sha256(rules.precompiled_charsmap).hexdigest(),
            "spaces": [rules.add_dummy_prefix, rules.remove_extra_whitespaces, rules.escape_whitespaces],
            "suffix": trainer.treat_whitespace_as_suffix,
            "model": [trainer.model_type, trainer.byte_fallback],
            "added": [token for token in self.added if token not in sentinels],
        }
        return hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()

    def save(self, folder: Path) -> None:
        """Write `tokenizer.model`, the library's own file unchanged, and `megalith_tokenizer.json`."""
        files = {MODEL_FILE: self.model, "megalith_tokenizer.json": notes(self, self.roles, added=self.added)}
        write_files(folder, files)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return _rebuild, (self.model, self.roles, self.added, self.type, self.where)

    def __repr__(self) -> str:
        return f"{self.type}(vocab_size={self.vocab_size}, hash={self.hash()[:12]})"


def sentence_piece_tokenizer(
    path: Path,
    *,
    type: str,
    megatron: bool = True,
    extra_ids: int = 0,
    roles: Mapping[str, str] | None = None,
) -> SentencePieceTokenizer:
    """Megatron's SentencePieceTokenizer, or (`megatron` False) GPTSentencePieceTokenizer: the model's ids alone, its eos
    ends a document.
    """
    return from_model(
        read_model(path), type=type, megatron=megatron, extra_ids=extra_ids, roles=roles, where=str(path)
    )


def from_model(
    model: bytes,
    *,
    type: str,
    megatron: bool = True,
    extra_ids: int = 0,
    roles: Mapping[str, str] | None = None,
    where: str,
) -> SentencePieceTokenizer:
    """The tokenizer of a model's bytes, with Megatron's additions behind its pieces if `megatron`."""
    own = _own_roles(_parsed(model, where))
    if megatron:
        filled = {**MEGATRON_ROLES, **_OWN_ROLES, **own}
        added = [*MEGATRON_ROLES.values(), *(filled[role] for role in _OWN_ROLES)]
    else:
        filled, added = {**own, **({"eod": own["eos"]} if "eos" in own else {})}, []
    tokenizer = SentencePieceTokenizer(
        model,
        {**filled, **(roles or {})},
        added=[*added, *map(sentinel, range(extra_ids))],
        type=type,
        where=where,
    )
    tokenizer.check()
    return tokenizer


def read_model(path: Path) -> bytes:
    """The bytes of a `.model`; DataError where there is none."""
    try:
        return path.expanduser().read_bytes()
    except FileNotFoundError:
        raise DataError(
            "no such file", where=str(path), fix="check the path; nothing is downloaded"
        ) from None
    except IsADirectoryError:
        raise DataError("a folder, not a file", where=str(path), fix="give the .model itself") from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from None


def _parsed(model: bytes, where: str) -> ModelProto:
    """The model's pieces and rules; DataError for a file that is something else."""
    proto = ModelProto()
    try:
        proto.ParseFromString(model)
        whole = bool(proto.pieces) and proto.IsInitialized() and all(piece.piece for piece in proto.pieces)
    except DecodeError:
        whole = False
    if not whole:
        raise DataError(
            "not a SentencePiece model" + (": it is empty" if not model else ""),
            where=where,
            fix="give the .model that SentencePiece's trainer wrote (spiece.model, tokenizer.model)",
        )
    return proto


def _own_roles(proto: ModelProto) -> dict[str, str]:
    """Tokens of the roles that the model fills: as in the library, its trainer's name for one, if that is a control symbol."""
    spec, kinds = proto.trainer_spec, ModelProto.SentencePiece
    named = {"pad": spec.pad_piece, "bos": spec.bos_piece, "eos": spec.eos_piece}
    control = {piece.piece for piece in proto.pieces if piece.type == kinds.CONTROL}
    own = {role: piece for role, piece in named.items() if piece in control}
    unknown = [piece.piece for piece in proto.pieces if piece.type == kinds.UNKNOWN]
    return {**own, "unk": unknown[0]} if unknown else own


def _rebuild(
    model: bytes, roles: Mapping[str, str], added: Sequence[str], type: str, where: str
) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(model, roles, added=added, type=type, where=where)
