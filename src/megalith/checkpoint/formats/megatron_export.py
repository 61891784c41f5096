"""A `ModelConfig` in Megatron's arguments, or a refusal by field: what is read back must be the same model.

The same names as `megatron_args` reads, turned round. Knows no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalith.checkpoint.formats.megatron_args import Facts, refuse_others, settle
from megalith.checkpoint.formats.megatron_shapes import see
from megalith.checkpoint.formats.megatron_stages import split_of
from megalith.checkpoint.mapped import Parts
from megalith.checkpoint.mapping import Table
from megalith.errors import CheckpointError
from megalith.models.bert_config import BertConfig
from megalith.models.config import ModelConfig, effective
from megalith.models.encdec_config import EncoderDecoderConfig

DIVISIBLE_BY = 128
"""Megatron pads the vocabulary to a multiple of this times the number of tensor-parallel ranks."""
INDIFFERENT = {"make_vocab_size_divisible_by", "attention_core", "use_scaled_init_method", "vocab_size"}


def padded_rows(vocabulary: int, ranks: int) -> int:
    """Rows of Megatron's token table."""
    multiple = DIVISIBLE_BY * ranks
    return -(-vocabulary // multiple) * multiple


def write_arguments(config: ModelConfig, sizes: tuple[int, int, int]) -> dict[str, Any]:
    """Megatron's arguments of a model in files of (tensor-parallel ranks, pipeline stages, chunks of a stage)."""
    ranks, stages, chunks = sizes
    scaling, kind = config.rotary_scaling, config.position_embedding_type
    grouped = config.kv_heads != config.num_attention_heads
    layers = config.written_out().get("encoder_num_layers", config.num_layers)
    return {
        "num_layers": layers,
        "encoder_num_layers": layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_size,
        "num_attention_heads": config.num_attention_heads,
        "kv_channels": config.head_dim,
        "group_query_attention": grouped,
        "num_query_groups": config.kv_heads if grouped else 1,
        "max_position_embeddings": config.max_position_embeddings,
        "seq_length": config.max_position_embeddings,
        "position_embedding_type": kind,
        "add_position_embedding": kind == "learned_absolute",
        "use_rotary_position_embeddings": kind == "rope",
        "rotary_percent": config.rotary_percentage,
        "rotary_base": config.rotary_base,
        "rotary_interleaved": config.rotary_interleaved,
        "rotary_seq_len_interpolation_factor": scaling.factor
        if scaling and scaling.type == "linear"
        else None,
        "use_rope_scaling": bool(scaling and scaling.type == "llama3"),
        "rope_scaling_factor": scaling.factor if scaling and scaling.type == "llama3" else 8.0,
        "normalization": {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[config.normalization],
        "norm_epsilon": config.layernorm_epsilon,
        "layernorm_epsilon": config.layernorm_epsilon,
        "swiglu": config.activation == "swiglu",
        "squared_relu": config.activation == "squared_relu",
        "bias_gelu_fusion": config.activation == "gelu_tanh",
        "openai_gelu": getattr(config, "lm_head_activation", "") == "gelu_tanh",
        "onnx_safe": None,
        "add_bias_linear": config.bias,
        "add_qkv_bias": config.has_qkv_bias,
        "untie_embeddings_and_output_weights": not config.share_embeddings_and_output_weights,
        "apply_residual_connection_post_layernorm": config.apply_residual_connection_post_layernorm,
        "hidden_dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "init_method_std": config.init_method_std,
        "vocab_size": config.vocab_size,
        "make_vocab_size_divisible_by": DIVISIBLE_BY,
        "padded_vocab_size": padded_rows(config.vocab_size, ranks),
        "tensor_model_parallel_size": ranks,
        "pipeline_model_parallel_size": stages,
        "virtual_pipeline_model_parallel_size": chunks if chunks > 1 else None,
        **_of_family(config, stages),
    }


def _of_family(config: ModelConfig, stages: int) -> dict[str, Any]:
    if isinstance(config, BertConfig):
        return {"bert_binary_head": config.bert_binary_head, "num_tokentypes": config.token_types}
    if isinstance(config, EncoderDecoderConfig):
        layers = config.encoder_layers, config.decoder_layers
        split = split_of(*layers, stages) if stages > 1 else None
        return {
            "decoder_num_layers": config.decoder_layers,
            "decoder_seq_length": config.max_position_embeddings,
            "pipeline_model_parallel_split_rank": split,
        }
    return {}


def refuse_differences(
    config: ModelConfig,
    arguments: Mapping[str, Any],
    table: Table,
    parts: Mapping[str, Parts],
    *,
    to: str = "Megatron",
) -> None:
    """Errors: `CheckpointError` naming the fields that Megatron (or `to`, who names things alike) has no argument for."""
    where, fix = f"--to {to.lower()}", "--to native or --to huggingface, which may have it"
    facts = Facts(arguments, "its arguments")
    refuse_others(facts, where=where)
    ours = effective(config)
    try:
        settle(facts, see(table, parts, where=where), where=where)
        back = effective(type(config)(**facts.fields | {"vocab_size": config.vocab_size}))
    except CheckpointError as error:
        what = f"{to} has nothing like this model: {error.problem.what}"
        raise CheckpointError(what, where=where, fix=fix) from None
    lines = [
        f"model.{name}: {ours[name]}, in {to} it would be {back.get(name)}"
        for name in ours
        if name not in INDIFFERENT and ours[name] != back.get(name)
    ]
    if lines:
        raise CheckpointError(
            "\n    ".join([f"{to} has nothing like this model", *lines]), where=where, fix=fix
        )
