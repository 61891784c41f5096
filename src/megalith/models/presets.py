"""Published shapes by name. A preset is architecture only: no learning rate, no batch size, no weights.

Sources: GPT-2 (Radford et al. 2019; 345m is Megatron-LM's shape of it), GPT-3 (Brown et al. 2020, table 2.1), Llama 2
(Touvron et al. 2023) and Llama 3 (Meta 2024). The nano sizes are minGPT's, for tests and laptops.
"""

from __future__ import annotations

import difflib
from typing import Any

from megalith.errors import ConfigError, Problem
from megalith.models.config import ModelConfig

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
_LLAMA3 = {**_LLAMA, "vocab_size": 128256, "max_position_embeddings": 8192, "rotary_base": 500000.0}

# name: (family, layers, width, heads, more)
_PRESETS: dict[str, tuple[dict[str, Any], int, int, int, dict[str, Any]]] = {
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


def names() -> list[str]:
    """Every preset, smallest family first."""
    return list(_PRESETS)


def get(name: str, **changes: Any) -> ModelConfig:
    """The config of a preset, with some fields changed (`get("gpt2-124m", vocab_size=32000)`).

    Errors: `ConfigError` with the nearest names for an unknown preset.
    """
    if name not in _PRESETS:
        near = difflib.get_close_matches(name, _PRESETS, n=3, cutoff=0.4) or names()
        raise ConfigError([Problem("preset", f"no model is called {name!r}", f"one of {', '.join(near)}")])
    family, layers, width, heads, more = _PRESETS[name]
    shape = {"num_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    return ModelConfig(**{**family, **shape, **more, **changes})
