"""A config.json of Hugging Face as a `ModelConfig`, and the other way: what a family spells how, as data.

A key whose value would make another model than ours can be is refused by its name; a key that nobody here knows is told in a
notice. Knows transformers' names and its defaults for keys that a file leaves out (5.x; older spellings of rope are read).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from megalith.errors import CheckpointError
from megalith.models.config import ModelConfig

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
    "tokenizer_class", "is_decoder", "sliding_window", "attention_bias", "mlp_bias",
}  # fmt: skip
"""Keys that change no number of the forward pass, or that are read apart."""


@dataclass(frozen=True)
class Family:
    """How a `model_type` spells a decoder.

    `fields`: key → field of `ModelConfig`; `absent`: transformers' values of keys that are left out; `fixed`: fields that
    the family has always; `only`: key → the value that ours is like (others are refused).
    """

    architecture: str
    fields: Mapping[str, str]
    activation: str
    activations: Mapping[str, str]
    absent: Mapping[str, Any]
    fixed: Mapping[str, Any]
    only: Mapping[str, Any] = field(default_factory=dict)


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
}
REQUIRED = {
    "vocab_size", "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "max_position_embeddings",
}  # fmt: skip
REFUSED = ("quantization_config", "auto_map", "num_local_experts", "num_experts", "is_encoder_decoder")


@dataclass
class _Reading:
    """A config.json on its way to ours; `wrong` gathers everything that is refused."""

    values: Mapping[str, Any]
    family: Family
    made: dict[str, Any]
    wrong: list[str] = field(default_factory=list)

    def get(self, key: str) -> Any:
        return self.values.get(key, self.family.absent.get(key))

    def refuse(self, key: str, why: str) -> None:
        self.wrong.append(f"{key}: {why}")


def read_config(values: Mapping[str, Any], *, where: str) -> tuple[str, ModelConfig, tuple[str, ...]]:
    """→ (model_type, ours, notices). Errors: `CheckpointError` with every key that ours cannot be like."""
    kind = str(values.get("model_type"))
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise CheckpointError(f"its model_type is {kind!r}", where=where, fix=f"this version reads {known}")
    reading = _Reading(values, FAMILIES[kind], dict(FAMILIES[kind].fixed))
    for step in (_read_fields, _read_activation, _read_only, _read_rope, _read_biases, _read_windows):
        step(reading)
    if kind == "gpt2" and values.get("scale_attn_weights") is False:
        reading.made["attention_scale"] = 1.0
    if reading.wrong:
        raise CheckpointError(
            "\n    ".join([f"ours cannot be this {kind} model", *reading.wrong]), where=where
        )
    try:
        config = ModelConfig(**reading.made)
    except ValidationError as error:
        raise CheckpointError(f"its sizes make no model: {error}", where=where) from None
    return kind, config, tuple(_notices(reading))


def _read_fields(reading: _Reading) -> None:
    for key, name in reading.family.fields.items():
        value = reading.get(key)
        if value is not None:
            reading.made[name] = value
        if name in REQUIRED and key != "n_inner" and not isinstance(value, int):
            reading.refuse(key, "is missing" if value is None else f"{value!r} is no number")


def _read_activation(reading: _Reading) -> None:
    key = reading.family.activation
    known, name = reading.family.activations, reading.get(key)
    if name in known:
        reading.made["activation"] = known[name]
    else:
        reading.refuse(key, f"{name!r} is none of {', '.join(known)}")


def _read_only(reading: _Reading) -> None:
    for key, value in reading.family.only.items():
        if reading.get(key) not in (None, value):
            reading.refuse(key, f"{reading.get(key)!r}; ours is like {value!r} only")
    for key in REFUSED:
        if reading.values.get(key):
            reading.refuse(key, "ours has nothing like it")


def _read_rope(reading: _Reading) -> None:
    if reading.made.get("position_embedding_type") != "rope":
        return
    get = reading.values.get
    told = {**(get("rope_scaling") or {}), **(get("rope_parameters") or {})}
    reading.made["rotary_base"] = float(
        told.get("rope_theta") or get("rope_theta") or get("rotary_emb_base") or 1e4
    )
    absent = 0.25 if reading.family.architecture.startswith("GPTNeoX") else 1.0
    share = told.get("partial_rotary_factor") or get("partial_rotary_factor") or get("rotary_pct") or absent
    reading.made["rotary_percentage"] = float(share)
    kind = told.get("rope_type") or told.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        reading.refuse("rope_scaling", f"rope_type {kind!r} is none of default, linear, llama3")
    elif kind != "default":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        found = {name: told.get(name, get(name)) for name in names}
        reading.made["rotary_scaling"] = {"type": kind, **{n: v for n, v in found.items() if v is not None}}


def _read_biases(reading: _Reading) -> None:
    attention, mlp = reading.values.get("attention_bias"), bool(reading.values.get("mlp_bias"))
    if reading.family.architecture == "LlamaForCausalLM":
        if bool(attention) != mlp:
            reading.refuse(
                "attention_bias", f"{bool(attention)} with mlp_bias {mlp}; ours has both or neither"
            )
        reading.made["bias"] = mlp
    elif attention is False and reading.family.architecture.startswith("GPTNeoX"):
        reading.refuse(
            "attention_bias", "False; ours is like True only, for its feed-forward layers have biases"
        )


def _read_windows(reading: _Reading) -> None:
    length, window = reading.get("max_position_embeddings") or 0, reading.get("sliding_window")
    if reading.get("use_sliding_window") is not False and window is not None and window < length:
        reading.refuse("sliding_window", f"{window}, fewer than the {length} positions; ours sees all")
    odd = {str(each) for each in reading.get("layer_types") or ()} - {"full_attention", "sliding_attention"}
    if odd:
        reading.refuse("layer_types", f"{', '.join(sorted(odd))}; ours sees all in every layer")


def _notices(reading: _Reading) -> Iterator[str]:
    family = reading.family
    known = {
        *family.fields,
        family.activation,
        *family.only,
        *NO_EFFECT,
        *REFUSED,
        "scale_attn_weights",
        "embd_pdrop",
    }
    odd = sorted(reading.values.keys() - known - {"use_sliding_window"})
    if odd:
        yield f"config.json has keys that are taken to change nothing: {', '.join(odd)}"
    drops = {reading.values[key] for key in ("resid_pdrop", "embd_pdrop") if key in reading.values}
    if len(drops) > 1:
        yield "embd_pdrop differs from resid_pdrop; hidden_dropout is resid_pdrop"
