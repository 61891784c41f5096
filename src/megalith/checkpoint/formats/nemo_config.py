"""NeMo's `model_config.yaml` in Megatron's arguments, and a model of ours in NeMo's keys: one table of names, used both ways.

    model_config.yaml ─ references ─ names ─▶ arguments, as `megatron_args` reads them
    ModelConfig ─▶ NeMo's keys, with the class that they make

A key that makes another model than ours can be is refused by its name. Knows keys from NeMo 1.0 to 1.20; knows no file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from megalith.checkpoint.formats.megatron_export import DIVISIBLE_BY
from megalith.errors import CheckpointError
from megalith.models.bert_config import BertConfig
from megalith.models.config import ModelConfig
from megalith.models.encdec_config import EncoderDecoderConfig

CONFIG = "model_config.yaml"
MODELS = "nemo.collections.nlp.models.language_modeling"
TARGETS: Mapping[str, str] = {
    "gpt": f"{MODELS}.megatron_gpt_model.MegatronGPTModel",
    "bert": f"{MODELS}.megatron_bert_model.MegatronBertModel",
    "t5": f"{MODELS}.megatron_t5_model.MegatronT5Model",
    "bart": f"{MODELS}.megatron_bart_model.MegatronBARTModel",
}
"""Family → the class whose files we write."""
CLASSES = {"GPT": "gpt", "Bert": "bert", "T5": "t5", "BART": "bart"}
"""`MegatronX…` in the name of a class → family. A class of another name has an encoder, and a head for its task."""
NEWEST, OLDEST = "1.20.0", "1.8.2"
"""Versions whose files we write: the second, unless a model needs keys that came later."""
SAME = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "max_position_embeddings",
    "hidden_dropout", "attention_dropout", "init_method_std", "layernorm_epsilon", "make_vocab_size_divisible_by",
    "tensor_model_parallel_size", "pipeline_model_parallel_size",
)  # fmt: skip
"""Keys that Megatron's arguments are called too."""
RENAMED = {
    "rotary_percentage": "rotary_percent",
    "rotary_base": "rotary_base",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
}
"""NeMo's key → Megatron's argument."""
LENGTHS = ("max_position_embeddings", "encoder_seq_length", "seq_length")
"""Keys for the same thing, in the order of preference."""
SIDES = ("encoder", "decoder")
OF_A_SIDE = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "init_method_std", "hidden_dropout",
    "attention_dropout", "kv_channels", "apply_query_key_layer_scaling", "layernorm_epsilon", "bias_activation_fusion",
    "activation", "bias", "normalization", "transformer_block_type", "position_embedding_type", "rotary_percentage",
)  # fmt: skip
"""Keys that stand in a section for each side, from 1.10 on."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "transformer_block_type": (None, "pre_ln"),
    "headscale": (None, False),
    "normalize_attention_scores": (None, True),
    "num_moe_experts": (None, 0, 1),
    "use_emha": (None, False),
    "attention_type": (None, "multihead"),
    "layer_type": (None, "encoder", "decoder", "default"),
    "encoder_arch": (None, "transformer"),
    "decoder_arch": (None, "transformer"),
    "arch": (None, "transformer"),
    "embedding_scale": (None, 1, 1.0),
    "apply_embedding_scaling": (None, False),
    "num_self_attention_per_cross_attention": (None, 1),
    "hidden_steps": (None, -1),
    "scale_positional_embedding": (None, False),
    "share_token_embeddings": (None, True),
}
"""Key → the values at which it changes nothing; with any other it is another model."""
NORMS = {"layernorm": "LayerNorm", "low_precision_layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}
ACTIVATIONS: Mapping[str, tuple[str, str]] = {
    "gelu": ("gelu_tanh", "gelu_erf"),
    "geglu": ("geglu", "geglu_erf"),
    "reglu": ("reglu", "reglu"),
    "swiglu": ("swiglu", "swiglu"),
    "squared-relu": ("squared_relu", "squared_relu"),
}
"""NeMo's activation → ours where it is fused with the bias (the default), and where it is not. `fast-` is how gates are kept."""
_REFERENCE = re.compile(r"\$\{(?:\.|model\.|cfg\.)?(\w+)\}")


def read_model_config(text: bytes, *, where: str) -> dict[str, Any]:
    """The keys of a `model_config.yaml`, references to other keys put in. Errors: `CheckpointError` where it is not one."""
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CheckpointError(f"is not YAML ({error})", where=where, fix="get the archive again") from None
    return own_keys(content, where=where)


def own_keys(content: Any, *, where: str) -> dict[str, Any]:
    """Keys of the model, wherever a run's configuration has them."""
    for above in ("cfg", "model"):
        if isinstance(content, dict) and isinstance(content.get(above), dict):
            content = content[above]
    if not isinstance(content, dict):
        raise CheckpointError("does not hold keys and values", where=where, fix="get the archive again")
    return {str(key): _referred(value, content) for key, value in content.items()}


def _referred(value: Any, keys: Mapping[Any, Any], depth: int = 0) -> Any:
    match = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[1] not in keys or depth > len(keys):
        return value
    return _referred(keys[match[1]], keys, depth + 1)


def family_of(target: Any) -> str | None:
    """Family of a fully qualified class of NeMo's; None for one that has a Megatron inside."""
    name = str(target or "").rpartition(".")[2]
    return next((CLASSES[known] for known in CLASSES if name.startswith(f"Megatron{known}")), None)


def arguments(keys: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """NeMo's keys as Megatron's arguments, and every other key as it is. Errors: `CheckpointError` with all that ours is not like."""
    keys = _flat(keys)
    wrong = [f"{key}={keys[key]!r}" for key, neutral in NEUTRAL.items() if keys.get(key) not in neutral]
    found = {key: value for key, value in keys.items() if _is_scalar(value)}
    found |= {there: keys[here] for here, there in RENAMED.items() if keys.get(here) is not None}
    length = next((keys[key] for key in LENGTHS if keys.get(key) is not None), None)
    found |= {} if length is None else {"max_position_embeddings": length}
    norm = str(keys.get("normalization") or "layernorm")
    if norm in NORMS:
        found["normalization"] = NORMS[norm]
    else:
        wrong.append(f"normalization={norm!r}")
    activation = str(keys.get("activation") or "gelu").removeprefix("fast-")
    if activation in ACTIVATIONS:
        found["activation"] = _activation(activation, keys)
    else:
        wrong.append(f"activation={activation!r}")
    if keys.get("share_embeddings_and_output_weights") is not None:
        found["untie_embeddings_and_output_weights"] = not keys["share_embeddings_and_output_weights"]
    found["position_embedding_type"] = keys.get("position_embedding_type") or "learned_absolute"
    if wrong:
        raise CheckpointError(f"ours has nothing like {', '.join(wrong)}", where=where)
    return found


def _flat(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of an encoder and a decoder, each in a section of its own (from 1.10 on), as those of the model."""
    encoder, decoder = (keys[side] if isinstance(keys.get(side), Mapping) else {} for side in SIDES)
    below = {"decoder_num_layers": decoder["num_layers"]} if decoder.get("num_layers") is not None else {}
    return {**decoder, **encoder, **below, **{key: value for key, value in keys.items() if value is not None}}


def _activation(name: str, keys: Mapping[str, Any]) -> str:
    fused = keys.get("bias_activation_fusion", keys.get("bias_gelu_fusion"))
    plain = fused is not None and not fused and not keys.get("openai_gelu")
    return ACTIVATIONS[name][plain]


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def written(family: str, config: ModelConfig, sizes: tuple[int, int], dtype: str) -> dict[str, Any]:
    """A model in NeMo's keys, for files of (tensor-parallel ranks, pipeline stages), in the order in which NeMo's own have them.

    Errors: `CheckpointError` for what NeMo has no key for.
    """
    _refuse_unknown(config)
    ranks, stages = sizes
    gates = config.activation in ("geglu", "geglu_erf", "reglu", "swiglu")
    name, fused = _named(config.activation)
    newer = _newer(config)
    keys: dict[str, Any] = {
        "precision": {"float16": 16, "bfloat16": "bf16"}.get(dtype, 32),
        "micro_batch_size": 4,
        "global_batch_size": 8,
        "tensor_model_parallel_size": ranks,
        "pipeline_model_parallel_size": stages,
        "encoder_seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_size,
        "num_attention_heads": config.num_attention_heads,
        "init_method_std": config.init_method_std,
        "hidden_dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "kv_channels": config.kv_channels,
        "apply_query_key_layer_scaling": True,
        "layernorm_epsilon": config.layernorm_epsilon,
        "make_vocab_size_divisible_by": DIVISIBLE_BY,
        "pre_process": True,
        "post_process": True,
        "bias_activation_fusion" if newer else "bias_gelu_fusion": fused,
    }
    if newer:
        keys |= {
            "mcore_gpt": False,
            "activation": f"fast-{name}" if gates else name,
            "bias": config.bias,
            "normalization": config.normalization,
            "transformer_block_type": config.transformer_block_type,
            "position_embedding_type": config.position_embedding_type,
            "rotary_percentage": config.rotary_percentage,
            "share_embeddings_and_output_weights": config.share_embeddings_and_output_weights,
        }
        if config.rotary_scaling is not None and config.rotary_scaling.type == "linear":
            keys["seq_len_interpolation_factor"] = config.rotary_scaling.factor
    keys = _of_family(keys, config, stages)
    return keys | {"target": TARGETS[family], "nemo_version": NEWEST if newer else OLDEST}


def _of_family(keys: dict[str, Any], config: ModelConfig, stages: int) -> dict[str, Any]:
    """The keys as a family has them."""
    if isinstance(config, BertConfig):
        return keys | {"bert_binary_head": config.bert_binary_head}
    if not isinstance(config, EncoderDecoderConfig):
        return keys
    keys["seq_length"] = keys.pop("encoder_seq_length")
    keys["pipeline_model_parallel_split_rank"] = stages // 2
    keys["num_layers"] = config.encoder_layers
    if not _newer(config):
        return keys | {"encoder_arch": "transformer", "decoder_arch": "transformer"}
    shared = {name: keys.pop(name) for name in OF_A_SIDE if name in keys}
    sizes = {
        "encoder": (config.encoder_layers, config.ffn_size),
        "decoder": (config.decoder_layers, config.decoder_ffn_size),
    }
    return keys | {
        side: {"arch": "transformer", **shared, "num_layers": layers, "ffn_hidden_size": inner}
        for side, (layers, inner) in sizes.items()
    }


def _refuse_unknown(config: ModelConfig) -> None:
    """What NeMo's own transformer has no key for, though Megatron's may. Errors: `CheckpointError` naming all of it."""
    wrong = [
        text
        for text, found in {
            "grouped queries": config.kv_heads != config.num_attention_heads,
            "qkv_bias unlike bias": config.has_qkv_bias != config.bias,
            f"rotary_base {config.rotary_base:g}": config.position_embedding_type == "rope"
            and config.rotary_base != 10000,
            "interleaved rotary pairs": config.position_embedding_type == "rope"
            and config.rotary_interleaved,
        }.items()
        if found
    ]
    if wrong:
        raise CheckpointError(
            f"NeMo's own transformer has no {', no '.join(wrong)}",
            where="--to nemo",
            fix="--to megatron or --to huggingface, which have",
        )


def _named(activation: str) -> tuple[str, bool]:
    for name, forms in ACTIVATIONS.items():
        if activation in forms:
            return name, forms[0] == activation and name in ("gelu", "geglu")
    raise CheckpointError(
        f"NeMo has nothing like activation {activation}", where="--to nemo", fix="--to native"
    )


def _newer(config: ModelConfig) -> bool:
    """Does it need a key that NeMo 1.8 did not have? Two sides that differ had none."""
    sides = isinstance(config, EncoderDecoderConfig) and (
        config.encoder_layers != config.decoder_layers or config.ffn_size != config.decoder_ffn_size
    )
    return sides or not (
        config.activation in ("gelu_tanh", "gelu_erf")
        and config.bias
        and config.normalization == "layernorm"
        and config.position_embedding_type == "learned_absolute"
        and config.share_embeddings_and_output_weights
    )
