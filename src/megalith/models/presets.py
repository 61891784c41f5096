"""Published shapes by name. A preset is architecture only: no learning rate, no batch size, no weights.

Sources: GPT-2 (Radford et al. 2019; 345m is Megatron-LM's shape of it), GPT-3 (Brown et al. 2020, table 2.1), Llama 2
(Touvron et al. 2023) and Llama 3 (Meta 2024). The nano sizes are minGPT's, for tests and laptops. BERT (Devlin et al. 2018; the
sizes by number are Megatron-LM's, Shoeybi et al. 2019, in its wiring), T5 (Raffel et al. 2020; 1.1: Shazeer 2020; 220m is
Megatron-LM's), BART (Lewis et al. 2019).
"""

from __future__ import annotations

import difflib
from typing import Any

from megalith.errors import ConfigError, Problem
from megalith.models.bert_config import BertConfig
from megalith.models.config import ModelConfig
from megalith.models.encdec_config import EncoderDecoderConfig

_GPT2 = {"vocab_size": 50257, "max_position_embeddings": 1024}
_GPT3 = {"vocab_size": 50257, "max_position_embeddings": 2048}
_LLAMA = {
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "position_embedding_type": "rope",
    "normalization": "rmsnorm",
    "activation": "swiglu",
    "bias": False,
    "share_embeddings_and_output_weights": False,
    "hidden_dropout": 0.0,
}
_BERT = {"vocab_size": 30522, "max_position_embeddings": 512}
_DEVLIN = {
    **_BERT,
    "transformer_block_type": "post_ln",
    "layernorm_epsilon": 1e-12,
    "activation": "gelu_erf",
}
_T5 = {
    "vocab_size": 32128,
    "max_position_embeddings": 512,
    "kv_channels": 64,
    "position_embedding_type": "relative",
    "normalization": "rmsnorm",
    "layernorm_epsilon": 1e-6,
    "activation": "relu",
    "bias": False,
    "attention_scale": 1.0,
    "scale_decoder_output": True,
}
_T5_1_1 = {
    **_T5,
    "activation": "geglu",
    "share_embeddings_and_output_weights": False,
    "scale_decoder_output": False,
}
# The cased WordPiece vocabulary that NeMo trains it with, and 100 sentinels.
_MEGATRON_T5 = {"vocab_size": 29096, "max_position_embeddings": 512, "kv_channels": 64, "output_bias": True}
_BART = {
    "vocab_size": 50265,
    "max_position_embeddings": 1024,
    "transformer_block_type": "post_ln",
    "share_position_embeddings": False,
    "activation": "gelu_erf",
}
_LLAMA3 = {**_LLAMA, "vocab_size": 128256, "max_position_embeddings": 8192, "rotary_base": 500000.0}

Table = dict[str, tuple[dict[str, Any], int, int, int, dict[str, Any]]]
"""Name: (what the series has in common, layers, width, heads, more)."""

_PRESETS: Table = {
    "gpt-nano": (_GPT2, 3, 48, 3, {}),
    "gpt-micro": (_GPT2, 4, 128, 4, {}),
    "gpt-mini": (_GPT2, 6, 192, 6, {}),
    "gpt-laptop": (_GPT2, 6, 512, 8, {}),
    "llama-nano": (_LLAMA, 4, 64, 4, {"num_query_groups": 2, "ffn_hidden_size": 172}),
    "gpt2-124m": (_GPT2, 12, 768, 12, {}),
    "gpt2-345m": (_GPT2, 24, 1024, 16, {}),
    "gpt2-762m": (_GPT2, 36, 1280, 20, {}),
    "gpt2-1.5b": (_GPT2, 48, 1600, 25, {}),
    "gpt3-125m": (_GPT3, 12, 768, 12, {}),
    "gpt3-350m": (_GPT3, 24, 1024, 16, {}),
    "gpt3-760m": (_GPT3, 24, 1536, 16, {}),
    # The table prints 24 heads of 128 for a width of 2048; 16 × 128 is the width, and gives the 1.3 billion.
    "gpt3-1.3b": (_GPT3, 24, 2048, 16, {}),
    "gpt3-2.7b": (_GPT3, 32, 2560, 32, {}),
    "gpt3-6.7b": (_GPT3, 32, 4096, 32, {}),
    # The table prints a width of 5140; 40 heads of 128 are 5120.
    "gpt3-13b": (_GPT3, 40, 5120, 40, {}),
    "gpt3-175b": (_GPT3, 96, 12288, 96, {}),
    "llama2-7b": (_LLAMA, 32, 4096, 32, {"ffn_hidden_size": 11008}),
    "llama2-13b": (_LLAMA, 40, 5120, 40, {"ffn_hidden_size": 13824}),
    "llama2-70b": (_LLAMA, 80, 8192, 64, {"num_query_groups": 8, "ffn_hidden_size": 28672}),
    "llama3-8b": (_LLAMA3, 32, 4096, 32, {"num_query_groups": 8, "ffn_hidden_size": 14336}),
    "llama3-70b": (_LLAMA3, 80, 8192, 64, {"num_query_groups": 8, "ffn_hidden_size": 28672}),
}

_BERT_PRESETS: Table = {
    "bert-110m": (_BERT, 12, 768, 12, {}),
    "bert-345m": (_BERT, 24, 1024, 16, {}),
    "bert-1.3b": (_BERT, 24, 2048, 32, {}),
    "bert-3.9b": (_BERT, 48, 2560, 40, {}),
    "bert-base-uncased": (_DEVLIN, 12, 768, 12, {}),
    "bert-large-uncased": (_DEVLIN, 24, 1024, 16, {}),
}
_T5_PRESETS: Table = {
    "t5-220m": (_MEGATRON_T5, 12, 768, 12, {}),
    "t5-small": (_T5, 6, 512, 8, {"ffn_hidden_size": 2048}),
    "t5-base": (_T5, 12, 768, 12, {"ffn_hidden_size": 3072}),
    "t5-large": (_T5, 24, 1024, 16, {"ffn_hidden_size": 4096}),
    "t5-3b": (_T5, 24, 1024, 32, {"ffn_hidden_size": 16384, "kv_channels": 128}),
    "t5-11b": (_T5, 24, 1024, 128, {"ffn_hidden_size": 65536, "kv_channels": 128}),
    "t5-v1.1-small": (_T5_1_1, 8, 512, 6, {"ffn_hidden_size": 1024}),
    "t5-v1.1-base": (_T5_1_1, 12, 768, 12, {"ffn_hidden_size": 2048}),
    "t5-v1.1-large": (_T5_1_1, 24, 1024, 16, {"ffn_hidden_size": 2816}),
    "t5-v1.1-xl": (_T5_1_1, 24, 2048, 32, {"ffn_hidden_size": 5120}),
    "t5-v1.1-xxl": (_T5_1_1, 24, 4096, 64, {"ffn_hidden_size": 10240}),
}
_BART_PRESETS: Table = {
    "bart-base": (_BART, 6, 768, 12, {}),
    "bart-large": (_BART, 12, 1024, 16, {}),
}
_FAMILIES: dict[str, tuple[type[ModelConfig], Table]] = {
    "gpt": (ModelConfig, _PRESETS),
    "bert": (BertConfig, _BERT_PRESETS),
    "t5": (EncoderDecoderConfig, _T5_PRESETS),
    "bart": (EncoderDecoderConfig, _BART_PRESETS),
}


def names(family: str = "gpt") -> list[str]:
    """Every preset of a family of `models.family`, smallest group first."""
    return list(_FAMILIES[family][1])


def get(name: str, **changes: Any) -> ModelConfig:
    """The config of a preset, of its family's class, with some fields changed (`get("gpt2-124m", vocab_size=32000)`).

    Errors: `ConfigError` with the nearest names for an unknown preset.
    """
    for config_class, table in _FAMILIES.values():
        if name in table:
            base, layers, width, heads, more = table[name]
            shape = {"num_layers": layers, "hidden_size": width, "num_attention_heads": heads}
            return config_class(**{**base, **shape, **more, **changes})
    known = [preset for family in _FAMILIES for preset in names(family)]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
    raise ConfigError([Problem("preset", f"no model is called {name!r}", f"one of {', '.join(near)}")])
