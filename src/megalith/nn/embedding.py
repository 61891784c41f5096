"""Tables looked up by token or position, and the output head.

The token table is padded: rows beyond the true vocabulary exist for divisibility only, are never looked up and never
reach a logit. Knows nothing of tying: the model hands the table to whoever needs it.

Legend: B batch, T time, D width, V true vocabulary
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megalith.errors import UnsupportedError


class TokenEmbedding(nn.Module):
    """(B, T) token ids → (B, T, D), and hidden states → logits. `weight` is (padded vocabulary, D)."""

    def __init__(self, vocabulary: int, padded: int, width: int) -> None:
        super().__init__()
        self.axes = ("vocab", "embed")
        self.vocabulary = vocabulary
        self.compute_dtype: torch.dtype | None = None
        self.weight = nn.Parameter(torch.empty(padded, width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens, self.weight)

    def logits(self, hidden: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """(…, D) → (…, V): the true vocabulary's, in the compute dtype. Padded rows are cut off before the product.

        `bias` (padded vocabulary,): a number of its own for each token (`OutputBias`).
        """
        hidden = hidden.to(self.compute_dtype or hidden.dtype)
        bias = None if bias is None else bias[: self.vocabulary].to(hidden.dtype)
        return F.linear(hidden, self.weight[: self.vocabulary].to(hidden.dtype), bias)

    def extra_repr(self) -> str:
        padded, width = self.weight.shape
        return f"{self.vocabulary} (padded to {padded}) × {width}, axes=(vocab, embed)"


class OutputHead(TokenEmbedding):
    """The table of an untied head; multiplied, never looked up, by `logits` and by the loss."""


class OutputBias(nn.Module):
    """What is added to each token's logit. `bias` is (padded vocabulary,); used by `logits` and by the loss."""

    def __init__(self, padded: int) -> None:
        super().__init__()
        self.axes = ("vocab",)
        self.bias = nn.Parameter(torch.empty(padded))

    def extra_repr(self) -> str:
        return f"{self.bias.shape[0]}, axes=(vocab)"


class PositionEmbedding(nn.Module):
    """Learned absolute positions: (T,) or (B, T) positions → (T, D) or (B, T, D)."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.axes = ("position", "embed")
        self.weight = nn.Parameter(torch.empty(length, width))

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return F.embedding(positions, self.weight)

    def check(self, end: int) -> None:
        """Errors: `UnsupportedError` when a sequence of `end` tokens would run off the table."""
        length = self.weight.shape[0]
        if end > length:
            raise UnsupportedError(
                f"a sequence of {end} tokens, but the model has {length} learned positions",
                where="model.max_position_embeddings",
                fix=f"use sequences of at most {length} tokens, or train with a longer table or rotary positions",
            )

    def extra_repr(self) -> str:
        length, width = self.weight.shape
        return f"{length} × {width}, axes=(position, embed)"


class TypeEmbedding(PositionEmbedding):
    """Learned token types (which of two texts a token is of), looked up as positions are: (B, T) → (B, T, D)."""

    def __init__(self, types: int, width: int) -> None:
        super().__init__(types, width)
        self.axes = ("types", "embed")

    def extra_repr(self) -> str:
        types, width = self.weight.shape
        return f"{types} × {width}, axes=(types, embed)"
