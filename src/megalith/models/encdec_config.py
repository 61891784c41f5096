"""What an encoder-decoder is: the fields of `ModelConfig`, two depths, what both sides share, and the head.

T5 (relative positions, rmsnorm, no biases), Megatron's T5 (learned positions in one table, biases everywhere) and BART
(`post_ln`, a table of positions on each side) are values of these fields. Makes no layer and never imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megalith.config.schema import error, setting
from megalith.errors import Problem
from megalith.models.config import ModelConfig


class EncoderDecoderConfig(ModelConfig):
    """The architecture of an encoder-decoder. Every field is stored with the weights."""

    max_position_embeddings: int = setting(
        512,
        "Rows of a learned position table; other position types: the length trained on.",
        unit="tokens",
        gt=0,
    )
    encoder_num_layers: int | None = setting(None, "Blocks of the encoder; null: num_layers.", gt=0)
    decoder_num_layers: int | None = setting(None, "Blocks of the decoder; null: num_layers.", gt=0)
    decoder_ffn_hidden_size: int | None = setting(
        None,
        "Inner width of the decoder's feed-forward layers; null: as the encoder's.",
        unit="channels",
        gt=0,
    )
    share_position_embeddings: bool = setting(
        True,
        "Encoder and decoder read one table of learned positions (Megatron); false: each has its own (BART).",
    )
    output_bias: bool = setting(False, "Each token's logit has a bias (Megatron's T5).")
    scale_decoder_output: bool = setting(
        False, "Hidden states are multiplied by 1/√hidden_size before a tied head (T5 1.0)."
    )

    def impossible(self) -> Iterator[Problem]:
        """Every combination of fields that cannot be built, each with what would be legal."""
        yield from super().impossible()
        if not self.share_position_embeddings and self.position_embedding_type != "learned_absolute":
            yield error(
                "share_position_embeddings",
                f"false asks for two tables, {self.position_embedding_type} positions have none",
                "true, or position_embedding_type learned_absolute",
            )
        if self.scale_decoder_output and not self.share_embeddings_and_output_weights:
            yield error(
                "scale_decoder_output",
                "is for a head that is the token table",
                "share_embeddings_and_output_weights true, or false here",
            )

    @property
    def encoder_layers(self) -> int:
        """Blocks of the encoder."""
        return self.encoder_num_layers or self.num_layers

    @property
    def decoder_layers(self) -> int:
        """Blocks of the decoder."""
        return self.decoder_num_layers or self.num_layers

    @property
    def depths(self) -> tuple[int, ...]:
        return self.encoder_layers, self.decoder_layers

    @property
    def decoder_ffn_size(self) -> int:
        """Inner width of the decoder's feed-forward layers."""
        return self.decoder_ffn_hidden_size or self.ffn_size

    def written_out(self) -> dict[str, Any]:
        """The fields that may be null, with what null stands for."""
        return {
            **super().written_out(),
            "num_layers": self.encoder_layers,
            "encoder_num_layers": self.encoder_layers,
            "decoder_num_layers": self.decoder_layers,
            "decoder_ffn_hidden_size": self.decoder_ffn_size,
        }

    def count_parameters(self, rows: int) -> int:
        """How many numbers the model learns, with so many rows of the token table."""
        encoder = self.encoder_layers * self._block(self.ffn_size)
        decoder = self.decoder_layers * self._block(self.decoder_ffn_size, across=True)
        positions = self._learned_positions * (1 if self.share_position_embeddings else 2)
        ends = 2 * (
            self._norm + self._relative_biases
        )  # a norm at one end of either stack, whatever the wiring
        return encoder + decoder + self._tables(rows) + positions + ends + (rows if self.output_bias else 0)
