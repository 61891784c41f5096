"""What a BERT is: the fields of `ModelConfig`, and token types and heads.

Two wirings: Megatron's (`pre_ln`, a norm behind the last block) and the original (`post_ln`, a norm behind the embedding).
Makes no layer and never imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from megalith.config.schema import error, setting
from megalith.errors import Problem
from megalith.models.config import ModelConfig


class BertConfig(ModelConfig):
    """The architecture of a bidirectional encoder. Every field is stored with the weights."""

    max_position_embeddings: int = setting(
        512,
        "Rows of the learned position table; other position types: the length trained on.",
        unit="tokens",
        gt=0,
    )
    bert_binary_head: bool = setting(
        True, "A pooler and a head with two answers: which half of the text comes first."
    )
    num_tokentypes: int | None = setting(
        None, "Token types that the embedding knows; null: 2 with bert_binary_head, else 0.", ge=0
    )
    lm_head_activation: Literal["gelu_erf", "gelu_tanh", "relu", "silu"] = setting(
        "gelu_erf",
        "Activation of the layer before the token table; Megatron's is the exact GELU, whatever `activation`.",
    )

    def impossible(self) -> Iterator[Problem]:
        """Every combination of fields that cannot be built, each with what would be legal."""
        yield from super().impossible()
        if self.bert_binary_head and self.token_types == 1:
            yield error(
                "num_tokentypes",
                "1 cannot tell apart the two halves of a text, whose order bert_binary_head guesses",
                "2 or more, 0 for none, or bert_binary_head false",
            )

    @property
    def token_types(self) -> int:
        """Rows of the token type table; 0: none."""
        return (2 if self.bert_binary_head else 0) if self.num_tokentypes is None else self.num_tokentypes

    def written_out(self) -> dict[str, Any]:
        """The fields that may be null, with what null stands for."""
        return {**super().written_out(), "num_tokentypes": self.token_types}

    def count_parameters(self, rows: int) -> int:
        """How many numbers the model learns, with so many rows of the token table."""
        width = self.hidden_size
        dense = width * (width + 1)
        embedding = self._norm if self.transformer_block_type == "post_ln" else 0
        pooled = dense + 2 * (width + 1) if self.bert_binary_head else 0
        heads = dense + self._norm + rows + pooled
        return super().count_parameters(rows) + embedding + self.token_types * width + heads
