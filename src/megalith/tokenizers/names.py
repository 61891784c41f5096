"""Names of tokenizer types and libraries, and where a tokenizer's files are, free of the config machinery.

Knows names, published ones too. Refuses to open files (`load` does); imports so little that a command line can start with it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from megalith.errors import UnsupportedError
from megalith.hub.catalogue import tokenizer_type, vocabulary_of

GPT2_BPE = "GPT2BPETokenizer"
HUGGING_FACE = "HFTokenizer"
WORD_PIECE_LOWER = "BertWordPieceLowerCase"
WORD_PIECE_CASE = "BertWordPieceCase"
SENTENCE_PIECE = "SentencePieceTokenizer"
GPT_SENTENCE_PIECE = "GPTSentencePieceTokenizer"
WORD_PIECE_TYPES = (WORD_PIECE_LOWER, WORD_PIECE_CASE)
SENTENCE_PIECE_TYPES = (SENTENCE_PIECE, GPT_SENTENCE_PIECE)
BUILT_TYPES = (GPT2_BPE, *WORD_PIECE_TYPES, *SENTENCE_PIECE_TYPES, HUGGING_FACE)
LATER_TYPES = ("NullTokenizer",)
LIBRARIES = ("megatron", "huggingface", "sentencepiece")
LATER_LIBRARIES = ("byte-level", "tabular", "yttm")
_ALIASES = {"HuggingFaceTokenizer": HUGGING_FACE}
FILE_KEYS = ("model", "vocab_file", "merge_file", "file")


class TokenizerSource(Protocol):
    """What `load_tokenizer` reads of a config section."""

    @property
    def library(self) -> str: ...
    @property
    def type(self) -> str | None: ...
    @property
    def model(self) -> str | None: ...
    @property
    def vocab_file(self) -> str | None: ...
    @property
    def merge_file(self) -> str | None: ...
    @property
    def file(self) -> str | None: ...
    @property
    def special_tokens(self) -> Mapping[str, str] | None: ...
    @property
    def num_sentinel_tokens(self) -> int | None: ...


@dataclass(frozen=True)
class TokenizerFiles:
    """The fields of `TokenizerConfig` that name files, without its checks: for commands that must start fast."""

    type: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    file: str | None = None
    model: str | None = None
    library: str = "megatron"
    special_tokens: Mapping[str, str] | None = None
    num_sentinel_tokens: int | None = None

    def located(self) -> dict[str, Any]:
        """As `TokenizerConfig.located`."""
        return absolute({key: value for key, value in asdict(self).items() if value and key != "library"})


def absolute(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with the files among them as absolute paths."""
    for key in FILE_KEYS:
        if key in values:
            values[key] = str(Path(values[key]).expanduser().resolve())
    return values


def published_name(source: TokenizerSource) -> str | None:
    """The name of a published vocabulary that stands where a file, or a type without its files, could; else None."""
    name = source.file or source.model
    if name:
        return name if vocabulary_of(name) and not Path(name).exists() else None
    if source.vocab_file or source.merge_file or not source.type:
        return None
    return source.type if vocabulary_of(source.type) else None


def known_type(name: str) -> str:
    """The canonical spelling of a type that is built; UnsupportedError for one that is not, or is not known."""
    name = _ALIASES.get(name) or tokenizer_type(name) or name
    if name in BUILT_TYPES:
        return name
    if name in LATER_TYPES:
        raise UnsupportedError(
            f"{name} is not built yet",
            where="tokenizer.type",
            fix="use one of " + ", ".join(BUILT_TYPES),
        )
    raise UnsupportedError(
        f"unknown tokenizer type {name!r}",
        where="tokenizer.type",
        fix=_nearest(name, BUILT_TYPES + LATER_TYPES),
    )


def known_library(name: str) -> str:
    """`name` if the library is built; UnsupportedError otherwise."""
    if name in LIBRARIES:
        return name
    if name in LATER_LIBRARIES:
        raise UnsupportedError(
            f"tokenizer library {name!r} is not built yet",
            where="tokenizer.library",
            fix="use one of " + ", ".join(LIBRARIES),
        )
    raise UnsupportedError(
        f"unknown tokenizer library {name!r}",
        where="tokenizer.library",
        fix=_nearest(name, LIBRARIES + LATER_LIBRARIES),
    )


def _nearest(name: str, known: tuple[str, ...]) -> str:
    folded = {candidate.lower(): candidate for candidate in known}
    near = [candidate for candidate in folded if name and candidate.startswith(name.lower())]
    near = near or difflib.get_close_matches(name.lower(), folded, n=1)
    if near:
        return f"did you mean {folded[near[0]]}?"
    return "known: " + ", ".join(known)
