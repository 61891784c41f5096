"""A model that another program saved: its architecture in our words, its tensors under our names, and where all that was read.

Knows our families and the rule tables. Knows no format; those who read one make it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megalith.checkpoint.drawn import Drawn
from megalith.checkpoint.mapped import Mapped, Parts, canonical, natives
from megalith.checkpoint.mapping import Heads, Table
from megalith.errors import CheckpointError
from megalith.models.config import ModelConfig
from megalith.models.family import FAMILIES, describe

DIVISORS = (128, 256, 512, 1024, 2048, 4096, 8192, 64, 32, 16, 8)
"""What tables of tokens were padded to a multiple of: 128 times the number of tensor-parallel ranks, or less."""


@dataclass(frozen=True)
class Foreign:
    """`kind` says which format ("huggingface", "megatron", "megatron-core", "torch_dist"); `parts` are its tensors under its own names.

    `state`: step and consumed samples, where it tells. `tokenizer`: a file or folder that `load_tokenizer` opens. `provenance`:
    plain JSON facts of where each setting comes from. `notices`: what a person should know.
    """

    kind: str
    path: Path
    family: str
    config: ModelConfig
    table: Table
    parts: Mapping[str, Parts]
    tokenizer: Path | None = None
    state: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    drawn: tuple[str, ...] = ()
    """Our names of the tensors that it was saved without, and a model needs: they begin anew."""

    @cached_property
    def tensors(self) -> Mapping[str, Mapped | Drawn]:
        """Our names (`blocks.0.mlp.up.weight`) → tensors, each made when it is read. Errors: `CheckpointError` for what does not fit."""
        sizes = self.config.written_out()
        layers = sizes.get("decoder_num_layers", 0) + sizes.get("encoder_num_layers", self.config.num_layers)
        if layers > len(self.parts):
            raise CheckpointError(
                f"it is to have {layers:,} layers, but it holds {len(self.parts):,} tensors",
                where=str(self.path),
                fix="its files are incomplete, or its configuration is damaged",
            )
        shapes = shapes_of(self.family, self.config)
        anew = {
            name: Drawn(name, self.dtype, shapes.pop(name), self.config.init_method_std)
            for name in self.drawn
        }
        return {
            **natives(self.table, shapes, self.parts, heads_of(self.config), where=str(self.path)),
            **anew,
        }

    @property
    def dtype(self) -> torch.dtype:
        """What most of its numbers are kept in: that of the largest tensor."""
        return max((parts[0] for parts in self.parts.values()), key=lambda lazy: lazy.nbytes).dtype

    def as_model(self, config: ModelConfig) -> Foreign:
        """The same weights for a model of the same architecture whose token table is padded otherwise."""
        return replace(self, config=config)

    def described(self) -> dict[str, Any]:
        """What `state.json` would say of it: its state and its architecture."""
        return {**self.state, **describe(self.family, self.config)}


def with_heads(foreign: Foreign) -> Foreign:
    """The same, and where an encoder was saved without the head that guesses masked tokens, one that begins anew."""
    if foreign.family != "bert":
        return foreign
    found = {canonical(foreign.table, name) for name in foreign.parts}
    rules = [rule for rule in foreign.table.rules if rule.native[-1].startswith(("lm_head.", "output_bias."))]
    if any(name in found for rule in rules for name in (*rule.foreign, *rule.copies)):
        return foreign
    own = () if foreign.config.share_embeddings_and_output_weights else ("head.weight",)
    drawn = (*own, *(rule.native[0] for rule in rules if len(rule.native) == 1))
    said = "it is an encoder without the head that guesses masked tokens: lm_head and output_bias begin anew, untrained"
    return replace(foreign, drawn=drawn, notices=(*foreign.notices, said))


def shapes_of(family: str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every parameter of a model; no memory is taken."""
    with torch.device("meta"):
        model = FAMILIES[family][0](config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def heads_of(config: ModelConfig) -> Heads:
    """What steps need to know of attention."""
    return Heads(config.head_dim, config.num_attention_heads // config.kv_heads)


def padding(vocabulary: int, rows: int, *own: int) -> int | None:
    """What `vocabulary` tokens were padded to a multiple of when their table has `rows` rows; None where nothing fits.

    `own`: numbers that the checkpoint itself names.
    """
    return next((d for d in (*DIVISORS, *own) if d > 0 and -(-vocabulary // d) * d == rows), None)
