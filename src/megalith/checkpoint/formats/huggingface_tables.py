"""Hugging Face's names of tensors, a table a family; those of models with an encoder are in a module of their own.

Llama's holds for Mistral and Qwen2, too: what they lack (biases, a head of its own) is left out with the model's own tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

from megalith.checkpoint.formats.huggingface_encoder_tables import BART, BERT, MEGATRON_BERT, T5
from megalith.checkpoint.mapping import (
    HeadOrder,
    Rule,
    Table,
    Then,
    Transposed,
    Woven,
    linear,
    norm,
    table_of_tokens,
)

GPT2 = Table(
    "Hugging Face's GPT-2",
    rules=(
        table_of_tokens("token_embedding.weight", "transformer.wte.weight", "lm_head.weight"),
        Rule(("position_embedding.weight",), ("transformer.wpe.weight",)),
        *norm("blocks.{layer}.norm_attention", "transformer.h.{layer}.ln_1"),
        *linear(
            "blocks.{layer}.attention.qkv",
            "transformer.h.{layer}.attn.c_attn",
            step=Then(Transposed(), HeadOrder("3hd")),
        ),
        *linear("blocks.{layer}.attention.out", "transformer.h.{layer}.attn.c_proj", step=Transposed()),
        *norm("blocks.{layer}.norm_mlp", "transformer.h.{layer}.ln_2"),
        *linear("blocks.{layer}.mlp.up", "transformer.h.{layer}.mlp.c_fc", step=Transposed()),
        *linear("blocks.{layer}.mlp.down", "transformer.h.{layer}.mlp.c_proj", step=Transposed()),
        *norm("final_norm", "transformer.ln_f"),
        table_of_tokens("head.weight", "lm_head.weight"),
    ),
    aliases=((r"^(wte|wpe|h|ln_f)\.", r"transformer.\1."),),
    ignored=(r"\.attn\.(masked_)?bias$",),
)

LLAMA = Table(
    "Hugging Face's Llama",
    rules=(
        table_of_tokens("token_embedding.weight", "model.embed_tokens.weight", "lm_head.weight"),
        *norm("blocks.{layer}.norm_attention", "model.layers.{layer}.input_layernorm"),
        *linear(
            "blocks.{layer}.attention.qkv",
            tuple(f"model.layers.{{layer}}.self_attn.{each}_proj" for each in "qkv"),
            step=Woven(),
        ),
        *linear("blocks.{layer}.attention.out", "model.layers.{layer}.self_attn.o_proj"),
        *norm("blocks.{layer}.norm_mlp", "model.layers.{layer}.post_attention_layernorm"),
        *linear("blocks.{layer}.mlp.gate", "model.layers.{layer}.mlp.gate_proj"),
        *linear("blocks.{layer}.mlp.up", "model.layers.{layer}.mlp.up_proj"),
        *linear("blocks.{layer}.mlp.down", "model.layers.{layer}.mlp.down_proj"),
        *norm("final_norm", "model.norm"),
        table_of_tokens("head.weight", "lm_head.weight"),
    ),
    aliases=((r"^(embed_tokens|layers|norm)\.", r"model.\1."),),
    ignored=(r"\.rotary_emb\.inv_freq$",),
)

NEOX = Table(
    "Hugging Face's GPT-NeoX",
    rules=(
        table_of_tokens(
            "token_embedding.weight", "gpt_neox.embed_in.weight", "embed_out.weight", "lm_head.weight"
        ),
        *norm("blocks.{layer}.norm_attention", "gpt_neox.layers.{layer}.input_layernorm"),
        *linear("blocks.{layer}.attention.qkv", "gpt_neox.layers.{layer}.attention.query_key_value"),
        *linear("blocks.{layer}.attention.out", "gpt_neox.layers.{layer}.attention.dense"),
        *norm("blocks.{layer}.norm_mlp", "gpt_neox.layers.{layer}.post_attention_layernorm"),
        *linear("blocks.{layer}.mlp.up", "gpt_neox.layers.{layer}.mlp.dense_h_to_4h"),
        *linear("blocks.{layer}.mlp.down", "gpt_neox.layers.{layer}.mlp.dense_4h_to_h"),
        *norm("final_norm", "gpt_neox.final_layer_norm"),
        table_of_tokens("head.weight", "embed_out.weight"),
    ),
    aliases=((r"^lm_head\.", "embed_out."),),
    ignored=(r"\.attention\.(masked_)?bias$", r"\.rotary_emb\.inv_freq$"),
)

TABLES: Mapping[str, Table] = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "gpt_neox": NEOX,
    "bert": BERT,
    "megatron-bert": MEGATRON_BERT,
    "t5": T5,
    "mt5": T5,
    "bart": BART,
}
"""`model_type` of a config.json → its table."""
