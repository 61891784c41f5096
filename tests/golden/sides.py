"""The weights of a tiny BERT or encoder-decoder, whole and under plain names: what the writers of Megatron's files cut up.

Names of one layer as in `whole`; a decoder's has norm_cross, cross_q, cross_k, cross_v and cross_proj, too. `ends`: bias (of each
token's logit), and of a BERT pooler, lm_dense, lm_norm, binary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from transformers import MegatronBertForPreTraining, PegasusForConditionalGeneration

from tests.golden.whole import Tensors


@dataclass(frozen=True)
class Sides:
    """`layers` and `final_norm` are the encoder's; a BERT has no decoder."""

    heads: int
    groups: int
    word: torch.Tensor
    position: torch.Tensor
    types: torch.Tensor | None
    layers: list[Tensors]
    final_norm: Tensors
    ends: Tensors
    decoder: list[Tensors] = field(default_factory=list)
    decoder_norm: Tensors = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Sides:
        """The same in another dtype."""

        def each(tensors: Tensors) -> Tensors:
            return {name: tensor.to(dtype) for name, tensor in tensors.items()}

        return replace(
            self,
            word=self.word.to(dtype),
            position=self.position.to(dtype),
            types=None if self.types is None else self.types.to(dtype),
            layers=[each(layer) for layer in self.layers],
            final_norm=each(self.final_norm),
            ends=each(self.ends),
            decoder=[each(layer) for layer in self.decoder],
            decoder_norm=each(self.decoder_norm),
        )


def of(named: dict[str, torch.nn.Module]) -> Tensors:
    """Weights and biases of modules under plain names."""
    return {
        f"{name}.{kind}": getattr(module, kind).detach()
        for name, module in named.items()
        for kind in ("weight", "bias")
    }


def from_megatron_bert(model: MegatronBertForPreTraining) -> Sides:
    """Norms stand before attention and feed-forward, and behind the last layer."""
    body, head = model.bert, model.cls
    layers = [
        of(
            {
                "norm1": layer.attention.ln,
                "q": layer.attention.self.query,
                "k": layer.attention.self.key,
                "v": layer.attention.self.value,
                "proj": layer.attention.output.dense,
                "norm2": layer.ln,
                "up": layer.intermediate.dense,
                "down": layer.output.dense,
            }
        )
        for layer in body.encoder.layer
    ]
    ends = of(
        {
            "pooler": body.pooler.dense,
            "lm_dense": head.predictions.transform.dense,
            "lm_norm": head.predictions.transform.LayerNorm,
            "binary": head.seq_relationship,
        }
    )
    heads = model.config.num_attention_heads
    return Sides(
        heads,
        heads,
        body.embeddings.word_embeddings.weight.detach(),
        body.embeddings.position_embeddings.weight.detach(),
        body.embeddings.token_type_embeddings.weight.detach(),
        layers,
        {kind: getattr(body.encoder.ln, kind).detach() for kind in ("weight", "bias")},
        {**ends, "bias": head.predictions.bias.detach()},
    )


def from_pegasus(model: PegasusForConditionalGeneration, positions: torch.Tensor) -> Sides:
    """Pegasus has the wiring of Megatron's T5; `positions`: the learned table that both sides read in the place of its sines."""
    body, towers = model.model, {}
    for side in (body.encoder, body.decoder):
        towers[side] = []
        for layer in side.layers:
            named = {
                "norm1": layer.self_attn_layer_norm,
                "q": layer.self_attn.q_proj,
                "k": layer.self_attn.k_proj,
                "v": layer.self_attn.v_proj,
                "proj": layer.self_attn.out_proj,
                "norm2": layer.final_layer_norm,
                "up": layer.fc1,
                "down": layer.fc2,
            }
            if side is body.decoder:
                named |= {
                    "norm_cross": layer.encoder_attn_layer_norm,
                    "cross_q": layer.encoder_attn.q_proj,
                    "cross_k": layer.encoder_attn.k_proj,
                    "cross_v": layer.encoder_attn.v_proj,
                    "cross_proj": layer.encoder_attn.out_proj,
                }
            towers[side].append(of(named))
    heads = model.config.encoder_attention_heads
    return Sides(
        heads,
        heads,
        body.shared.weight.detach(),
        positions,
        None,
        towers[body.encoder],
        {kind: getattr(body.encoder.layer_norm, kind).detach() for kind in ("weight", "bias")},
        {"bias": model.final_logits_bias[0].detach()},
        towers[body.decoder],
        {kind: getattr(body.decoder.layer_norm, kind).detach() for kind in ("weight", "bias")},
    )
