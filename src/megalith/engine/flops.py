"""FLOPs that the models of each family need, with the formula that counts them.

Knows which matrices a model has and how many tokens pass each. Knows no device and never imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalith.models.bert_config import BertConfig
from megalith.models.config import GATED_ACTIVATIONS, ModelConfig
from megalith.models.encdec_config import EncoderDecoderConfig

FORMULA = "6 × matrix parameters + 12 × layers × attention width × length, a token (PaLM appendix B)"
"""Chowdhery et al. 2022, appendix B, without recomputation and without halving for the causal mask. With ffn = 4 × width and
plain attention it is Megatron-LM's 72·B·s·L·h²·(1 + s/(6h) + V/(12Lh)) (Narayanan et al. 2021, without recomputation)."""
BERT_FORMULA = f"{FORMULA}; the head over the vocabulary on masked tokens alone"
TWO_SIDES_FORMULA = (
    "6 × matrix parameters × tokens that pass them + 12 × layers × attention width × queries × keys, a sample, "
    "over the tokens of both sides"
)


def flops_per_token(*, matrix_parameters: int, layers: int, attention_width: int, length: int) -> float:
    """Forward and backward FLOPs that a model needs for one token (see `FORMULA`). `attention_width` = heads × head_dim."""
    return 6.0 * matrix_parameters + 12.0 * layers * attention_width * length


@dataclass(frozen=True)
class Sample:
    """What one training sample holds: tokens that the model reads (an encoder-decoder's encoder), tokens of its decoder,
    and of how many it predicts another one (None: all)."""

    length: int
    decoder_length: int = 0
    targets: float | None = None

    @property
    def tokens(self) -> int:
        """Tokens that a sample counts for: those of both sides, padding too."""
        return self.length + self.decoder_length


@dataclass(frozen=True)
class ModelFlops:
    """What a model needs for a token of its samples, forward and backward, and by which formula."""

    per_token: float
    formula: str


def model_flops(model: ModelConfig, sample: Sample) -> ModelFlops:
    """Of any family. `per_token` × tokens of a step is what the step needs; recomputation and padded rows earn nothing."""
    if isinstance(model, EncoderDecoderConfig):
        return ModelFlops(_two_sides(model, sample) / sample.tokens, TWO_SIDES_FORMULA)
    width, length = model.num_attention_heads * model.head_dim, sample.length
    if not isinstance(model, BertConfig):
        per_token = flops_per_token(
            matrix_parameters=matrix_parameters(model),
            layers=model.num_layers, attention_width=width, length=length,
        )  # fmt: skip
        return ModelFlops(per_token, FORMULA)
    blocks = model.num_layers * (_attention(model) + _mlp(model, model.ffn_size))
    encoder = flops_per_token(
        matrix_parameters=blocks, layers=model.num_layers, attention_width=width, length=length
    )
    targets = length if sample.targets is None else sample.targets
    head = 6.0 * model.hidden_size * (model.vocab_size + model.hidden_size) * targets
    pooled = 6.0 * model.hidden_size * (model.hidden_size + 2) if model.bert_binary_head else 0.0
    return ModelFlops(encoder + (head + pooled) / length, BERT_FORMULA)


def _two_sides(model: EncoderDecoderConfig, sample: Sample) -> float:
    """FLOPs of one sample. Of cross-attention, keys and values are made of the encoder's tokens, all else of the decoder's."""
    width, inner = model.hidden_size, model.num_attention_heads * model.head_dim
    read, written, decoder = sample.length, sample.decoder_length, model.decoder_layers
    targets = written if sample.targets is None else sample.targets
    encoder_layer = (_attention(model) + _mlp(model, model.ffn_size)) * read
    memory = 2 * width * model.kv_heads * model.head_dim
    decoder_layer = (
        _attention(model) + _mlp(model, model.decoder_ffn_size) + _attention(model) - memory
    ) * written + memory * read
    matrices = (
        model.encoder_layers * encoder_layer + decoder * decoder_layer + model.vocab_size * width * targets
    )
    pairs = model.encoder_layers * read**2 + decoder * (written**2 + written * read)
    return 6.0 * matrices + 12.0 * inner * pairs


def matrix_parameters(model: ModelConfig) -> int:
    """Parameters that take part in a matrix product: the blocks' matrices and the output head's true rows; no look-ups."""
    layer = _attention(model) + _mlp(model, model.ffn_size)
    return model.num_layers * layer + model.vocab_size * model.hidden_size


def _attention(model: ModelConfig) -> int:
    """Matrices of one attention: queries, keys, values, and back."""
    return model.hidden_size * model.head_dim * 2 * (model.num_attention_heads + model.kv_heads)


def _mlp(model: ModelConfig, inner: int) -> int:
    return (3 if model.activation in GATED_ACTIVATIONS else 2) * model.hidden_size * inner
