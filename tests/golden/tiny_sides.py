"""Tiny float64 BERTs and encoder-decoders of `transformers` with no number left at its default, and what they compute."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForPreTraining,
    MegatronBertConfig,
    MegatronBertForPreTraining,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.golden.tiny import HEADS, LAYERS, POSITIONS, VOCABULARY, WIDTH, scattered, tokens

ENCODER, DECODER = 2, LAYERS
LENGTHS = torch.tensor([17, 11])
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 4 * WIDTH,
    "max_position_embeddings": POSITIONS,
    "layer_norm_eps": 1e-5,
}
_SIDES = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": ENCODER,
    "decoder_layers": DECODER,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": POSITIONS,
}


def bert(activation: str = "gelu", kind: type = BertForPreTraining, **fields: object) -> PreTrainedModel:
    """The original wiring, a norm behind each sum; of any class."""
    return scattered(kind(BertConfig(**{**_BERT, **fields}, hidden_act=activation)))


def megatron_bert(
    activation: str = "gelu_new",
    head: str = "gelu",
    kind: type = MegatronBertForPreTraining,
    **fields: object,
) -> PreTrainedModel:
    """Norms before. `head`: the activation before the token table, which Megatron's code does not take from the others."""
    model = scattered(kind(MegatronBertConfig(**{**_BERT, **fields}, hidden_act=activation)))
    if hasattr(model, "cls"):
        model.cls.predictions.transform.transform_act_fn = {
            "gelu": nn.GELU(),
            "gelu_new": nn.GELU(approximate="tanh"),
        }[head]
    return model


def t5(feed_forward: str = "relu", untied: bool = False, **fields: object) -> T5ForConditionalGeneration:
    """1.0, or `untied` 1.1, whose head is a table of its own; fewer channels a head than width / heads."""
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=3,
        d_ff=48,
        num_layers=ENCODER,
        num_decoder_layers=DECODER,
        num_heads=HEADS,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        layer_norm_epsilon=1e-5,
        feed_forward_proj=feed_forward,
        tie_word_embeddings=not untied,
        **fields,
    )
    model = T5ForConditionalGeneration._from_config(config, attn_implementation="eager")
    if untied:  # their constructor ties all tables, whatever the config says
        model.lm_head.weight = nn.Parameter(torch.zeros(VOCABULARY, WIDTH))
    return wide_norms(scattered(model))


def wide_norms(model: nn.Module) -> nn.Module:
    """T5's norms by the same formula in float64: theirs take the mean square in fp32."""

    def norm(module: nn.Module):
        eps = module.variance_epsilon
        return lambda x: module.weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()

    for module in model.modules():
        if type(module).__name__ == "T5LayerNorm":
            module.forward = norm(module)
    return model


def bart(activation: str = "gelu", bias: bool = False, **fields: object) -> BartForConditionalGeneration:
    """`bias`: of the logits, which their models hold and seldom use."""
    config = BartConfig(**{**_SIDES, "decoder_ffn_dim": 40, **fields}, activation_function=activation)
    model = scattered(BartForConditionalGeneration(config))
    if bias:
        model.final_logits_bias = nn.Buffer(torch.linspace(-1, 1, VOCABULARY, dtype=torch.float64)[None])
    return model


def megatron_t5(activation: str = "gelu_new") -> tuple[PegasusForConditionalGeneration, torch.Tensor]:
    """The wiring of Megatron's T5, of which `transformers` has no class: Pegasus with one learned table of positions for both sides."""
    model = scattered(
        PegasusForConditionalGeneration(PegasusConfig(**_SIDES, activation_function=activation))
    )
    draw = torch.Generator().manual_seed(4)
    table = 0.25 * torch.randn(POSITIONS, WIDTH, generator=draw, dtype=torch.float64)
    for side in (model.model.encoder, model.model.decoder):
        side.embed_positions.forward = lambda shape, *_, **__: table[: shape[1]]
    model.final_logits_bias = nn.Buffer(torch.linspace(-1, 1, VOCABULARY, dtype=torch.float64)[None])
    return model, table


def types() -> torch.Tensor:
    """(2, 17) token types."""
    return (torch.arange(17) >= torch.tensor([[6], [9]])).long()


@torch.no_grad()
def answers(model: nn.Module) -> tuple[torch.Tensor, ...]:
    """What `transformers` computes of `tokens()` under padding: logits of the positions that are no padding, and the binary head's."""
    real = torch.arange(17) < LENGTHS[:, None]
    if model.config.is_encoder_decoder:
        out = model(tokens(), attention_mask=real.long(), decoder_input_ids=tokens()[:, 3:12])
        return (out.logits,)
    out = model(tokens(), token_type_ids=types(), attention_mask=real.long())
    if "seq_relationship_logits" in out:
        return out.prediction_logits[real], out.seq_relationship_logits
    return (out.logits[real],) if "logits" in out else (out.last_hidden_state[real],)


@torch.no_grad()
def ours(model: nn.Module, encoder: bool = False) -> tuple[torch.Tensor, ...]:
    """The same of a model of Megalith; `encoder`: its hidden states alone."""
    real = torch.arange(17) < LENGTHS[:, None]
    if hasattr(model, "decoder"):
        return (model.logits(model(tokens(), tokens=tokens()[:, 3:12], encoder_lengths=LENGTHS)),)
    hidden = model(tokens(), types=types(), lengths=LENGTHS)
    if encoder:
        return (hidden[real],)
    found = (model.logits(hidden)[real],)
    return found if model.binary_head is None else (*found, model.binary_logits(hidden))
