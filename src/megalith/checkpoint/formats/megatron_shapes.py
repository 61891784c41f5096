"""What the tensors of a Megatron checkpoint show of its model, by their names and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megalith.checkpoint.formats.megatron_stages import num_layers
from megalith.checkpoint.mapped import Parts, canonical
from megalith.checkpoint.mapping import Table
from megalith.errors import CheckpointError


@dataclass(frozen=True)
class Seen:
    """`rows` of the token table as stored, padding included; `positions` of the position table, 0 without one; and so on."""

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

    def sizes(self) -> dict[str, int]:
        """The fields of a `ModelConfig` that are seen for certain."""
        found = {"num_layers": self.layers, "hidden_size": self.width, "ffn_hidden_size": self.ffn}
        return found | ({"max_position_embeddings": self.positions} if self.positions else {})


def see(table: Table, parts: Mapping[str, Parts], *, where: str) -> Seen:
    """Looks at the first layer and the tables. Errors: `CheckpointError` naming the tensors that every GPT has and this lacks."""
    found = {canonical(table, name): lazies for name, lazies in parts.items()}
    roles = _roles(table)
    split = f"{roles['mlp.up']}.weight_v" in found
    needed = [roles[name] for name in ("token_embedding", "attention.qkv", "attention.out", "mlp.down")]
    needed += [] if split else [roles["mlp.up"]]
    absent = [f"{name}.weight" for name in needed if f"{name}.weight" not in found]
    if absent:
        held = ", ".join(sorted(found)[:6]) or "no tensor"
        raise CheckpointError(
            f"it is not {table.name}: there is no {', no '.join(absent)}; it holds {held}",
            where=where,
            fix="this version reads Megatron's GPT; a BERT or T5 file needs its own model",
        )

    needed += [roles["position_embedding"]] if f"{roles['position_embedding']}.weight" in found else []
    flat = [
        f"{name}.weight" for name in needed if any(len(lazy.shape) != 2 for lazy in found[f"{name}.weight"])
    ]
    if flat:
        raise CheckpointError(f"{', '.join(flat)}: not a matrix", where=where, fix="the file is damaged")

    def size(name: str, dim: int) -> int:
        return sum(lazy.shape[dim] for lazy in found[f"{roles[name]}.weight"])

    def has(name: str, kind: str) -> bool:
        return f"{roles[name]}.{kind}" in found

    down = size("mlp.down", 1)
    return Seen(
        layers=num_layers(found),
        width=found[f"{roles['token_embedding']}.weight"][0].shape[1],
        rows=size("token_embedding", 0),
        positions=found[f"{roles['position_embedding']}.weight"][0].shape[0]
        if has("position_embedding", "weight")
        else 0,
        ffn=down,
        query_key_value=size("attention.qkv", 0),
        gated=split or size("mlp.up", 0) == 2 * down,
        bias=has("attention.out", "bias"),
        qkv_bias=has("attention.qkv", "bias"),
        norm_bias=has("norm_attention", "bias"),
        output=has("head", "weight"),
    )


def _roles(table: Table) -> dict[str, str]:
    """Our name of a layer, without its number, → the foreign one of layer 0, without its kind."""
    return {
        rule.native[-1].removeprefix("blocks.{layer}.").rpartition(".")[0]: rule.foreign[0]
        .format(layer=0)
        .rpartition(".")[0]
        for rule in table.rules
    }
