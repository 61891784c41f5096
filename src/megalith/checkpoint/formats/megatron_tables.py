"""Megatron's names of a GPT's tensors: the tree of Megatron-LM (every checkpoint_version) and megatron-core's.

Names carry the layer's number in the whole model. What tensor-parallel ranks share out is said with each rule; the order of fused
rows is that of one part, so that a rank's rows are put right before they are joined with another's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from megalith.checkpoint.mapping import (
    SAME,
    Halves,
    HeadOrder,
    Rule,
    Step,
    Table,
    linear,
    norm,
    table_of_tokens,
)

VERSIONS: Mapping[int, Step] = {0: HeadOrder("3hd"), 1: HeadOrder("hd3"), 2: SAME, 3: SAME}
"""checkpoint_version → the order of the fused rows of queries, keys and values (absent means 0)."""

_LAYER = "language_model.encoder.layers.{layer}"
_CORE = "decoder.layers.{layer}"


def legacy(version: int) -> Table:
    """Megatron-LM's tree as checkpoint_version `version` has it (0 to 3)."""
    return Table(
        f"Megatron-LM's GPT (checkpoint_version {version})",
        rules=(
            table_of_tokens(
                "token_embedding.weight",
                "language_model.embedding.word_embeddings.weight",
                "word_embeddings_for_head.weight",
            ),
            Rule(("position_embedding.weight",), ("language_model.embedding.position_embeddings.weight",)),
            *norm("blocks.{layer}.norm_attention", f"{_LAYER}.input_layernorm"),
            *linear(
                "blocks.{layer}.attention.qkv",
                f"{_LAYER}.self_attention.query_key_value",
                cut=0,
                step=VERSIONS[version],
            ),
            *linear("blocks.{layer}.attention.out", f"{_LAYER}.self_attention.dense", cut=1),
            *norm("blocks.{layer}.norm_mlp", f"{_LAYER}.post_attention_layernorm"),
            *_inward(f"{_LAYER}.mlp.dense_h_to_4h"),
            *linear("blocks.{layer}.mlp.down", f"{_LAYER}.mlp.dense_4h_to_h", cut=1),
            *norm("final_norm", "language_model.encoder.final_layernorm"),
            table_of_tokens("head.weight", "language_model.output_layer.weight"),
        ),
        aliases=(
            (r"^module\.", ""),
            (r"^(?=(embedding|transformer|encoder|output_layer)\.)", "language_model."),
            (
                r"^language_model\.(word|position|tokentype)_embeddings",
                r"language_model.embedding.\1_embeddings",
            ),
            (r"^language_model\.(.*\.)?(transformer|encoder)\.", "language_model.encoder."),
            (r"\.attention\.", ".self_attention."),
            (r"\.post_attention_norm\.", ".post_attention_layernorm."),
            (r"\.input_norm\.", ".input_layernorm."),
            (r"\.final_norm\.", ".final_layernorm."),
        ),
        ignored=(r"_extra_state", r"rotary_pos_emb\.inv_freq$", r"\.rotary_emb\.inv_freq$"),
    )


def _inward(foreign: str) -> tuple[Rule, ...]:
    """The first half of a feed-forward layer: gate above values where there is a gate."""
    both = ("blocks.{layer}.mlp.gate", "blocks.{layer}.mlp.up")
    return (
        *linear(both, foreign, cut=0, step=Halves()),
        *linear("blocks.{layer}.mlp.up", foreign, cut=0),
    )


CORE = Table(
    "megatron-core's GPT",
    rules=(
        table_of_tokens("token_embedding.weight", "embedding.word_embeddings.weight", "output_layer.weight"),
        Rule(("position_embedding.weight",), ("embedding.position_embeddings.weight",)),
        *norm("blocks.{layer}.norm_attention", f"{_CORE}.input_layernorm"),
        *linear("blocks.{layer}.attention.qkv", f"{_CORE}.self_attention.linear_qkv", cut=0),
        *linear("blocks.{layer}.attention.out", f"{_CORE}.self_attention.linear_proj", cut=1),
        *norm("blocks.{layer}.norm_mlp", f"{_CORE}.pre_mlp_layernorm"),
        *_inward(f"{_CORE}.mlp.linear_fc1"),
        *linear("blocks.{layer}.mlp.down", f"{_CORE}.mlp.linear_fc2", cut=1),
        *norm("final_norm", "decoder.final_layernorm"),
        table_of_tokens("head.weight", "output_layer.weight"),
    ),
    aliases=(
        (r"^(module|model)\.", ""),
        (r"\.self_attention\.linear_qkv\.layer_norm_(weight|bias)$", r".input_layernorm.\1"),
        (r"\.mlp\.linear_fc1\.layer_norm_(weight|bias)$", r".pre_mlp_layernorm.\1"),
    ),
    ignored=(r"_extra_state", r"rotary_pos_emb\.inv_freq$"),
)

_GATE, _UP = "blocks.{layer}.mlp.gate", "blocks.{layer}.mlp.up"
CORE_SPLIT = replace(
    CORE,
    rules=(
        *(
            Rule((f"{native}.{kind}",), (f"{_CORE}.mlp.linear_fc1.{kind}_{letter}",), cut=0)
            for native, letter in ((_GATE, "w"), (_UP, "v"))
            for kind in ("weight", "bias")
        ),
        *CORE.rules,
    ),
)
"""Gate and values under names of their own, as some torch_dist folders have them."""
