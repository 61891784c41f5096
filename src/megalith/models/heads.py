"""What stands on a model's last hidden states: BERT's layer before the token table, its pooler and its head of two answers.

Knows layers and shapes. Knows no loss and no batch.

Legend: B batch, T time, D width, N counted targets
"""

from __future__ import annotations

import torch
from torch import nn

from megalith.models.bert_config import BertConfig
from megalith.nn.linear import Linear
from megalith.nn.mlp import bend
from megalith.nn.norm import make_norm


class MaskedHead(nn.Module):
    """(…, D) → (…, D), before the product with the token table: dense, activation, norm. Sees what has a target alone."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.dense = Linear(width, width, axes=("embed", "embed"))
        self.bend = bend(config.lm_head_activation)
        self.norm = make_norm(config.normalization, width, config.layernorm_epsilon)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(self.bend(self.dense(hidden)))

    def counted(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of hidden states (B, T, D) those whose targets (B, T) are counted, (N, D), and these targets (N,)."""
        here = targets >= 0
        return hidden[here], targets[here]


class Pooler(nn.Module):
    """(B, T, D) → (B, D): one vector of a text, from its first position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = Linear(width, width, axes=("embed", "embed"))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.dense(self.first(hidden)).tanh()

    def first(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, D) → (B, D): the first position's."""
        return hidden[:, 0]


def binary_head(width: int) -> Linear:
    """(B, D) → (B, 2)."""
    return Linear(width, 2, axes=("labels", "embed"))
