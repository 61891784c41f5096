"""Megatron's arguments as a `ModelConfig`: what a file's own say, what a person adds, what the shapes of the tensors show.

    args in the file, else config_file ─┐
    shapes of the tensors ──────────────┴─▶ fields, each with where it comes from

An argument that makes another model than ours can be is refused by its name; what two sources say differently is an error. Knows
names of arguments from Megatron-LM's first version to megatron-core's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from megalith.checkpoint.formats.megatron_shapes import Seen
from megalith.errors import CheckpointError
from megalith.models.config import GATED_ACTIVATIONS, ActivationName

NAMES = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "kv_channels": "kv_channels",
    "ffn_hidden_size": "ffn_hidden_size",
    "max_position_embeddings": "max_position_embeddings",
    "rotary_percent": "rotary_percentage",
    "rotary_base": "rotary_base",
    "rotary_interleaved": "rotary_interleaved",
    "layernorm_epsilon": "layernorm_epsilon",
    "norm_epsilon": "layernorm_epsilon",
    "apply_residual_connection_post_layernorm": "apply_residual_connection_post_layernorm",
    "hidden_dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
    "init_method_std": "init_method_std",
    "decoder_num_layers": "decoder_num_layers",
}
"""Argument → field, where the value is the same. A later line wins."""
SYNONYMS = {
    "max_seq_length": "max_position_embeddings",
    "encoder_num_layers": "num_layers",
    "layers": "num_layers",
}
OTHER_MODELS: Mapping[str, tuple[Any, ...]] = {
    "num_experts": (None, 0, 1, [1]),
    "apply_layernorm_1p": (None, False),
    "layernorm_zero_centered_gamma": (None, False),
    "multi_latent_attention": (None, False),
    "qk_layernorm": (None, False),
    "qk_l2_norm": (None, False),
    "quick_geglu": (None, False),
    "window_size": (None, (-1, -1), [-1, -1]),
    "retro_add_retriever": (None, False),
    "mtp_num_layers": (None, 0),
    "heterogeneous_layers_config_path": (None,),
    "hybrid_override_pattern": (None,),
    "hybrid_attention_ratio": (None, 0, 0.0),
    "hybrid_mlp_ratio": (None, 0, 0.0),
    "no_rope_freq": (None,),
    "softmax_type": (None, "vanilla"),
    "attention_output_gate": (None, False),
    "use_ring_exchange_attention": (None, False),
    "mup": (None, False),
    "embedding_layernorm": (None, False),
    "embed_layernorm": (None, False),
    "use_alibi_position_embeddings": (None, False),
}
"""Argument → the values at which it changes nothing; with any other it is another model."""
ACTIVATIONS = get_args(ActivationName)
"""Values of an argument `activation`: what a program that is not Megatron's own says is given in our words."""
POSITIONS = {"learned_absolute": "learned_absolute", "rope": "rope", "rotary": "rope", "none": "none"}


@dataclass
class Facts:
    """`said`: arguments, `source` where they stand. `fields`, `origins` and `wrong` are what `settle` makes of them."""

    said: Mapping[str, Any]
    source: str
    fields: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def put(self, name: str, value: Any, origin: str) -> None:
        """A field and where it comes from."""
        self.fields[name], self.origins[name] = value, origin


def refuse_others(facts: Facts, *, where: str) -> None:
    """Errors: one `CheckpointError` with every argument that makes another model."""
    facts.said = {SYNONYMS.get(name, name): value for name, value in facts.said.items()}
    wrong = [
        f"{name}={facts.said[name]!r}"
        for name, neutral in OTHER_MODELS.items()
        if name in facts.said and facts.said[name] not in neutral
    ]
    if wrong:
        raise CheckpointError(f"ours has nothing like {', '.join(wrong)} ({facts.source})", where=where)


def settle(facts: Facts, seen: Seen, *, where: str) -> Facts:
    """Fills in the fields. Errors: one `CheckpointError` with everything that is missing or contradicts the tensors."""
    for argument, name in NAMES.items():
        if facts.said.get(argument) is not None:
            facts.put(name, facts.said[argument], f"{argument} ({facts.source})")
    for what, step in STEPS.items():
        try:
            step(facts, seen)
        except (TypeError, ValueError, LookupError, ArithmeticError) as error:
            facts.wrong.append(f"{what}: of another kind than they should be ({error})")
    if facts.wrong:
        raise CheckpointError(
            "\n    ".join(["its architecture is not certain, or not one of ours", *facts.wrong]),
            where=where,
            fix="what the file does not say itself goes into --config-file FILE (JSON or YAML: num-attention-heads: 16)",
        )
    return facts


def _shapes(facts: Facts, seen: Seen) -> None:
    """What the tensors show; arguments that say otherwise belong to another file."""
    for name, value in seen.sizes().items():
        told = facts.fields.get(name)
        if told is not None and told != value:
            facts.wrong.append(f"{name}: {told} by {facts.origins[name]}, {value} by the tensors' shapes")
        elif told is None:
            facts.put(name, value, "the tensors' shapes")


PUBLISHED = {(24, 1024, 1024): 16, (24, 1024, 512): 16}
"""Layers, width, positions → heads of NVIDIA's 345M releases (GPT, BERT), whose files do not say."""


def _heads(facts: Facts, seen: Seen) -> None:
    said, fields = facts.said, facts.fields
    heads = fields.get("num_attention_heads")
    if heads is None:
        shape = (fields["num_layers"], fields["hidden_size"], fields.get("max_position_embeddings"))
        heads = next((n for known, n in PUBLISHED.items() if known == shape), None)
        if heads is None:
            facts.wrong.append("num_attention_heads: the file does not say, and shapes do not tell")
            return
        facts.put("num_attention_heads", heads, "the released 345M model of this shape")
    grouped = said.get("group_query_attention")
    groups = said.get("num_query_groups") if grouped or grouped is None else None
    groups = groups or heads
    if groups != heads:
        facts.put("num_query_groups", groups, f"num_query_groups ({facts.source})")
    dim = fields.get("kv_channels") or fields["hidden_size"] // heads
    if seen.query_key_value != (heads + 2 * groups) * dim:
        facts.wrong.append(
            f"num_attention_heads: {heads} of {dim} channels and {groups} key-value heads make {(heads + 2 * groups) * dim} "
            f"rows of queries, keys and values, there are {seen.query_key_value}"
        )
    if fields.get("kv_channels") == fields["hidden_size"] / heads:
        fields.pop("kv_channels")


def _activation(facts: Facts, seen: Seen) -> None:
    """Fused bias and GELU is the tanh form whatever else is said; without it torch's exact one unless OpenAI's is asked for.

    A file that says nothing is from before there was a choice: tanh.
    """
    said = facts.said
    unfused = (
        "openai_gelu"
        if said.get("openai_gelu")
        else "onnx_safe"
        if said.get("onnx_safe")
        else "bias_gelu_fusion"
    )
    glu = str(said.get("glu_activation") or "").lower()
    if said.get("activation") in ACTIVATIONS:
        name, origin = said["activation"], "activation"
    elif said.get("swiglu") or glu == "swiglu":
        name, origin = "swiglu", "swiglu"
    elif glu in ("geglu", "reglu"):
        name, origin = {"geglu": "geglu_erf"}.get(glu, glu), "glu_activation"
    elif glu:
        facts.wrong.append(f"glu_activation={glu!r}: ours has nothing like it")
        return
    elif said.get("squared_relu"):
        name, origin = "squared_relu", "squared_relu"
    elif said.get("bias_gelu_fusion") or said.get("openai_gelu"):
        name, origin = "gelu_tanh", "bias_gelu_fusion" if said.get("bias_gelu_fusion") else "openai_gelu"
    elif any(key in said for key in ("bias_gelu_fusion", "openai_gelu", "onnx_safe")):
        name, origin = "gelu_erf", unfused
    elif seen.gated:
        name, origin = "swiglu", ""
    else:
        name, origin = "gelu_tanh", ""
    if seen.gated != (name in GATED_ACTIVATIONS):
        facts.wrong.append(
            f"{origin or 'activation'}: {name}, but the feed-forward layers have {'a' if seen.gated else 'no'} gate"
        )
    value = f"{origin}={said.get(origin)} ({facts.source})" if origin else "no argument says otherwise"
    facts.put("activation", name, value)


def _norms_and_biases(facts: Facts, seen: Seen) -> None:
    said = facts.said
    norm = str(said.get("normalization") or ("LayerNorm" if seen.norm_bias else "RMSNorm")).lower()
    if norm not in ("layernorm", "rmsnorm") or seen.norm_bias != (norm == "layernorm"):
        facts.wrong.append(f"normalization: {norm}, but norms have {'a' if seen.norm_bias else 'no'} bias")
    facts.put("normalization", norm, "normalization" if said.get("normalization") else "the tensors' names")
    facts.put("bias", seen.bias, "the tensors' names")
    if seen.qkv_bias != seen.bias:
        facts.put("qkv_bias", seen.qkv_bias, "the tensors' names")


def _positions(facts: Facts, seen: Seen) -> None:
    said = facts.said
    kind = said.get("position_embedding_type")
    if kind is None or said.get("use_rotary_position_embeddings"):
        rotary = said.get("use_rotary_position_embeddings") or "rotary_percent" in said
        kind = "learned_absolute" if seen.positions else "rope" if rotary or not said else "none"
    if kind not in POSITIONS:
        facts.wrong.append(f"position_embedding_type={kind!r}: ours has {', '.join(POSITIONS)}")
        return
    kind = POSITIONS[kind]
    if seen.positions and kind != "learned_absolute":
        facts.wrong.append(f"position_embedding_type: {kind}, but there is a table of positions")
    facts.put("position_embedding_type", kind, "position_embedding_type" if said else "the tensors' names")
    if kind != "rope":
        for name in ("rotary_percentage", "rotary_base", "rotary_interleaved"):
            facts.fields.pop(name, None)
        return
    factor = said.get("rotary_seq_len_interpolation_factor")
    if factor not in (None, 1):
        facts.put(
            "rotary_scaling", {"type": "linear", "factor": factor}, "rotary_seq_len_interpolation_factor"
        )
    if said.get("use_rope_scaling"):
        factor = said.get("rope_scaling_factor") or 8.0
        facts.put("rotary_scaling", {"type": "llama3", "factor": factor}, "use_rope_scaling")


def _head(facts: Facts, seen: Seen) -> None:
    untied = facts.said.get("untie_embeddings_and_output_weights")
    if untied is None:
        untied = seen.output
    if untied and not seen.output:
        facts.wrong.append("untie_embeddings_and_output_weights: there is no output_layer.weight")
    facts.put("share_embeddings_and_output_weights", not untied, "untie_embeddings_and_output_weights")


def _family(facts: Facts, seen: Seen) -> None:
    """Token types, heads, a decoder. The layer before BERT's head has the exact GELU, but for OpenAI's, whatever the others have."""
    types = facts.said.get("num_tokentypes")
    if seen.family != "t5":
        facts.fields.pop("decoder_num_layers", None)
    if types is not None and types != seen.types:
        facts.wrong.append(f"num_tokentypes: {types} ({facts.source}), the tensors have {seen.types}")
    if seen.family == "bert":
        facts.put("num_tokentypes", seen.types, "the tensors' names")
        facts.put("bert_binary_head", seen.binary, "the tensors' names")
        exact = not facts.said.get("openai_gelu")
        facts.put(
            "lm_head_activation",
            "gelu_erf" if exact else "gelu_tanh",
            "openai_gelu" if not exact else "Megatron's code",
        )
    if seen.family == "t5":
        facts.put("output_bias", seen.output_bias, "the tensors' names")
        if seen.decoder_ffn != seen.ffn:
            facts.put("decoder_ffn_hidden_size", seen.decoder_ffn, "the tensors' shapes")


STEPS: Mapping[str, Callable[[Facts, Seen], None]] = {
    "sizes": _shapes,
    "attention heads": _heads,
    "activation": _activation,
    "norms and biases": _norms_and_biases,
    "positions": _positions,
    "output layer": _head,
    "family": _family,
}
