"""Tokenizers of folders that hold a vocabulary and no tokenizer.json: as transformers makes them of these files.

    vocab.txt                    WordPiece, nothing added behind it; tokenizer_config.json's do_lower_case, else the pieces say
    spiece.model                 SentencePiece, T5's sentinels behind it, the last one first
    tokenizer.model              SentencePiece, and what added_tokens.json lists behind it

Knows names of files and what transformers adds. Refuses additions that do not follow the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from megalith.errors import DataError
from megalith.tokenizers.base import sentinel
from megalith.tokenizers.bpe import DefinedTokenizer
from megalith.tokenizers.names import GPT_SENTENCE_PIECE, WORD_PIECE_CASE, WORD_PIECE_LOWER
from megalith.tokenizers.sentencepiece import MODEL_FILE, SentencePieceTokenizer, from_model, read_model
from megalith.tokenizers.wordpiece import BERT_ROLES, read_vocabulary, word_piece_definition

WORD_PIECES, T5_MODEL, ADDED = "vocab.txt", "spiece.model", "added_tokens.json"
VOCABULARIES = (MODEL_FILE, T5_MODEL, WORD_PIECES)
"""What such a folder is known by."""
SENTINELS = 100
"""T5's, where tokenizer_config.json does not say how many."""


def tokenizer_of_folder(
    folder: Path, settings: Mapping[str, Any], roles: Mapping[str, str]
) -> DefinedTokenizer | SentencePieceTokenizer | None:
    """The tokenizer of a folder of transformers without tokenizer.json; None where it holds no vocabulary that is known.

    `settings`: tokenizer_config.json; `roles`: special tokens that it or a person names. Errors: `DataError` for damaged files.
    """
    if (folder / T5_MODEL).is_file():
        count = settings.get("extra_ids", SENTINELS)
        behind = [sentinel(i) for i in reversed(range(count if isinstance(count, int) else SENTINELS))]
        return _of_model(folder / T5_MODEL, behind, roles)
    if (folder / MODEL_FILE).is_file():
        return _of_model(folder / MODEL_FILE, _added(folder / ADDED), roles)
    if (folder / WORD_PIECES).is_file():
        return _of_word_pieces(folder / WORD_PIECES, settings, roles)
    return None


def _of_model(path: Path, behind: list[str], roles: Mapping[str, str]) -> SentencePieceTokenizer:
    model = read_model(path)
    alone = from_model(model, type=GPT_SENTENCE_PIECE, megatron=False, where=str(path))
    known = {*alone.vocabulary, *behind}
    filled = {**alone.roles, **{role: token for role, token in roles.items() if token in known}}
    if "eos" in filled:
        filled["eod"] = filled["eos"]
    return SentencePieceTokenizer(model, filled, added=behind, type=GPT_SENTENCE_PIECE, where=str(path))


def _added(path: Path) -> list[str]:
    """Tokens of an added_tokens.json by their ids."""
    if not path.is_file():
        return []
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, int])
    except (OSError, msgspec.MsgspecError) as error:
        raise DataError(f"damaged: {error}", where=str(path), fix="restore the file") from None
    ids = sorted(found.values())
    if ids and ids != list(range(ids[0], ids[0] + len(ids))):
        raise DataError("its ids do not follow on each other", where=str(path), fix="give a tokenizer.json")
    return sorted(found, key=found.__getitem__)


def _of_word_pieces(path: Path, settings: Mapping[str, Any], roles: Mapping[str, str]) -> DefinedTokenizer:
    vocabulary = read_vocabulary(path)
    lowercase = settings.get("do_lower_case")
    if not isinstance(lowercase, bool):
        lowercase = not any(piece != piece.lower() for piece in vocabulary if not piece.startswith("["))
    definition = word_piece_definition(vocabulary, lowercase=lowercase)
    filled = {**BERT_ROLES, **{role: token for role, token in roles.items() if token in vocabulary}}
    type = WORD_PIECE_LOWER if lowercase else WORD_PIECE_CASE
    return DefinedTokenizer(definition, filled, type=type, where=str(path))
