"""A `ModelConfig` as a config.json that transformers reads: the family that is exactly like it, or a refusal by field.

The same table as `huggingface_config` reads by, turned round. Knows no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalith.checkpoint.formats.huggingface_config import read_config
from megalith.checkpoint.formats.huggingface_families import FAMILIES, Family
from megalith.errors import CheckpointError, ConfigError
from megalith.models.bert_config import BertConfig
from megalith.models.config import GATED_ACTIVATIONS, ModelConfig, effective
from megalith.models.encdec_config import EncoderDecoderConfig

WRITTEN_BY = "5.0.0"
"""The oldest transformers that spells a config as it is written here."""
INDIFFERENT = {
    "make_vocab_size_divisible_by", "attention_core", "init_method_std", "use_scaled_init_method", "hidden_dropout",
    "attention_dropout",
}  # fmt: skip


def family_of(config: ModelConfig) -> str:
    """The model_type that a model is. What it differs in from that family, `write_config` says."""
    if isinstance(config, BertConfig):
        return "bert" if config.transformer_block_type == "post_ln" else "megatron-bert"
    if isinstance(config, EncoderDecoderConfig):
        return "t5" if config.position_embedding_type == "relative" else "bart"
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
    fields = config.model_dump(mode="json") | config.written_out()
    values = {key: fields[name] for key, name in family.fields.items() if name in fields}
    values |= {
        "architectures": [family.architecture],
        "model_type": kind,
        "transformers_version": WRITTEN_BY,
        "dtype": dtype,
        "initializer_range": config.init_method_std,
        **{name: id for name, id in ids.items() if id is not None},
        **family.only,
        **_rope(config),
        **_biases(config, kind),
        **_heads(config, family),
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


def _heads(config: ModelConfig, family: Family) -> dict[str, Any]:
    """What the class of a model says of its heads, and what encoder-decoders say of theirs."""
    if isinstance(config, BertConfig) and not config.bert_binary_head:
        return {"architectures": [family.architecture.replace("ForPreTraining", "ForMaskedLM")]}
    if not isinstance(config, EncoderDecoderConfig):
        return {}
    if config.position_embedding_type != "relative":
        return {"decoder_attention_heads": config.num_attention_heads, "init_std": config.init_method_std}
    tied = config.share_embeddings_and_output_weights
    return {"tie_word_embeddings": tied, "scale_decoder_outputs": config.scale_decoder_output}


def _refuse_differences(values: Mapping[str, Any], config: ModelConfig, kind: str) -> None:
    """What is read back must be the same model; where it is not, those fields have no place there."""
    try:
        back = effective(read_config(values, where="config.json", stored=_stored(config))[1])
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


def _stored(config: ModelConfig) -> set[str]:
    """Of the tensors that will lie beside config.json, those whose names say what it does not."""
    there = {
        "cls.seq_relationship.weight": getattr(config, "bert_binary_head", False),
        "final_logits_bias": getattr(config, "output_bias", False),
        "lm_head.weight": not config.share_embeddings_and_output_weights,
        "encoder.": True,
        "decoder.": True,
    }
    return {name for name, stored in there.items() if stored}
