"""p-tuning (Liu et al. 2021) as NeMo 1.9 tunes it: a small network makes the virtual tokens; only its output is kept.

Its embedding begins random, its first rows with the token table's rows of given ids (NeMo: the task's name). Once saved, a prompt
is a matrix like any other, and stands at the model's positions. Knows no text.

Legend: D width, P virtual tokens
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from megalith.adapt.method import Tag
from megalith.adapt.prompts import NewPrompt, Prompted, rows_of, tables_of
from megalith.models.stack import Rule
from megalith.nn.prompt import DROPOUT, PromptEncoder
from megalith.topology.topology import Topology


class PTuning(Prompted):
    """The method "p-tuning". `kind` and `layers`: of the network, see `PromptEncoder`."""

    name = "p-tuning"
    new_are_matrices = False

    def __init__(
        self,
        new: Sequence[NewPrompt] = (),
        earlier: Sequence[Tag] = (),
        *,
        dropout: float = DROPOUT,
        kind: Literal["lstm", "mlp"] = "lstm",
        layers: int = 2,
    ) -> None:
        super().__init__(new, earlier, dropout=dropout)
        self.kind, self.layers = kind, layers

    def table(self, prompt: NewPrompt, width: int, *, positions: bool) -> PromptEncoder:
        return PromptEncoder(prompt.length, width, kind=self.kind, layers=self.layers)

    def rules(self, prompt: NewPrompt, width: int) -> list[Rule]:
        """The variance of torch's uniform numbers, 1 / 3·inputs; an LSTM counts its outputs."""
        return [
            ("embedding$", ("normal", 1.0)),
            (r".*bias", 0.0),
            (r"lstm\.weight", ("normal", 1 / math.sqrt(3 * (width // 2)))),
            (r"(inner|outer)\.weight$", ("normal", 1 / math.sqrt(3 * width))),
        ]

    @torch.no_grad()
    def begin(self, stages: Sequence[nn.Module], topology: Topology) -> None:
        stage, tables = stages[0], tables_of(stages)
        for number, prompt in self.numbered if tables else ():
            ids = prompt.ids[: prompt.length]
            if ids:
                rows = rows_of(stage, stage.token_embedding, ids, topology)
                tables[number].embedding[: len(ids)].copy_(rows)
