"""What masks must know of a tokenizer: its special ids, and which tokens continue a word.

Knows ids. Refuses to know how text becomes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megalith.errors import ConfigError, Problem
from megalith.tokenizers.base import Tokenizer

_BEGINS = ("Ġ", "Ċ", "▁")
_NAMES = {
    "cls": "[CLS]",
    "sep": "[SEP]",
    "mask": "[MASK]",
    "bos": "begin-of-sequence",
    "eos": "end-of-sequence",
}


@dataclass(frozen=True, eq=False)
class TokenIds:
    """Special ids of a vocabulary of `size` tokens; None: it has no such token.

    `continues` bool[size]: whether a token continues the word before it (`##ing`); None: not known. `pad` only fills rows
    up, it may be any id. `sentinels` are T5's `<extra_id_0>`, `<extra_id_1>`, … in this order.
    """

    size: int
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None
    pad: int | None = None
    bos: int | None = None
    eos: int | None = None
    sentinels: Sequence[int] = ()
    continues: npt.NDArray[np.bool_] | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenIds:
        """Those of a tokenizer. A word begins with `Ġ` or `▁`, or, where more of the vocabulary marks what continues one,
        without `##`; special tokens begin one too, and all where no token is marked. (Megatron knows `##` alone: with another family it masks single tokens.)
        """
        size, special = tokenizer.vocab_size, {*tokenizer.special.values(), *tokenizer.sentinels}
        pieces = [tokenizer.piece(id) for id in range(size)]
        continues = [piece.startswith("##") for piece in pieces]
        if sum(continues) < sum(piece.startswith(_BEGINS) for piece in pieces):
            continues = [
                not piece.startswith(_BEGINS) and id not in special for id, piece in enumerate(pieces)
            ]
        roles = {role: tokenizer.special.get(role) for role in (*_NAMES, "pad")}
        return cls(size, sentinels=tokenizer.sentinels, continues=np.array(continues), **roles)

    def __getitem__(self, role: str) -> int:
        """Id of a role that the vocabulary has: `ids["mask"]`."""
        found = getattr(self, role)
        if not isinstance(found, int):
            raise KeyError(role)
        return found

    @property
    def filler(self) -> int:
        """What rows are filled up with."""
        return 0 if self.pad is None else self.pad

    def begins(self, tokens: npt.NDArray[np.int64], whole_words: bool) -> npt.NDArray[np.bool_]:
        """bool[n]: whether each token begins something that is masked as a whole. Unknown ids do; the loader refuses them."""
        if not whole_words or self.continues is None:
            return np.ones(len(tokens), np.bool_)
        begins: npt.NDArray[np.bool_] = ~np.take(self.continues, tokens, mode="clip")
        return begins

    def missing(self, roles: Sequence[str], *, family: str, whole_words: bool) -> list[Problem]:
        """A problem for what `family` needs and this vocabulary has not."""
        lacking = [_NAMES[role] for role in roles if getattr(self, role) is None]
        problems = []
        if lacking:
            problems.append(
                Problem(
                    "model.tokenizer",
                    f"has no {', '.join(lacking)} token, which {family} samples are made with",
                    "use a tokenizer that has (a WordPiece vocabulary has [CLS], [SEP] and [MASK])",
                )
            )
        if whole_words and self.continues is None:
            problems.append(
                Problem(
                    "model.data.whole_word_masking",
                    "it is not known which tokens of this tokenizer continue a word",
                    "model.data.whole_word_masking=false masks single tokens",
                )
            )
        return problems


def refuse(problems: Sequence[Problem]) -> None:
    """ConfigError with all of them, if any."""
    if problems:
        raise ConfigError(problems)


def filled(tokens: Sequence[int] | npt.NDArray, length: int, filler: int) -> npt.NDArray[np.int64]:
    """int64[length]: `tokens`, filled up."""
    row = np.full(length, filler, np.int64)
    row[: len(tokens)] = tokens
    return row
