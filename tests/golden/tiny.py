"""Tiny float64 models of `transformers` with no number left at its default, and their logits: what every golden is held to."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCABULARY, WIDTH, HEADS, LAYERS, POSITIONS = 91, 32, 4, 4, 24


def gpt2(activation: str = "gelu_new") -> GPT2LMHeadModel:
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
    )
    return scattered(GPT2LMHeadModel(config))


def llama(key_value_heads: int = 2, tied: bool = False) -> LlamaForCausalLM:
    """Rotary angles, RMSNorm, SwiGLU; fewer key-value heads than query heads unless asked otherwise."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=POSITIONS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
    )
    return scattered(LlamaForCausalLM(config))


def scattered(model: torch.nn.Module) -> torch.nn.Module:
    """The model in float64 with every parameter drawn anew: norms about 1, all else about 0, biases too."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(20)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        norm = parameter.ndim == 1 and name.endswith("weight")
        parameter.data = (1.0 if norm else 0.0) + 0.25 * noise
    return model


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
