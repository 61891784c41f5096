"""Texts against the length that their model knows: which ended because its position table was full, which went beyond it.

A table of learned positions ends a text. Rotary and relative positions have no end; beyond the length trained on they go on,
usually worse. Knows lengths only, no text and no decoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

from megalith.models.config import ModelConfig
from megalith.models.encdec_config import EncoderDecoderConfig


class Row(Protocol):
    """An answer: how many tokens it has with its prompt, and why it ended."""

    @property
    def length(self) -> int: ...
    @property
    def finished(self) -> str: ...


Seen = TypeVar("Seen", bound=Row)


@dataclass
class Lengths:
    """Counts the texts of a job that met the end of what `config`'s model knows."""

    config: ModelConfig
    seen: int = 0
    full: int = 0
    beyond: int = 0

    def see(self, row: Seen) -> Seen:
        """Counts a text, and returns it."""
        self.seen += 1
        self.full += row.finished == "positions"
        bounded = self.config.max_positions is not None
        self.beyond += not bounded and row.length > self.config.max_position_embeddings
        return row

    def notices(self) -> list[str]:
        """What the user should know of the texts seen; nothing when all were short enough."""
        known = self.config.max_position_embeddings
        if self.full:
            filling = "it fills" if isinstance(self.config, EncoderDecoderConfig) else "prompt and text fill"
            ends = "end" if self._several else "ends"
            return [
                f"{self._texts(self.full)} {ends} early: {filling} all {known} positions that the model has"
            ]
        if self.beyond:
            goes = "are" if self._several else "is"
            return [
                f"{self._texts(self.beyond)} {goes} longer than the {known} tokens that the model was trained on; "
                "predictions may be worse there"
            ]
        return []

    @property
    def _several(self) -> bool:
        return self.seen > 1

    def _texts(self, count: int) -> str:
        return f"{count} of {self.seen} texts" if self._several else "the text"
