"""Hugging Face's names of tensors, of models with an encoder: BERT, Megatron BERT, T5, BART.

Layers of a stack without its head lie under names without the family's prefix; older BERTs call a norm's scale gamma. What only
some classes of a family have (poolers without a binary head, heads of classifiers) is known and left out.
"""

from __future__ import annotations

from megalith.checkpoint.mapping import (
    Behind,
    OneRow,
    Rule,
    Table,
    Woven,
    bias_of_tokens,
    linear,
    norm,
    table_of_tokens,
)

LEFT_OUT = r"^(bert\.pooler|classifier|qa_outputs|classification_head)\."
"""Layers behind an encoder that no model here has, or (the pooler) has with a binary head only."""

_LAYER = "bert.encoder.layer.{layer}"
_BERT_ALIASES = (
    (r"^(embeddings|encoder|pooler)\.", r"bert.\1."),
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
)


def _bert(name: str, norm_attention: str, norm_mlp: str, ends: tuple[Rule, ...]) -> Table:
    return Table(
        name,
        rules=(
            table_of_tokens(
                "token_embedding.weight",
                "bert.embeddings.word_embeddings.weight",
                "cls.predictions.decoder.weight",
            ),
            Rule(("position_embedding.weight",), ("bert.embeddings.position_embeddings.weight",)),
            Rule(("type_embedding.weight",), ("bert.embeddings.token_type_embeddings.weight",)),
            *ends,
            *linear(
                "blocks.{layer}.attention.qkv",
                tuple(f"{_LAYER}.attention.self.{each}" for each in ("query", "key", "value")),
                step=Woven(),
            ),
            *linear("blocks.{layer}.attention.out", f"{_LAYER}.attention.output.dense"),
            *norm("blocks.{layer}.norm_attention", f"{_LAYER}.{norm_attention}"),
            *linear("blocks.{layer}.mlp.up", f"{_LAYER}.intermediate.dense"),
            *linear("blocks.{layer}.mlp.down", f"{_LAYER}.output.dense"),
            *norm("blocks.{layer}.norm_mlp", f"{_LAYER}.{norm_mlp}"),
            *linear("pooler.dense", "bert.pooler.dense"),
            *linear("lm_head.dense", "cls.predictions.transform.dense"),
            *norm("lm_head.norm", "cls.predictions.transform.LayerNorm"),
            Rule(  # a head of its own has its bias with it
                ("head.weight", "output_bias.bias"),
                ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
                cut=0,
                padded=True,
                copies=("cls.predictions.bias",),
            ),
            bias_of_tokens("output_bias.bias", "cls.predictions.bias", "cls.predictions.decoder.bias"),
            *linear("binary_head", "cls.seq_relationship"),
        ),
        aliases=_BERT_ALIASES,
        ignored=(r"\.(position_ids|token_type_ids)$", LEFT_OUT),
    )


BERT = _bert(
    "Hugging Face's BERT",
    "attention.output.LayerNorm",
    "output.LayerNorm",
    norm("norm_embedding", "bert.embeddings.LayerNorm"),
)
MEGATRON_BERT = _bert(
    "Hugging Face's Megatron BERT", "attention.ln", "ln", norm("final_norm", "bert.encoder.ln")
)


def _t5_stack(side: str) -> tuple[Rule, ...]:
    here, there = f"{side}.blocks.{{layer}}", f"{side}.block.{{layer}}.layer"
    last = 1 if side == "encoder" else 2
    inner = f"{there}.{last}.DenseReluDense"
    across = (
        *linear(f"{here}.cross.q", f"{there}.1.EncDecAttention.q"),
        *linear(
            f"{here}.cross.kv",
            tuple(f"{there}.1.EncDecAttention.{each}" for each in "kv"),
            step=Woven(queries=False),
        ),
        *linear(f"{here}.cross.out", f"{there}.1.EncDecAttention.o"),
        *norm(f"{here}.norm_cross", f"{there}.1.layer_norm"),
    )
    first = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return (
        Rule((f"{side}.relative_bias.weight",), (first,)),
        *linear(
            f"{here}.attention.qkv",
            tuple(f"{there}.0.SelfAttention.{each}" for each in "qkv"),
            step=Woven(),
        ),
        *linear(f"{here}.attention.out", f"{there}.0.SelfAttention.o"),
        *norm(f"{here}.norm_attention", f"{there}.0.layer_norm"),
        *(across if side == "decoder" else ()),
        Rule((f"{here}.mlp.gate.weight", f"{here}.mlp.up.weight"), (f"{inner}.wi_0.weight", f"{inner}.wi_1.weight")),
        Rule((f"{here}.mlp.up.weight",), (f"{inner}.wi.weight",)),
        Rule((f"{here}.mlp.down.weight",), (f"{inner}.wo.weight",)),
        *norm(f"{here}.norm_mlp", f"{there}.{last}.layer_norm"),
        *norm(f"{side}.final_norm", f"{side}.final_layer_norm"),
    )  # fmt: skip


T5 = Table(
    "Hugging Face's T5",
    rules=(
        table_of_tokens(
            "token_embedding.weight",
            "shared.weight",
            "encoder.embed_tokens.weight",
            "decoder.embed_tokens.weight",
            "lm_head.weight",
        ),
        *_t5_stack("encoder"),
        *_t5_stack("decoder"),
        table_of_tokens("head.weight", "lm_head.weight"),
    ),
    ignored=(r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$", LEFT_OUT),
)


def _bart_stack(side: str) -> tuple[Rule, ...]:
    here, there = f"{side}.blocks.{{layer}}", f"model.{side}.layers.{{layer}}"
    across = (
        *linear(f"{here}.cross.q", f"{there}.encoder_attn.q_proj"),
        *linear(
            f"{here}.cross.kv",
            tuple(f"{there}.encoder_attn.{each}_proj" for each in "kv"),
            step=Woven(queries=False),
        ),
        *linear(f"{here}.cross.out", f"{there}.encoder_attn.out_proj"),
        *norm(f"{here}.norm_cross", f"{there}.encoder_attn_layer_norm"),
    )
    return (
        Rule(
            (f"{side}.position_embedding.weight",), (f"model.{side}.embed_positions.weight",), Behind(2)
        ),  # two rows of theirs were once meant for padding
        *norm(f"{side}.norm_embedding", f"model.{side}.layernorm_embedding"),
        *linear(
            f"{here}.attention.qkv", tuple(f"{there}.self_attn.{each}_proj" for each in "qkv"), step=Woven()
        ),
        *linear(f"{here}.attention.out", f"{there}.self_attn.out_proj"),
        *norm(f"{here}.norm_attention", f"{there}.self_attn_layer_norm"),
        *(across if side == "decoder" else ()),
        *linear(f"{here}.mlp.up", f"{there}.fc1"),
        *linear(f"{here}.mlp.down", f"{there}.fc2"),
        *norm(f"{here}.norm_mlp", f"{there}.final_layer_norm"),
    )


BART = Table(
    "Hugging Face's BART",
    rules=(
        table_of_tokens(
            "token_embedding.weight",
            "model.shared.weight",
            "model.encoder.embed_tokens.weight",
            "model.decoder.embed_tokens.weight",
            "lm_head.weight",
        ),
        *_bart_stack("encoder"),
        *_bart_stack("decoder"),
        bias_of_tokens("output_bias.bias", "final_logits_bias", step=OneRow()),
    ),
    aliases=((r"^(shared|encoder|decoder)\.", r"model.\1."),),
    ignored=(r"\.(encoder|decoder)\.version$", LEFT_OUT),
)
