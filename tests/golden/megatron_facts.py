"""What Megatron's arguments say of the tiny models, in the words of each era."""

from __future__ import annotations

from tests.golden.tiny import HEADS, LAYERS, POSITIONS, WIDTH

GELU = {
    "fused": ({"bias_gelu_fusion": True, "openai_gelu": False, "onnx_safe": None}, "gelu_new"),
    "unfused": ({"bias_gelu_fusion": False, "openai_gelu": False, "onnx_safe": None}, "gelu"),
    "openai": ({"bias_gelu_fusion": False, "openai_gelu": True, "onnx_safe": None}, "gelu_new"),
    "onnx": ({"bias_gelu_fusion": False, "openai_gelu": False, "onnx_safe": True}, "gelu"),
    "early": ({"openai_gelu": False}, "gelu"),  # before there was a fused kernel
}
"""Switches of the activation, and the name of what they compute in `transformers`.

The fused kernel is the tanh form whatever else is said; without it torch's GELU, with the error function, unless OpenAI's
is asked for; the form that is safe for ONNX writes the error function out.
"""


def gpt2_facts(gelu: str = "fused", era: str = "v3") -> dict[str, object]:
    """Arguments of the tiny GPT-2. The first era has neither the fusion nor ONNX's form, nor inner sizes."""
    switches, _ = GELU[gelu]
    facts: dict[str, object] = {
        "num_layers": LAYERS,
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "seq_length": POSITIONS,
        "layernorm_epsilon": 1e-5,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "make_vocab_size_divisible_by": 128,
        "tokenizer_type": "GPT2BPETokenizer",
    }
    if era == "v1":
        return facts | {"openai_gelu": switches["openai_gelu"]}
    facts |= switches | {"ffn_hidden_size": 4 * WIDTH, "kv_channels": WIDTH // HEADS}
    if era == "v3":
        facts |= {
            "swiglu": False,
            "position_embedding_type": "learned_absolute",
            "normalization": "LayerNorm",
        }
        facts |= {"untie_embeddings_and_output_weights": False, "add_bias_linear": True}
        facts |= {"group_query_attention": False, "num_query_groups": 1}
    return facts


def llama_facts(groups: int, tied: bool) -> dict[str, object]:
    """Arguments of the tiny Llama. Without grouped queries the number of groups is 1 in the arguments, and means nothing."""
    grouped = groups != HEADS
    return {
        "num_layers": LAYERS,
        "hidden_size": WIDTH,
        "ffn_hidden_size": 48,
        "num_attention_heads": HEADS,
        "kv_channels": WIDTH // HEADS,
        "group_query_attention": grouped,
        "num_query_groups": groups if grouped else 1,
        "max_position_embeddings": POSITIONS,
        "seq_length": POSITIONS,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-5,
        "layernorm_epsilon": 1e-5,
        "position_embedding_type": "rope",
        "use_rotary_position_embeddings": True,
        "add_position_embedding": False,
        "rotary_percent": 1.0,
        "rotary_base": 10000,
        "rotary_interleaved": False,
        "swiglu": True,
        "bias_gelu_fusion": False,
        "bias_swiglu_fusion": True,
        "openai_gelu": False,
        "onnx_safe": None,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "untie_embeddings_and_output_weights": not tied,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "make_vocab_size_divisible_by": 128,
        "tokenizer_type": "Llama2Tokenizer",
    }
