"""What a model is: the fields stored with its weights, from which the same architecture is always built again.

Knows names, shapes and which combinations are impossible; makes no layer and never imports torch. Nothing here
depends on how or where a run trains: batch sizes, devices and parallel sizes are other sections.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from pydantic import field_validator, model_validator

from megalith.config.schema import Section, error, setting
from megalith.errors import Problem

ActivationName = Literal[
    "gelu_tanh", "gelu_erf", "relu", "silu", "squared_relu", "geglu", "geglu_erf", "swiglu", "reglu"
]
GATED_ACTIVATIONS = ("geglu", "geglu_erf", "swiglu", "reglu")
ACTIVATION_ALIASES = {
    "gelu": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "openai-gelu": "gelu_tanh",
    "squared-relu": "squared_relu",
}
"""`gelu` is the tanh form, as Megatron and NeMo compute it on their default path."""


class RotaryScalingConfig(Section):
    """Slowed rotary angles, for sequences longer than those trained on."""

    type: Literal["linear", "llama3"] = setting(
        ..., "linear: every angle divided by factor; llama3: slow ones only."
    )
    factor: float = setting(..., "How many times slower.", ge=1)
    low_freq_factor: float = setting(1.0, "llama3: slower than original / this are fully scaled.", gt=0)
    high_freq_factor: float = setting(4.0, "llama3: faster than original / this are left alone.", gt=0)
    original_max_position_embeddings: int = setting(
        8192, "llama3: length trained on before scaling.", unit="tokens", gt=0
    )


class ModelConfig(Section):
    """The architecture of a decoder-only model, and what those of other families have in common with it.

    Every field is stored with the weights.
    """

    vocab_size: int = setting(..., "True vocabulary of the tokenizer.", unit="tokens", gt=0)
    num_layers: int = setting(12, "Transformer blocks.", gt=0)
    hidden_size: int = setting(768, "Width of the residual stream.", unit="channels", gt=0, le=2**22)
    num_attention_heads: int = setting(12, "Query heads.", gt=0, le=2**22)
    num_query_groups: int | None = setting(
        None, "Key-value heads (grouped-query attention); null: as many as query heads.", gt=0
    )
    kv_channels: int | None = setting(
        None, "Channels of one head; null: hidden_size / num_attention_heads.", unit="channels", gt=0
    )
    ffn_hidden_size: int | None = setting(
        None, "Inner width of the feed-forward layer; null: 4 × hidden_size.", unit="channels", gt=0
    )
    max_position_embeddings: int = setting(
        1024,
        "Rows of the learned position table; other position types: the length trained on.",
        unit="tokens",
        gt=0,
    )
    make_vocab_size_divisible_by: int = setting(
        128, "The token table is padded to a multiple of this; padded rows never reach a logit.", gt=0
    )

    position_embedding_type: Literal["learned_absolute", "rope", "relative", "none"] = setting(
        "learned_absolute",
        "How tokens know where they are: a table, rotary angles, T5's relative bias, or not at all.",
    )
    rotary_percentage: float = setting(
        1.0, "Share of each head's channels that rotary angles turn.", gt=0, le=1
    )
    rotary_base: float = setting(10000.0, "Rotary: slowest angles turn once in 2π · base positions.", gt=1)
    rotary_interleaved: bool = setting(
        False,
        "Rotary pairs are neighbours (0, 1), (2, 3), …; false: channel i with i + half (Hugging Face's Llama).",
    )
    rotary_scaling: RotaryScalingConfig | None = setting(None, "Rotary: slowed angles for longer sequences.")
    relative_attention_num_buckets: int = setting(
        32, "Relative positions: distance buckets a head learns.", ge=2
    )
    relative_attention_max_distance: int = setting(
        128, "Relative positions: all farther distances share one bucket.", unit="tokens", gt=1
    )

    normalization: Literal["layernorm", "rmsnorm"] = setting("layernorm", "Kind of every norm.")
    layernorm_epsilon: float = setting(
        1e-5, "Added to the variance (layernorm) or mean square (rmsnorm).", gt=0
    )
    transformer_block_type: Literal["pre_ln", "post_ln"] = setting(
        "pre_ln", "Norm before attention and feed-forward, or after the residual sum (no final norm then)."
    )
    apply_residual_connection_post_layernorm: bool = setting(
        False, "pre_ln: the residual line starts behind the norm (older BERT wiring)."
    )
    activation: ActivationName = setting(
        "gelu_tanh", "Feed-forward activation; `gelu` means gelu_tanh, as Megatron computes it."
    )
    bias: bool = setting(True, "All linear layers have biases.")
    qkv_bias: bool | None = setting(None, "Query, key and value projections have biases; null: as `bias`.")
    share_embeddings_and_output_weights: bool = setting(True, "The output head is the token table.")
    attention_scale: float | None = setting(None, "Factor of attention scores; null: 1/√kv_channels.", gt=0)

    hidden_dropout: float = setting(
        0.1, "Dropout behind the embedding, attention and feed-forward, keyed by sample.", ge=0, lt=1
    )
    attention_dropout: float = setting(
        0.0,
        "Dropout of attention probabilities; above 0 uses the explicit core, which is slower.",
        ge=0,
        lt=1,
    )
    attention_core: Literal["auto", "sdpa", "flex", "eager"] = setting(
        "auto", "How attention is computed; auto chooses by device, mask and dropout."
    )

    init_method_std: float = setting(0.02, "Standard deviation of initial weights.", ge=0)
    use_scaled_init_method: bool = setting(
        True, "Layers that write to the residual stream start with std / √(2 · num_layers)."
    )

    @field_validator("activation", mode="before")
    @classmethod
    def _alias(cls, value: Any) -> Any:
        return ACTIVATION_ALIASES.get(value, value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _possible(self) -> ModelConfig:
        lines = [f"{p.where} {p.what}" + (f": {p.fix}" if p.fix else "") for p in self.impossible()]
        if lines:
            raise ValueError("\n".join(lines))
        return self

    def problems(self) -> Iterable[Problem]:
        """What a section reports; one that has more fields has more rules."""
        return self.impossible()

    def impossible(self) -> Iterator[Problem]:
        """Every combination of fields that cannot be built, each with what would be legal."""
        yield from self._shape_problems()
        yield from self._position_problems()
        yield from self._wiring_problems()

    def _shape_problems(self) -> Iterator[Problem]:
        width, heads, groups = self.hidden_size, self.num_attention_heads, self.kv_heads
        if self.kv_channels is None and width % heads:
            yield error(
                "hidden_size",
                f"{width} does not divide into {heads} heads",
                f"num_attention_heads ∈ {divisors(width)}, or set kv_channels",
            )
        if heads % groups:
            yield error(
                "num_query_groups",
                f"{groups} does not divide num_attention_heads {heads}",
                f"num_query_groups ∈ {divisors(heads)}",
            )

    def _position_problems(self) -> Iterator[Problem]:
        kind, scaling = self.position_embedding_type, self.rotary_scaling
        if kind == "rope" and (self.rotary_channels % 2 or not self.rotary_channels):
            yield error(
                "rotary_percentage",
                f"{self.rotary_percentage:g} of {self.head_dim} channels turns {self.rotary_channels} of them",
                "the number must be even and positive, for channels turn in pairs",
            )
        if kind != "rope" and scaling is not None:
            yield error(
                "rotary_scaling", f"does nothing with {kind} positions", "position_embedding_type rope"
            )
        if scaling is not None and scaling.low_freq_factor >= scaling.high_freq_factor:
            yield error(
                "rotary_scaling",
                f"low_freq_factor {scaling.low_freq_factor:g} is not below high_freq_factor "
                f"{scaling.high_freq_factor:g}",
                "Llama 3.1 has 1 and 4",
            )
        buckets, longest = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if kind == "relative" and longest <= buckets // 2:
            yield error(
                "relative_attention_max_distance",
                f"{longest} is not above half of relative_attention_num_buckets {buckets}",
                f"at least {buckets // 2 + 1}",
            )

    def _wiring_problems(self) -> Iterator[Problem]:
        core = self.attention_core
        if self.transformer_block_type == "post_ln" and self.apply_residual_connection_post_layernorm:
            yield error(
                "apply_residual_connection_post_layernorm",
                "is a wiring of pre_ln, post_ln has one wiring only",
                "transformer_block_type pre_ln, or false",
            )
        if self.attention_dropout > 0 and core in ("sdpa", "flex"):
            yield error(
                "attention_core",
                f"{core} cannot drop attention probabilities by key (attention_dropout {self.attention_dropout:g})",
                "attention_core auto or eager, or attention_dropout 0",
            )
        if self.position_embedding_type == "relative" and core == "flex":
            yield error("attention_core", "flex cannot add a relative bias", "auto, sdpa or eager")

    @property
    def kv_heads(self) -> int:
        """Key-value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        """Inner width of the feed-forward layer."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def rotary_channels(self) -> int:
        """Channels of each head that rotary angles turn."""
        return int(self.head_dim * self.rotary_percentage)

    @property
    def has_qkv_bias(self) -> bool:
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token table."""
        return (
            math.ceil(self.vocab_size / self.make_vocab_size_divisible_by) * self.make_vocab_size_divisible_by
        )

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each tower, in the order in which pipeline stages have them."""
        return (self.num_layers,)

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the model can read at all; None when nothing but habit bounds it."""
        return self.max_position_embeddings if self.position_embedding_type == "learned_absolute" else None

    def written_out(self) -> dict[str, Any]:
        """The fields that may be null, with what null stands for."""
        return {
            "num_query_groups": self.kv_heads,
            "kv_channels": self.head_dim,
            "ffn_hidden_size": self.ffn_size,
            "qkv_bias": self.has_qkv_bias,
        }

    def count_parameters(self, rows: int) -> int:
        """How many numbers the model learns, with so many rows of the token table."""
        final = self._norm if self.transformer_block_type == "pre_ln" else 0
        positions = self._learned_positions + self._relative_biases
        return self.num_layers * self._block(self.ffn_size) + self._tables(rows) + positions + final

    def _block(self, hidden: int, *, across: bool = False) -> int:
        """Parameters of one block whose feed-forward layer has this inner width."""
        width, bias = self.hidden_size, int(self.bias)
        inner, groups = self.num_attention_heads * self.head_dim, self.kv_heads * self.head_dim
        attention = (inner + 2 * groups) * (width + int(self.has_qkv_bias)) + width * (inner + bias)
        inward = 2 if self.activation in GATED_ACTIVATIONS else 1
        mlp = inward * hidden * (width + bias) + width * (hidden + bias)
        return (attention + self._norm) * (2 if across else 1) + mlp + self._norm

    def _tables(self, rows: int) -> int:
        return rows * self.hidden_size * (1 if self.share_embeddings_and_output_weights else 2)

    @property
    def _norm(self) -> int:
        return self.hidden_size * (2 if self.normalization == "layernorm" else 1)

    @property
    def _learned_positions(self) -> int:
        learned = self.position_embedding_type == "learned_absolute"
        return self.max_position_embeddings * self.hidden_size if learned else 0

    @property
    def _relative_biases(self) -> int:
        relative = self.position_embedding_type == "relative"
        return self.relative_attention_num_buckets * self.num_attention_heads if relative else 0


def effective(config: ModelConfig) -> dict[str, Any]:
    """The fields that make the architecture, with what null stands for written out and what has no effect left out.

    Two configs that are the same here are the same model.
    """
    found = config.model_dump(mode="json")
    found |= config.written_out()
    unused = {"rope": "rotary_", "relative": "relative_"}
    for kind, prefix in unused.items():
        if config.position_embedding_type != kind:
            found = {name: value for name, value in found.items() if not name.startswith(prefix)}
    return found


def divisors(number: int) -> list[int]:
    """The divisors of `number`, for error messages: at most the twelve smallest and the number itself."""
    found = [d for d in range(1, number + 1) if number % d == 0]
    return found if len(found) <= 13 else [*found[:12], found[-1]]


def num_parameters(config: ModelConfig, *, padded: bool = True) -> int:
    """How many numbers the model learns; `padded`: rows that pad the vocabulary counted too (as memory sees them)."""
    return config.count_parameters(config.padded_vocab_size if padded else config.vocab_size)
