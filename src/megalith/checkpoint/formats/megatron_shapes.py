"""What the tensors of a Megatron checkpoint show of its model, by their names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megalith.checkpoint.formats.megatron_stages import towers
from megalith.checkpoint.mapped import Parts, canonical
from megalith.checkpoint.mapping import Table
from megalith.errors import CheckpointError


@dataclass(frozen=True)
class Seen:
    """`rows` of the token table as stored, padding included; `positions` of the position table, 0 without one; and so on. `layers`, `ffn`: an encoder's where there is a decoder, too."""

    layers: int
    width: int
    rows: int
    positions: int
    ffn: int
    query_key_value: int
    gated: bool
    bias: bool
    qkv_bias: bool
    norm_bias: bool
    output: bool
    family: str = "gpt"
    types: int = 0
    binary: bool = False
    decoder_layers: int = 0
    decoder_ffn: int = 0
    output_bias: bool = False

    def sizes(self) -> dict[str, int]:
        """The fields of a `ModelConfig` that are seen for certain."""
        found = {"num_layers": self.layers, "hidden_size": self.width, "ffn_hidden_size": self.ffn}
        if self.decoder_layers:
            found["decoder_num_layers"] = self.decoder_layers
        return found | ({"max_position_embeddings": self.positions} if self.positions else {})


SIGNS = {
    "t5": r"inter_attention|cross_attention",
    "bert": r"(^|\.)(lm_head|binary_head|pooler)\.|tokentype_embeddings",
}
"""Family → what only its tensors' names have, in this order."""


def family_of(names: Iterable[str]) -> str:
    """What kind of model has tensors of these names."""
    known = list(names)
    return next(
        (family for family, sign in SIGNS.items() if any(re.search(sign, name) for name in known)), "gpt"
    )


def see(table: Table, parts: Mapping[str, Parts], *, where: str) -> Seen:
    """Looks at the first layers and the tables. Errors: `CheckpointError` naming the tensors that every one has and this lacks."""
    found = {canonical(table, name): lazies for name, lazies in parts.items()}
    roles = _roles(table)
    split = f"{roles['mlp.up']}.weight_v" in found
    family = family_of(found)
    every = ("token_embedding", "attention.qkv", "attention.out", "mlp.down")
    needed = [roles[name] for name in (*every, *(("decoder.mlp.down",) if family == "t5" else ()))]
    needed += [] if split else [roles["mlp.up"]]
    absent = [f"{name}.weight" for name in needed if f"{name}.weight" not in found]
    if absent:
        held = ", ".join(sorted(found)[:6]) or "no tensor"
        raise CheckpointError(
            f"it is not {table.name}: there is no {', no '.join(absent)}; it holds {held}",
            where=where,
            fix="Megatron's GPT, BERT and T5 are read",
        )

    needed += [
        roles[name] for name in ("position_embedding", "type_embedding") if f"{roles[name]}.weight" in found
    ]
    flat = [
        f"{name}.weight" for name in needed if any(len(lazy.shape) != 2 for lazy in found[f"{name}.weight"])
    ]
    if flat:
        raise CheckpointError(f"{', '.join(flat)}: not a matrix", where=where, fix="the file is damaged")

    def size(name: str, dim: int) -> int:
        return sum(lazy.shape[dim] for lazy in found[f"{roles[name]}.weight"])

    def has(name: str, kind: str) -> bool:
        return f"{roles[name]}.{kind}" in found

    def table_rows(name: str) -> int:
        return found[f"{roles[name]}.weight"][0].shape[0] if has(name, "weight") else 0

    down = size("mlp.down", 1)
    layers = {tower.rstrip(".").rpartition(".")[2]: count for tower, count in towers(found).items()}
    return Seen(
        layers=layers.get("encoder") or layers.get("decoder") or 0,
        width=found[f"{roles['token_embedding']}.weight"][0].shape[1],
        rows=size("token_embedding", 0),
        positions=table_rows("position_embedding"),
        ffn=down,
        query_key_value=size("attention.qkv", 0),
        gated=split or size("mlp.up", 0) == 2 * down,
        bias=has("attention.out", "bias"),
        qkv_bias=has("attention.qkv", "bias"),
        norm_bias=has("norm_attention", "bias"),
        output="head" in roles and has("head", "weight"),
        family=family,
        types=table_rows("type_embedding"),
        binary=family == "bert" and has("binary_head", "weight"),
        decoder_layers=layers.get("decoder", 0) if family == "t5" else 0,
        decoder_ffn=size("decoder.mlp.down", 1) if family == "t5" else 0,
        output_bias="output_bias" in roles and has("output_bias", "bias"),
    )


def _roles(table: Table) -> dict[str, str]:
    """Our name of a layer, without its number, → the foreign one of layer 0, without its kind; an encoder's as if it were alone."""
    return {
        rule.native[-1]
        .replace("blocks.{layer}.", "")
        .removeprefix("encoder.")
        .rpartition(".")[0]: rule.foreign[0].format(layer=0).rpartition(".")[0]
        for rule in table.rules
    }
