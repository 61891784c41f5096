"""The weights of a tiny model, whole and under plain names: what the writers of Megatron's files cut up.

Names of one layer: norm1, q, k, v, proj, norm2, (gate,) up, down, each `.weight` (out, in) and, where there is one, `.bias`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import GPT2LMHeadModel, LlamaForCausalLM

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Whole:
    """A model not cut in any direction. `output` is None where the head is the word table."""

    heads: int
    groups: int
    word: torch.Tensor
    position: torch.Tensor | None
    output: torch.Tensor | None
    final_norm: Tensors
    layers: list[Tensors]

    def to(self, dtype: torch.dtype) -> Whole:
        """The same in another dtype."""
        return Whole(
            self.heads,
            self.groups,
            self.word.to(dtype),
            None if self.position is None else self.position.to(dtype),
            None if self.output is None else self.output.to(dtype),
            {name: tensor.to(dtype) for name, tensor in self.final_norm.items()},
            [{name: tensor.to(dtype) for name, tensor in layer.items()} for layer in self.layers],
        )


def from_gpt2(model: GPT2LMHeadModel) -> Whole:
    """GPT-2 keeps its matrices as (in, out), and query, key and value side by side in that order."""
    layers = []
    for block in model.transformer.h:
        q, k, v = block.attn.c_attn.weight.detach().t().chunk(3)
        q_bias, k_bias, v_bias = block.attn.c_attn.bias.detach().chunk(3)
        layers.append(
            {
                "norm1.weight": block.ln_1.weight.detach(),
                "norm1.bias": block.ln_1.bias.detach(),
                "q.weight": q,
                "q.bias": q_bias,
                "k.weight": k,
                "k.bias": k_bias,
                "v.weight": v,
                "v.bias": v_bias,
                "proj.weight": block.attn.c_proj.weight.detach().t(),
                "proj.bias": block.attn.c_proj.bias.detach(),
                "norm2.weight": block.ln_2.weight.detach(),
                "norm2.bias": block.ln_2.bias.detach(),
                "up.weight": block.mlp.c_fc.weight.detach().t(),
                "up.bias": block.mlp.c_fc.bias.detach(),
                "down.weight": block.mlp.c_proj.weight.detach().t(),
                "down.bias": block.mlp.c_proj.bias.detach(),
            }
        )
    return Whole(
        heads=model.config.n_head,
        groups=model.config.n_head,
        word=model.transformer.wte.weight.detach(),
        position=model.transformer.wpe.weight.detach(),
        output=None,
        final_norm={
            "weight": model.transformer.ln_f.weight.detach(),
            "bias": model.transformer.ln_f.bias.detach(),
        },
        layers=layers,
    )


def from_llama(model: LlamaForCausalLM) -> Whole:
    """Llama keeps them as (out, in), without biases."""
    layers = []
    for block in model.model.layers:
        layers.append(
            {
                "norm1.weight": block.input_layernorm.weight.detach(),
                "q.weight": block.self_attn.q_proj.weight.detach(),
                "k.weight": block.self_attn.k_proj.weight.detach(),
                "v.weight": block.self_attn.v_proj.weight.detach(),
                "proj.weight": block.self_attn.o_proj.weight.detach(),
                "norm2.weight": block.post_attention_layernorm.weight.detach(),
                "gate.weight": block.mlp.gate_proj.weight.detach(),
                "up.weight": block.mlp.up_proj.weight.detach(),
                "down.weight": block.mlp.down_proj.weight.detach(),
            }
        )
    tied = model.config.tie_word_embeddings
    return Whole(
        heads=model.config.num_attention_heads,
        groups=model.config.num_key_value_heads,
        word=model.model.embed_tokens.weight.detach(),
        position=None,
        output=None if tied else model.lm_head.weight.detach(),
        final_norm={"weight": model.model.norm.weight.detach()},
        layers=layers,
    )
