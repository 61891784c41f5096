"""Megatron's names of tensors: the trees of Megatron-LM (every checkpoint_version) and of megatron-core, a table a family.

Names carry the layer's number in the whole model. What tensor-parallel ranks share out is said with each rule; the order of fused
rows is that of one part, so that a rank's rows are put right before they are joined with another's. Rules stand in the order of
Megatron's modules.
"""

from __future__ import annotations

from collections.abc import Mapping

from megalith.checkpoint.mapping import (
    SAME,
    Halves,
    HeadOrder,
    Rule,
    Step,
    Table,
    bias_of_tokens,
    linear,
    norm,
    table_of_tokens,
)

VERSIONS: Mapping[int, Step] = {0: HeadOrder("3hd"), 1: HeadOrder("hd3"), 2: SAME, 3: SAME}
"""checkpoint_version → the order of the fused rows of queries, keys and values (absent means 0)."""
_PAIRS: Mapping[int, Step] = {0: HeadOrder("2hd"), 1: HeadOrder("hd2"), 2: SAME, 3: SAME}
"""The same of the fused rows of keys and values alone."""
NAMES: Mapping[str, str] = {"gpt": "GPT", "bert": "BERT", "t5": "T5"}
"""Family → what Megatron calls it. It has no BART."""

_TEXT = "language_model"
_EMBEDDING = (
    table_of_tokens(
        "token_embedding.weight",
        f"{_TEXT}.embedding.word_embeddings.weight",
        "word_embeddings_for_head.weight",
    ),
    Rule(("position_embedding.weight",), (f"{_TEXT}.embedding.position_embeddings.weight",)),
    Rule(("type_embedding.weight",), (f"{_TEXT}.embedding.tokentype_embeddings.weight",)),
)
_BEHIND: Mapping[str, tuple[Rule, ...]] = {
    "gpt": (table_of_tokens("head.weight", f"{_TEXT}.output_layer.weight"),),
    "bert": (
        *linear("pooler.dense", f"{_TEXT}.pooler.dense"),
        bias_of_tokens("output_bias.bias", "lm_head.bias"),
        *linear("lm_head.dense", "lm_head.dense"),
        *norm("lm_head.norm", "lm_head.layernorm"),
        *linear("binary_head", "binary_head"),
    ),
    "t5": (bias_of_tokens("output_bias.bias", "lm_head.bias"),),
}


def legacy(version: int, family: str = "gpt") -> Table:
    """Megatron-LM's tree as checkpoint_version `version` has it (0 to 3)."""
    side = "encoder." if family == "t5" else ""
    return Table(
        f"Megatron-LM's {NAMES[family]} (checkpoint_version {version})",
        rules=(
            *_EMBEDDING,
            *_legacy_stack(version, side, f"{_TEXT}.encoder"),
            *(_legacy_stack(version, "decoder.", f"{_TEXT}.decoder", across=True) if side else ()),
            *_BEHIND[family],
        ),
        aliases=(
            (r"^module\.", ""),
            (r"^(?=(embedding|transformer|encoder|decoder|output_layer|pooler)\.)", f"{_TEXT}."),
            (
                r"^language_model\.(word|position|tokentype)_embeddings",
                r"language_model.embedding.\1_embeddings",
            ),
            (r"^language_model\.(.*\.)?(transformer|encoder)\.", "language_model.encoder."),
            (r"\.attention\.", ".self_attention."),
            (r"\.post_(inter_)?attention_norm\.", r".post_\1attention_layernorm."),
            (r"\.input_norm\.", ".input_layernorm."),
            (r"\.final_norm\.", ".final_layernorm."),
            (r"^lm_head\.norm\.", "lm_head.layernorm."),
        ),
        ignored=(r"_extra_state", r"rotary_pos_emb\.inv_freq$", r"\.rotary_emb\.inv_freq$"),
    )


def _legacy_stack(version: int, side: str, body: str, *, across: bool = False) -> tuple[Rule, ...]:
    """A stack of layers and the norm behind them; `across`: its layers look at an encoder, too."""
    here, there = f"{side}blocks.{{layer}}", f"{body}.layers.{{layer}}"
    looking = (
        *linear(f"{here}.cross.q", f"{there}.inter_attention.query", cut=0),
        *linear(f"{here}.cross.kv", f"{there}.inter_attention.key_value", cut=0, step=_PAIRS[version]),
        *linear(f"{here}.cross.out", f"{there}.inter_attention.dense", cut=1),
        *norm(f"{here}.norm_mlp", f"{there}.post_inter_attention_layernorm"),
    )
    return (
        *norm(f"{here}.norm_attention", f"{there}.input_layernorm"),
        *linear(
            f"{here}.attention.qkv",
            f"{there}.self_attention.query_key_value",
            cut=0,
            step=VERSIONS[version],
        ),
        *linear(f"{here}.attention.out", f"{there}.self_attention.dense", cut=1),
        *norm(f"{here}.{'norm_cross' if across else 'norm_mlp'}", f"{there}.post_attention_layernorm"),
        *(looking if across else ()),
        *_inward(here, f"{there}.mlp.dense_h_to_4h"),
        *linear(f"{here}.mlp.down", f"{there}.mlp.dense_4h_to_h", cut=1),
        *norm(f"{side}final_norm", f"{body}.final_layernorm"),
    )


def _inward(here: str, foreign: str) -> tuple[Rule, ...]:
    """The first half of a feed-forward layer: gate above values where there is a gate."""
    return (
        *linear((f"{here}.mlp.gate", f"{here}.mlp.up"), foreign, cut=0, step=Halves()),
        *linear(f"{here}.mlp.up", foreign, cut=0),
    )


def core(family: str = "gpt", *, split: bool = False) -> Table:
    """megatron-core's tree. `split`: gate and values under names of their own, as some torch_dist folders have them."""
    sides = {
        "gpt": (("", "decoder"),),
        "bert": (("", "encoder"),),
        "t5": (("encoder.", "encoder"), ("decoder.", "decoder")),
    }
    copies = {"t5": ("lm_head.output_layer.weight",)}.get(family, ("output_layer.weight",))
    return Table(
        f"megatron-core's {NAMES[family]}",
        rules=(
            table_of_tokens("token_embedding.weight", "embedding.word_embeddings.weight", *copies),
            Rule(("position_embedding.weight",), ("embedding.position_embeddings.weight",)),
            Rule(("type_embedding.weight",), ("embedding.tokentype_embeddings.weight",)),
            *(rule for side, body in sides[family] for rule in _core_stack(side, body, split=split)),
            *_CORE_BEHIND[family],
        ),
        aliases=(
            (r"^(module|model)\.", ""),
            *(((r"^output_layer\.", "lm_head.output_layer."),) if family == "t5" else ()),
            (r"\.self_attention\.linear_qkv\.layer_norm_(weight|bias)$", r".input_layernorm.\1"),
            (r"\.mlp\.linear_fc1\.layer_norm_(weight|bias)$", r".pre_mlp_layernorm.\1"),
        ),
        ignored=(r"_extra_state", r"rotary_pos_emb\.inv_freq$"),
    )


_CORE_BEHIND: Mapping[str, tuple[Rule, ...]] = {
    "gpt": (table_of_tokens("head.weight", "output_layer.weight"),),
    "bert": (
        *linear("lm_head.dense", "lm_head.dense"),
        *norm("lm_head.norm", "lm_head.layer_norm"),
        table_of_tokens("head.weight", "output_layer.weight"),
        bias_of_tokens("output_bias.bias", "output_layer.bias"),
        *linear("binary_head", "binary_head"),
        *linear("pooler.dense", "pooler.dense"),
    ),
    "t5": (
        table_of_tokens("head.weight", "lm_head.output_layer.weight"),
        bias_of_tokens("output_bias.bias", "lm_head.output_layer.bias"),
    ),
}


def _core_stack(side: str, body: str, *, split: bool) -> tuple[Rule, ...]:
    here, there = f"{side}blocks.{{layer}}", f"{body}.layers.{{layer}}"
    fused = f"{there}.mlp.linear_fc1"
    across = (
        *norm(f"{here}.norm_cross", f"{there}.pre_cross_attn_layernorm"),
        *linear(f"{here}.cross.q", f"{there}.cross_attention.linear_q", cut=0),
        *linear(f"{here}.cross.kv", f"{there}.cross_attention.linear_kv", cut=0),
        *linear(f"{here}.cross.out", f"{there}.cross_attention.linear_proj", cut=1),
    )
    apart = (
        Rule((f"{here}.mlp.{native}.{kind}",), (f"{fused}.{kind}_{letter}",), cut=0)
        for native, letter in (("gate", "w"), ("up", "v"))
        for kind in ("weight", "bias")
    )
    return (
        *norm(f"{here}.norm_attention", f"{there}.input_layernorm"),
        *linear(f"{here}.attention.qkv", f"{there}.self_attention.linear_qkv", cut=0),
        *linear(f"{here}.attention.out", f"{there}.self_attention.linear_proj", cut=1),
        *(across if side == "decoder." else ()),
        *norm(f"{here}.norm_mlp", f"{there}.pre_mlp_layernorm"),
        *(apart if split else ()),
        *_inward(here, fused),
        *linear(f"{here}.mlp.down", f"{there}.mlp.linear_fc2", cut=1),
        *norm(f"{side}final_norm", f"{body}.final_layernorm"),
    )


CORE = core()
