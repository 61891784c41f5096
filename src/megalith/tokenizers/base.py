"""What every tokenizer can do, whatever its family.

Knows ids and text. Refuses to know files, configs and corpora.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import count, takewhile
from pathlib import Path
from typing import Protocol, runtime_checkable

END_OF_TEXT = "<|endoftext|>"
ROLES = ("eod", "bos", "eos", "pad", "unk", "cls", "sep", "mask")
"""What a special token can be for. `eod` ends a document in a pretraining corpus."""


def sentinel(number: int) -> str:
    """T5's placeholder of a span that was cut out."""
    return f"<extra_id_{number}>"


class SpecialIds:
    """The id of each role as an attribute, None where the tokenizer has no such token."""

    @property
    def special(self) -> Mapping[str, int]:
        raise NotImplementedError

    @property
    def vocabulary(self) -> Mapping[str, int]:
        raise NotImplementedError

    @property
    def eod(self) -> int | None:
        return self.special.get("eod")

    @property
    def bos(self) -> int | None:
        return self.special.get("bos")

    @property
    def eos(self) -> int | None:
        return self.special.get("eos")

    @property
    def pad(self) -> int | None:
        return self.special.get("pad")

    @property
    def unk(self) -> int | None:
        return self.special.get("unk")

    @property
    def cls(self) -> int | None:
        return self.special.get("cls")

    @property
    def sep(self) -> int | None:
        return self.special.get("sep")

    @property
    def mask(self) -> int | None:
        return self.special.get("mask")

    @cached_property
    def sentinels(self) -> tuple[int, ...]:
        """Ids of `<extra_id_0>`, `<extra_id_1>`, …: in this order, whatever the order of the ids."""
        names = takewhile(self.vocabulary.__contains__, map(sentinel, count()))
        return tuple(self.vocabulary[name] for name in names)

    @property
    def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (), ()


@runtime_checkable
class Tokenizer(Protocol):
    """Text ↔ ids. Special tokens are ids that code inserts: they are never parsed out of text."""

    @property
    def type(self) -> str:
        """Megatron's name of the family, `GPT2BPETokenizer` say."""
        ...

    @property
    def vocab_size(self) -> int:
        """True size: largest id + 1, without padding."""
        ...

    @property
    def special(self) -> Mapping[str, int]:
        """Id of each role of `ROLES` that this tokenizer fills."""
        ...

    @property
    def eod(self) -> int | None: ...
    @property
    def bos(self) -> int | None: ...
    @property
    def eos(self) -> int | None: ...
    @property
    def pad(self) -> int | None: ...
    @property
    def unk(self) -> int | None: ...
    @property
    def cls(self) -> int | None: ...
    @property
    def sep(self) -> int | None: ...
    @property
    def mask(self) -> int | None: ...

    @property
    def sentinels(self) -> tuple[int, ...]:
        """Ids of T5's `<extra_id_0>`, `<extra_id_1>`, …; none where the vocabulary has none."""
        ...

    @property
    def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids that its definition puts before and behind a text that a model is given, as `transformers` does."""
        ...

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """Every piece and its id."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no special token is added, none is recognised in the text."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def encode_from(self, text: str, place: int) -> tuple[list[int], int]:
        """Ids of a text, and the number of the first that holds something of `text[place:]`; a token across counts as that."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens written out; DataError for an id outside the vocabulary."""
        ...

    def piece(self, id: int) -> str:
        """The vocabulary entry of an id as the vocabulary writes it (`Ġthe`)."""
        ...

    def hash(self) -> str:
        """SHA-256 (hex) of what maps text to ids: equal for the same tokenizer stored in different files."""
        ...

    def save(self, folder: Path) -> None:
        """Write a folder that `load_tokenizer` reads back to an equal tokenizer."""
        ...
