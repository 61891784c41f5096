"""What Hugging Face calls the products of a block, and how its rows lie: read off the tables that checkpoints are converted by.

    blocks.0.attention.qkv ◀─▶ model.layers.0.self_attn.q_proj, .k_proj, .v_proj   (rows woven group by group)
    blocks.0.attention.qkv ◀─▶ transformer.h.0.attn.c_attn                         (stored turned round, rows in another order)

Knows names and rows. Knows nothing of tuning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from megalith.checkpoint.formats.huggingface_export import family_of
from megalith.checkpoint.formats.huggingface_tables import TABLES
from megalith.checkpoint.mapped import Bound, bind
from megalith.checkpoint.mapping import SAME, Step, Table, Then, Transposed
from megalith.errors import CheckpointError
from megalith.models.config import ModelConfig
from megalith.models.stack import Blocks
from megalith.nn.linear import Linear


@dataclass(frozen=True)
class Spelling:
    """One product here and the modules that it is there.

    `rows`: the step between their rows, whatever the columns are; `turned`: weights are (in, out) there.
    """

    native: str
    foreign: tuple[str, ...]
    rows: Step
    turned: bool


def projections(model: nn.Module) -> dict[str, Linear]:
    """The products of all blocks by their names in the model."""
    return {
        f"{tower}.{name}" if tower else name: module
        for tower, blocks in model.named_modules()
        if isinstance(blocks, Blocks)
        for name, module in blocks.named_modules()
        if isinstance(module, Linear)
    }


def table_of(config: ModelConfig) -> Table:
    """The table of the family that a model is nearest to."""
    return TABLES[family_of(config)]


def spellings(config: ModelConfig, names: Sequence[str]) -> dict[str, Spelling]:
    """How each of a model's products is spelled; `names` are all of them. Empty where no family has such blocks."""
    try:
        bound = bind(table_of(config), [f"{name}.weight" for name in names])
    except CheckpointError:
        return {}
    return {spelling.native: spelling for each in bound for spelling in _of(each)}


def _of(bound: Bound) -> Iterator[Spelling]:
    rows, turned = _rows(bound.rule.step)
    here, there = (
        tuple(name.removesuffix(".weight") for name in side) for side in (bound.native, bound.foreign)
    )
    if len(here) == 1:
        yield Spelling(here[0], there, rows, turned)
    else:  # so many here, as many there
        for native, foreign in zip(here, there, strict=True):
            yield Spelling(native, (foreign,), rows, turned)


def _rows(step: Step) -> tuple[Step, bool]:
    """What a step does to rows that lie as ours do, and whether it turned them so."""
    if isinstance(step, Transposed):
        return SAME, True
    if isinstance(step, Then) and isinstance(step.first, Transposed):
        return step.second, True
    return step, False
