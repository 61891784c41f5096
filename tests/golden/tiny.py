"""Tiny float64 models of `transformers` with no number left at its default, and their logits: what every golden is held to."""

from __future__ import annotations

import math

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY, WIDTH, HEADS, LAYERS, POSITIONS = 91, 32, 8, 4, 24  # eight heads: four ranks have two each


def gpt2(activation: str = "gelu_new", **fields: object) -> GPT2LMHeadModel:
    """`gelu_new` is the tanh form, `gelu` the one with the error function."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        activation_function=activation,
        bos_token_id=0,
        eos_token_id=0,
        **fields,
    )
    return scattered(GPT2LMHeadModel(config))


def llama(key_value_heads: int = 2, tied: bool = False, **fields: object) -> LlamaForCausalLM:
    """Rotary angles, RMSNorm, SwiGLU; fewer key-value heads than query heads unless asked otherwise."""
    common = llama_fields(key_value_heads, tied) | fields
    return scattered(LlamaForCausalLM(LlamaConfig(**common)))


def mistral(sliding_window: int | None = None) -> MistralForCausalLM:
    """Llama's layers; heads wider than hidden_size / heads, as in Mistral's own later models; no window."""
    config = MistralConfig(**llama_fields(2, False), head_dim=12, sliding_window=sliding_window)
    return scattered(MistralForCausalLM(config))


def qwen2(tied: bool = True) -> Qwen2ForCausalLM:
    """Llama's layers with biases of query, key and value."""
    return scattered(Qwen2ForCausalLM(Qwen2Config(**llama_fields(2, tied))))


def neox() -> GPTNeoXForCausalLM:
    """GPT-2's layers one behind the other, with rotary angles on half of each head's channels."""
    fields = llama_fields(HEADS, False)
    del fields["num_key_value_heads"], fields["rms_norm_eps"]
    rope = {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}
    return scattered(
        GPTNeoXForCausalLM(GPTNeoXConfig(**fields, use_parallel_residual=False, rope_parameters=rope))
    )


def llama_fields(key_value_heads: int, tied: bool) -> dict[str, object]:
    """What the families that follow Llama name alike."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": key_value_heads,
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def scattered(model: torch.nn.Module) -> torch.nn.Module:
    """The model in float64 with every parameter drawn anew: norms about 1, all else about 0, biases too."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(20)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        norm = parameter.ndim == 1 and name.endswith("weight")
        parameter.data = (1.0 if norm else 0.0) + 0.25 * noise
    return widened(model)


def widened(model: torch.nn.Module) -> torch.nn.Module:
    """RMSNorm and rotary angles by the same formulas in float64: `transformers` computes them in fp32 whatever the dtype."""

    def norm(module: torch.nn.Module):
        eps = module.variance_epsilon
        return lambda x: module.weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()

    def angles(module: torch.nn.Module):
        wide = radians(module.config)
        torch.testing.assert_close(wide.float(), module.inv_freq.float(), rtol=1e-6, atol=0)

        def forward(_: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            angle = torch.cat((position_ids[..., None] * wide,) * 2, -1)
            return angle.cos(), angle.sin()

        return forward

    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            module.forward = norm(module)
        elif kind.endswith("RotaryEmbedding"):
            module.forward = angles(module)
    return model


def radians(config: LlamaConfig) -> torch.Tensor:
    """Angle per position of every pair of channels, in float64, by rope_parameters: default, linear or llama3."""
    rope = config.rope_parameters
    channels = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    channels = int(channels * rope.get("partial_rotary_factor", 1.0))
    out = []
    for pair in range(channels // 2):
        angle = rope["rope_theta"] ** (-2 * pair / channels)
        if rope["rope_type"] == "linear":
            angle /= rope["factor"]
        elif rope["rope_type"] == "llama3":
            turns = rope["original_max_position_embeddings"] * angle / (2 * math.pi)
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            kept = min(max((turns - low) / (high - low), 0.0), 1.0)
            angle *= kept + (1 - kept) / rope["factor"]
        out.append(angle)
    return torch.tensor(out, dtype=torch.float64)


def rounded(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The same model with the weights that a file in `dtype` can hold, in float64 again. Changes it in place."""
    return model.to(dtype).double()


def tokens() -> torch.Tensor:
    """(2, 17) fixed tokens, the last of the vocabulary among them."""
    drawn = torch.randint(0, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(3))
    drawn[0, 5] = VOCABULARY - 1
    return drawn


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """(2, 17, 91) logits of `tokens()`."""
    return model(tokens()).logits
