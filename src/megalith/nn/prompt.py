"""Virtual tokens: ids behind the vocabulary, whose embeddings are trained for a task while the model stays as it is.

    ids      0 … V−1   V … V+P₀−1   V+P₀ … V+P₀+P₁−1   …            rows of all tables, laid behind each other
             text      tables[0]    tables[1]

    tokens ─┬─ clip ─ token table (+ places) ─ [norm] ─ drop ─▶ x ─┐
            └─ tables (+ own positions, or places) ─ [norm] ─ drop ─┴─ where(id ≥ V) ─▶ residual stream

So rows of one batch may have different prompts, or none, and everything behind the embedding sees tokens like any others.
The prompts' dropout is a place of its own. Knows ids. Knows no names of tasks, and no model.

Legend: B batch, T time, D width, P virtual tokens of a table, V true vocabulary
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from megalith.nn.dropout import SITE_PROMPT, Dropout

Table = tuple[torch.Tensor, torch.Tensor | None]
"""Tokens (P, D), and positions (P, D) where the table has its own."""
DROPOUT = 0.1
"""NeMo's rate of a prompt's dropout, whatever the model's."""


class SoftPrompt(nn.Module):
    """A trained matrix of tokens (P, D) and, with `own_positions`, one of positions that takes the place of the model's."""

    def __init__(self, length: int, width: int, *, own_positions: bool) -> None:
        super().__init__()
        self.length = length
        self.tokens = nn.Parameter(torch.empty(length, width))
        self.positions = nn.Parameter(torch.empty(length, width)) if own_positions else None

    def forward(self) -> Table:
        return self.tokens, self.positions

    def extra_repr(self) -> str:
        return " × ".join(map(str, self.tokens.shape)) + (", own positions" * (self.positions is not None))


class PromptEncoder(nn.Module):
    """p-tuning (Liu et al. 2021) as NeMo has it: a small network makes the tokens (P, D); it stands where the model's do.

    lstm: embedding (P, D) → `layers` of bidirectional LSTM, D/2 a direction → D → ReLU → D; mlp: the same without LSTM.
    It computes in its parameters' dtype.
    """

    def __init__(
        self, length: int, width: int, *, kind: Literal["lstm", "mlp"] = "lstm", layers: int = 2
    ) -> None:
        super().__init__()
        self.length = length
        self.embedding = nn.Parameter(torch.empty(length, width))
        self.lstm: nn.LSTM | None = None
        if kind == "lstm":
            self.lstm = nn.LSTM(width, width // 2, num_layers=layers, bidirectional=True)
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self) -> Table:
        x = self.embedding if self.lstm is None else self.lstm(self.embedding)[0]
        return self.outer(F.relu(self.inner(x))), None


class Prompts(nn.Module):
    """The tables of all tasks. `tables` are modules that give a `Table` and have its `length`."""

    def __init__(
        self, first_id: int, tables: Iterable[SoftPrompt | PromptEncoder], dropout: float = DROPOUT
    ) -> None:
        super().__init__()
        self.first_id = first_id
        self.tables = nn.ModuleList(tables)
        self.dropout = Dropout(dropout, SITE_PROMPT)

    def clip(self, tokens: torch.Tensor) -> torch.Tensor:
        """The ids that the token table knows; 0 in place of virtual ones."""
        return tokens.masked_fill(tokens >= self.first_id, 0)

    def here(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of the tokens (B, T) those whose rows this process holds; what a sequence-parallel swap overrides."""
        return tokens

    def forward(
        self,
        x: torch.Tensor,
        tokens: torch.Tensor,
        places: torch.Tensor | None,
        keys: torch.Tensor | None,
        norm: nn.Module | None = None,
    ) -> torch.Tensor:
        """x (B, T, D), the embedded text → the same with virtual tokens in their places; rows of text keep their bits.

        tokens (B, T) with virtual ids; places (…, T, D), the model's embeddings of positions; norm: what x went through before
        its dropout.
        """
        tokens = self.here(tokens)
        virtual = tokens >= self.first_id
        if not torch.is_grad_enabled() and not virtual.any():
            return x
        row = (tokens - self.first_id).clamp(min=0)
        table, own = self._joined()
        prompt = F.embedding(row, table)
        if places is not None and not all(own):
            lacks = ~torch.tensor(own, device=row.device)[row][..., None]
            prompt = torch.where(lacks, prompt + places, prompt) if any(own) else prompt + places
        prompt = prompt.to(x.dtype) if norm is None else norm(prompt.to(x.dtype))
        return torch.where(virtual[..., None], self.dropout(prompt, keys), x)

    def _joined(self) -> tuple[torch.Tensor, list[bool]]:
        """All tables behind each other, tokens and own positions added up; and of each row, whether it has its own."""
        rows, own = [], []
        for table in self.tables:
            tokens, positions = table()
            rows.append(tokens if positions is None else tokens + positions)
            own += [positions is not None] * len(tokens)
        return rows[0] if len(rows) == 1 else torch.cat(rows), own
