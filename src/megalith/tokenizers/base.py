"""What every tokenizer can do, whatever its family.

Knows ids and text. Refuses to know files, configs and corpora.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

END_OF_TEXT = "<|endoftext|>"
ROLES = ("eod", "bos", "eos", "pad", "unk", "cls", "sep", "mask")
"""What a special token can be for. `eod` ends a document in a pretraining corpus."""


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

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no special token is added, none is recognised in the text."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

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
