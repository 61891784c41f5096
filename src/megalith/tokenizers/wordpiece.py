"""BERT's WordPiece from a vocab.txt, one piece a line, as a definition.

Knows the file and Megatron's additions: `[BOS]`, `[EOS]`, `<extra_id_0>` … behind the last line. Refuses to tokenize (`bpe`
does, as every definition).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalith.errors import DataError
from megalith.tokenizers.base import sentinel
from megalith.tokenizers.bpe import DefinedTokenizer
from megalith.tokenizers.definition import Definition, read_text, special_token, with_special_tokens
from megalith.tokenizers.names import WORD_PIECE_LOWER

UNKNOWN = "[UNK]"
BERT_ROLES = {"pad": "[PAD]", "unk": UNKNOWN, "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
"""What BERT's vocabulary must hold. It has no end-of-document token."""
MEGATRON_ROLES = {"bos": "[BOS]", "eos": "[EOS]"}
_LONGEST_WORD = 100
_SHOWN = 60


def word_piece_definition(vocabulary: Mapping[str, int], *, lowercase: bool) -> Definition:
    """BERT's scheme over a vocabulary: control characters dropped, Chinese characters and punctuation split off, accents
    dropped with the case, the longest piece first; a word of more than 100 characters is `[UNK]`, as in Hugging Face's.
    """
    normalizer: dict[str, Any] = dict.fromkeys(("clean_text", "handle_chinese_chars"), True)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special_token(token, vocabulary[token]) for token in BERT_ROLES.values()],
        "normalizer": {"type": "BertNormalizer", **normalizer, "strip_accents": None, "lowercase": lowercase},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": None,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": UNKNOWN,
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": _LONGEST_WORD,
            "vocab": dict(vocabulary),
        },
    }


def word_piece_tokenizer(
    vocab_file: Path,
    *,
    type: str,
    extra_ids: int = 0,
    roles: Mapping[str, str] | None = None,
) -> DefinedTokenizer:
    """Megatron's BertWordPieceLowerCase or BertWordPieceCase of a vocab.txt."""
    vocab_file = vocab_file.expanduser()
    found = from_vocabulary(
        read_vocabulary(vocab_file), type=type, extra_ids=extra_ids, where=str(vocab_file)
    )
    return DefinedTokenizer(
        found.definition, {**found.roles, **(roles or {})}, type=type, where=str(vocab_file)
    )


def from_vocabulary(
    vocabulary: Mapping[str, int], *, type: str, extra_ids: int = 0, where: str
) -> DefinedTokenizer:
    """The tokenizer of pieces and ids, with Megatron's additions behind them."""
    definition = word_piece_definition(vocabulary, lowercase=type == WORD_PIECE_LOWER)
    added = [*MEGATRON_ROLES.values(), *map(sentinel, range(extra_ids))]
    roles = {**BERT_ROLES, **MEGATRON_ROLES}
    return DefinedTokenizer(with_special_tokens(definition, added), roles, type=type, where=where)


def read_vocabulary(path: Path) -> dict[str, int]:
    """Pieces and ids of a vocab.txt: the id is the number of the line. Line ends may be Windows'.

    DataError lists everything that is wrong with the file.
    """
    text = read_text(path)
    if text.lstrip("\ufeff \n\r")[:1] == "{":
        fix = (
            "give it as vocab_file of GPT2BPETokenizer, or as `file` (--tokenizer) if it is a tokenizer.json"
        )
        raise DataError("JSON, not a WordPiece vocabulary", where=str(path), fix=fix)
    lines = text.removesuffix("\n").replace("\r\n", "\n").removesuffix("\r").split("\n")
    problems = _wrong_lines(lines)
    missing = [token for token in BERT_ROLES.values() if token not in set(lines)]
    if missing:
        problems.append("it has no " + ", ".join(missing))
    if problems:
        raise DataError(
            "not a BERT vocabulary: " + "; ".join(problems),
            where=str(path),
            fix="give BERT's vocab.txt as it was published: one piece a line, UTF-8 without a byte order mark",
        )
    return {piece: id for id, piece in enumerate(lines)}


def _wrong_lines(lines: list[str]) -> list[str]:
    """What makes lines no pieces, the first of each kind."""
    problems = ["it begins with a byte order mark (BOM)"] if lines[0].startswith("\ufeff") else []
    seen: dict[str, int] = {}
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            found.setdefault("empty", f"line {number} is empty")
        elif " " in line or "\t" in line or "\r" in line:
            found.setdefault("space", f"line {number} has white space inside: {line[:_SHOWN]!r}")
        elif line in seen:
            found.setdefault("twice", f"{line[:_SHOWN]!r} is on line {seen[line]} and again on line {number}")
        seen.setdefault(line, number)
    return problems + list(found.values())
