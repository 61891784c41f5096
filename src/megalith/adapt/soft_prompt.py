"""Soft prompts (Lester et al. 2021) as NeMo 1.7 tunes them: a matrix of tokens and one of positions, nothing else.

    text     tokens = the token table's rows of a text's ids, clipped or tiled to P;   positions = the model's rows 0 … P−1
    random   both Xavier-normal, N(0, √(2 / (P + D)))

A model without learned positions has no matrix of them. Knows ids, no text.

Legend: D width, P virtual tokens
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from megalith.adapt.prompts import NewPrompt, Prompted, rows_of, tables_of
from megalith.models.stack import Rule
from megalith.nn.prompt import SoftPrompt
from megalith.topology.topology import Topology


class SoftPrompts(Prompted):
    """The method "soft-prompt"."""

    name = "soft-prompt"

    def table(self, prompt: NewPrompt, width: int, *, positions: bool) -> SoftPrompt:
        return SoftPrompt(prompt.length, width, own_positions=positions)

    def rules(self, prompt: NewPrompt, width: int) -> list[Rule]:
        return [("", ("normal", math.sqrt(2 / (prompt.length + width))))]

    @torch.no_grad()
    def begin(self, stages: Sequence[nn.Module], topology: Topology) -> None:
        """Prompts that begin from a text get its rows: the same numbers on every layout."""
        stage, tables = stages[0], tables_of(stages)
        for number, prompt in self.numbered if tables else ():
            if prompt.ids:
                table, places = tables[number], range(prompt.length)
                table.tokens.copy_(rows_of(stage, stage.token_embedding, tiled(prompt), topology))
                if table.positions is not None:
                    table.positions.copy_(rows_of(stage, stage.input_positions, places, topology))


def tiled(prompt: NewPrompt) -> tuple[int, ...]:
    """Its ids clipped to P, or repeated as a whole and then clipped."""
    return (prompt.ids * -(-prompt.length // len(prompt.ids)))[: prompt.length]
