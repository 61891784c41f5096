"""A `ModelConfig` as a config.json that transformers reads: the family that is exactly like it, or a refusal by field.

The same table as `huggingface_config` reads by, turned round. Knows no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalith.checkpoint.formats.huggingface_config import read_config
from megalith.checkpoint.formats.huggingface_families import FAMILIES, Family
from megalith.errors import CheckpointError, ConfigError
from megalith.models.config import GATED_ACTIVATIONS, ModelConfig, effective

WRITTEN_BY = "5.0.0"
"""The oldest transformers that spells a config as it is written here."""
INDIFFERENT = {
    "make_vocab_size_divisible_by", "attention_core", "init_method_std", "use_scaled_init_method", "hidden_dropout",
    "attention_dropout",
}  # fmt: skip


def family_of(config: ModelConfig) -> str:
    """The model_type that a model is. What it differs in from that family, `write_config` says."""
    if config.position_embedding_type != "rope":
        return "gpt2"
    if config.normalization == "layernorm" or config.activation not in GATED_ACTIVATIONS:
        return "gpt_neox"
    return "qwen2" if config.has_qkv_bias and not config.bias else "llama"


def write_config(config: ModelConfig, *, dtype: str, ids: Mapping[str, int | None]) -> dict[str, Any]:
    """config.json of a model; `dtype` as torch names it; `ids`: bos_token_id and the like.

    Errors: `CheckpointError` naming the fields that no family of transformers has like this.
    """
    kind = family_of(config)
    family = FAMILIES[kind]
    fields = config.model_dump(mode="json")
    values = {key: fields[name] for key, name in family.fields.items() if name in fields}
    values |= {
        "architectures": [family.architecture],
        "model_type": kind,
        "transformers_version": WRITTEN_BY,
        "dtype": dtype,
        "initializer_range": config.init_method_std,
        **{name: id for name, id in ids.items() if id is not None},
        **family.only,
        **_sizes(config, family),
        **_rope(config),
        **_biases(config, kind),
    }
    activation = next((name for name, ours in family.activations.items() if ours == config.activation), None)
    if activation is not None:
        values[family.activation] = activation
    if kind == "gpt2":
        values["embd_pdrop"] = config.hidden_dropout
        if config.attention_scale is not None:
            values["scale_attn_weights"] = False
    _refuse_differences(values, config, kind)
    return values


def _sizes(config: ModelConfig, family: Family) -> dict[str, Any]:
    """What null stands for, written out: transformers' defaults are other ones."""
    meant = {
        "ffn_hidden_size": config.ffn_size,
        "num_query_groups": config.kv_heads,
        "kv_channels": config.head_dim,
    }
    return {key: meant[name] for key, name in family.fields.items() if name in meant}


def _rope(config: ModelConfig) -> dict[str, Any]:
    if config.position_embedding_type != "rope":
        return {}
    told: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rotary_base}
    if config.rotary_percentage != 1.0 or config.normalization == "layernorm":
        told["partial_rotary_factor"] = config.rotary_percentage
    scaling = config.rotary_scaling
    if scaling is not None:
        named = scaling.model_dump(mode="json")
        told |= {"rope_type": scaling.type, "factor": scaling.factor}
        told |= {k: v for k, v in named.items() if scaling.type == "llama3" and k not in ("type", "factor")}
    return {"rope_parameters": told}


def _biases(config: ModelConfig, kind: str) -> dict[str, Any]:
    return {"attention_bias": config.bias, "mlp_bias": config.bias} if kind == "llama" else {}


def _refuse_differences(values: Mapping[str, Any], config: ModelConfig, kind: str) -> None:
    """What is read back must be the same model; where it is not, those fields have no place there."""
    try:
        back = effective(read_config(values, where="config.json")[1])
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"no family of transformers is like this model: {error}") from None
    ours = effective(config)
    lines = [
        f"model.{name}: {ours[name]}, a {kind} of transformers has {back.get(name)}"
        for name in ours
        if name not in INDIFFERENT and ours[name] != back.get(name)
    ]
    if lines:
        raise CheckpointError("\n    ".join(["no family of transformers is like this model", *lines]))
