"""How each `model_type` of transformers spells a model: one table, read in both directions.

Defaults are transformers' own for keys that a file leaves out (5.x). Knows names; reads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PLAIN = {
    "gelu_new": "gelu_tanh", "gelu": "gelu_erf", "relu": "relu", "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "swish": "silu",
}  # fmt: skip
GATED = {
    "silu": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu": "geglu_erf", "relu": "reglu",
    "gelu_new": "geglu", "gelu_fast": "geglu", "swish": "swiglu",
}  # fmt: skip
"""transformers' activation → ours; the first spelling of each is the one that is written."""
NO_EFFECT = {
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "_name_or_path", "initializer_range", "pretraining_tp", "task_specific_params",
    "classifier_dropout", "summary_type", "summary_use_proj", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "n_ctx", "reorder_and_upcast_attn", "return_dict", "output_attentions",
    "output_hidden_states", "hidden_dropout", "max_window_layers", "rope_theta", "rope_scaling", "rope_parameters",
    "rotary_pct", "rotary_emb_base", "partial_rotary_factor", "layer_types", "gradient_checkpointing", "finetuning_task",
    "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "attn_implementation", "_attn_implementation",
    "tokenizer_class", "is_decoder", "sliding_window", "attention_bias", "mlp_bias", "pruned_heads", "directionality",
    "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type",
    "initializer_factor", "decoder_start_token_id", "dense_act_fn", "is_gated_act", "output_past", "scale_decoder_outputs",
    "activation_dropout", "encoder_layerdrop", "decoder_layerdrop", "init_std", "num_hidden_layers", "forced_bos_token_id",
    "forced_eos_token_id", "early_stopping", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beams",
    "prefix", "n_special", "classif_dropout", "dropout", "save_step", "num_labels",
}  # fmt: skip
"""Keys that change no number of the forward pass, or that are read apart."""


@dataclass(frozen=True)
class Family:
    """How a `model_type` spells a model of our family `ours`.

    `fields`: key → field of `ModelConfig`; `absent`: transformers' values of keys that are left out; `fixed`: fields that
    the family has always; `only`: key → the value that ours is like (others are refused); `older`: the same for keys that
    are not written any more. `architecture`: the class that a folder is written for.
    """

    architecture: str
    fields: Mapping[str, str]
    activation: str
    activations: Mapping[str, str]
    absent: Mapping[str, Any]
    fixed: Mapping[str, Any]
    only: Mapping[str, Any] = field(default_factory=dict)
    older: Mapping[str, Any] = field(default_factory=dict)
    ours: str = "gpt"


_SIZES = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "ffn_hidden_size",
    "max_position_embeddings": "max_position_embeddings",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
    "attention_dropout": "attention_dropout",
}
_LLAMA = {
    **_SIZES,
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "rms_norm_eps": "layernorm_epsilon",
}
_ROPE = {"position_embedding_type": "rope", "hidden_dropout": 0.0}
_GATED_ROPE = {**_ROPE, "normalization": "rmsnorm", "bias": False}


def _llama(architecture: str, absent: Mapping[str, Any] | None = None, **more: Any) -> Family:
    common = {"tie_word_embeddings": False, "hidden_act": "silu", "rms_norm_eps": 1e-6}
    return Family(architecture, _LLAMA, "hidden_act", GATED, common | dict(absent or {}), _GATED_ROPE | more)


def _bert(architecture: str, **fixed: Any) -> Family:
    """`architecture`: of a model with a binary head."""
    fields = {key: name for key, name in _SIZES.items() if key != "attention_dropout"}
    return Family(
        architecture,
        {
            **fields,
            "layer_norm_eps": "layernorm_epsilon",
            "type_vocab_size": "num_tokentypes",
            "hidden_dropout_prob": "hidden_dropout",
            "attention_probs_dropout_prob": "attention_dropout",
        },
        "hidden_act",
        PLAIN,
        {
            "tie_word_embeddings": True,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "type_vocab_size": 2,
            "max_position_embeddings": 512,
        },
        fixed,
        {"is_decoder": False, "add_cross_attention": False},
        {"position_embedding_type": "absolute", "embedding_size": None},
        ours="bert",
    )


def _t5(architecture: str, feed_forward: str) -> Family:
    return Family(
        architecture,
        {
            "vocab_size": "vocab_size",
            "d_model": "hidden_size",
            "d_kv": "kv_channels",
            "d_ff": "ffn_hidden_size",
            "num_layers": "num_layers",
            "num_decoder_layers": "decoder_num_layers",
            "num_heads": "num_attention_heads",
            "n_positions": "max_position_embeddings",
            "relative_attention_num_buckets": "relative_attention_num_buckets",
            "relative_attention_max_distance": "relative_attention_max_distance",
            "layer_norm_epsilon": "layernorm_epsilon",
            "dropout_rate": "hidden_dropout",
        },
        "feed_forward_proj",
        _T5_ACTIVATIONS,
        {"feed_forward_proj": feed_forward, "layer_norm_epsilon": 1e-6, "n_positions": 512, "is_encoder_decoder": True},
        {"position_embedding_type": "relative", "normalization": "rmsnorm", "bias": False, "attention_scale": 1.0},
        {"is_encoder_decoder": True},
        ours="t5",
    )  # fmt: skip


_T5_ACTIVATIONS = {
    "relu": "relu", "gated-gelu": "geglu", "gated-silu": "swiglu", "gated-relu": "reglu", "gelu_new": "gelu_tanh",
    "gelu": "gelu_erf", "silu": "silu", "gated-gelu_new": "geglu", "gated-gelu_pytorch_tanh": "geglu", "swish": "silu",
}  # fmt: skip
"""`gated-gelu` is the tanh form there, `gelu` the exact one."""

FAMILIES: Mapping[str, Family] = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        {
            "vocab_size": "vocab_size",
            "n_layer": "num_layers",
            "n_embd": "hidden_size",
            "n_head": "num_attention_heads",
            "n_inner": "ffn_hidden_size",
            "n_positions": "max_position_embeddings",
            "tie_word_embeddings": "share_embeddings_and_output_weights",
            "layer_norm_epsilon": "layernorm_epsilon",
            "resid_pdrop": "hidden_dropout",
            "attn_pdrop": "attention_dropout",
        },
        "activation_function",
        PLAIN,
        {"tie_word_embeddings": True, "activation_function": "gelu_new"},
        {},
        {"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    ),
    "llama": _llama("LlamaForCausalLM"),
    "mistral": _llama("MistralForCausalLM", {"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": _llama(
        "Qwen2ForCausalLM", {"num_key_value_heads": 32, "use_sliding_window": False}, qkv_bias=True
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        {**_SIZES, "layer_norm_eps": "layernorm_epsilon", "hidden_dropout": "hidden_dropout"},
        "hidden_act",
        PLAIN,
        {
            "tie_word_embeddings": False,
            "hidden_act": "gelu",
            "use_parallel_residual": True,
            "layer_norm_eps": 1e-5,
        },
        _ROPE,
        {"use_parallel_residual": False},
    ),
    "bert": _bert("BertForPreTraining", transformer_block_type="post_ln"),
    "megatron-bert": _bert("MegatronBertForPreTraining"),
    "t5": _t5("T5ForConditionalGeneration", "relu"),
    "mt5": _t5("MT5ForConditionalGeneration", "gated-gelu"),
    "bart": Family(
        "BartForConditionalGeneration",
        {
            "vocab_size": "vocab_size",
            "d_model": "hidden_size",
            "encoder_layers": "num_layers",
            "decoder_layers": "decoder_num_layers",
            "encoder_attention_heads": "num_attention_heads",
            "encoder_ffn_dim": "ffn_hidden_size",
            "decoder_ffn_dim": "decoder_ffn_hidden_size",
            "max_position_embeddings": "max_position_embeddings",
            "dropout": "hidden_dropout",
            "attention_dropout": "attention_dropout",
        },
        "activation_function",
        PLAIN,
        {"activation_function": "gelu", "is_encoder_decoder": True, "scale_embedding": False},
        {"transformer_block_type": "post_ln", "share_position_embeddings": False},
        {"is_encoder_decoder": True, "scale_embedding": False, "tie_word_embeddings": True},
        {
            "normalize_before": False,
            "normalize_embedding": True,
            "add_final_layer_norm": False,
            "add_bias_logits": False,
            "static_position_embeddings": False,
        },
        ours="bart",
    ),
}
REQUIRED = {
    "vocab_size", "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "max_position_embeddings",
}  # fmt: skip
REFUSED = ("quantization_config", "auto_map", "num_local_experts", "num_experts", "is_encoder_decoder")
