"""The section `model` of each family: GPT, BERT, T5 and BART. What all have in common is `pretrain_model`'s.

A family is the fields of its architecture, its data section and its usual tokenizer, and says what a sample holds, how it
is masked, and how many numbers parallel sizes must divide. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import gcd
from typing import ClassVar

from megalith.config.schema import ForeignKey, error, setting, warning
from megalith.data.masked_config import BartDataConfig, BertDataConfig, T5DataConfig
from megalith.data.masks import MaskOptions, Masks
from megalith.data.shape import Shape
from megalith.data.token_ids import TokenIds
from megalith.engine.flops import Sample
from megalith.errors import ConfigError, Problem
from megalith.models.bert_config import BertConfig
from megalith.models.config import ModelConfig
from megalith.models.encdec_config import EncoderDecoderConfig
from megalith.tasks.model_keys import ENCODER_DECODER_KEYS
from megalith.tasks.pretrain_model import PretrainModelConfig, preset_setting
from megalith.tokenizers.base import Tokenizer
from megalith.tokenizers.config import TokenizerConfig
from megalith.tokenizers.names import BUILT_TYPES, WORD_PIECE_CASE, WORD_PIECE_LOWER
from megalith.topology.sizes import Divisible, Sizes


class GPTModelConfig(PretrainModelConfig):
    """A GPT: a window of text, the next token of each."""

    family: ClassVar[str] = "gpt"

    preset: str | None = preset_setting("gpt")

    def masks(self, tokenizer: Tokenizer) -> Masks:
        """What the ends of documents do."""
        return MaskOptions(
            eod=tokenizer.eod,
            mask_loss=self.data.eod_mask_loss,
            sense=self.compat.eod_sense,
            reset_positions=self.data.reset_position_ids,
            reset_attention=self.data.reset_attention_mask,
        )


def _usual_type(name: str) -> str | None:
    return setting(name, "Megatron's name of the tokenizer.", examples=[*BUILT_TYPES])


class BertTokenizerConfig(TokenizerConfig):
    """BERT's usual tokenizer."""

    type: str | None = _usual_type(WORD_PIECE_LOWER)


class BertModelConfig(PretrainModelConfig, BertConfig):
    """A BERT: masked words, and which of two halves comes first."""

    family: ClassVar[str] = "bert"
    architecture_class: ClassVar[type[ModelConfig]] = BertConfig

    preset: str | None = preset_setting("bert")
    data: BertDataConfig = setting(BertDataConfig, "Token files, splits, order, masks.")
    tokenizer: BertTokenizerConfig = setting(BertTokenizerConfig, "Which tokenizer made the files.")

    @property
    def shape(self) -> Shape:
        """Pairs of sentences, or groups of them without a binary head."""
        return self.data.shape(self.encoder_seq_length, binary_head=self.bert_binary_head)

    @property
    def sample(self) -> Sample:
        """A row, of which `masked_lm_prob` is predicted."""
        return Sample(self.encoder_seq_length, targets=self.data.masked_lm_prob * self.encoder_seq_length)

    def masks(self, tokenizer: Tokenizer) -> Masks:
        """What is to be guessed. Errors: `ConfigError` where the vocabulary lacks a token."""
        return self.data.masks(
            TokenIds.of(tokenizer), self.encoder_seq_length, binary_head=self.bert_binary_head
        )


class T5TokenizerConfig(TokenizerConfig):
    """T5's usual tokenizer: the reference's, and 100 sentinels behind it."""

    type: str | None = _usual_type(WORD_PIECE_CASE)
    num_sentinel_tokens: int | None = setting(
        100,
        "How many of T5's <extra_id_N> follow the vocabulary (Megatron's --vocab-extra-ids); none is added twice.",
        ge=0,
    )


class BartTokenizerConfig(TokenizerConfig):
    """BART's usual tokenizer, as the reference has it."""

    type: str | None = _usual_type(WORD_PIECE_CASE)


class EncoderDecoderModelConfig(PretrainModelConfig, EncoderDecoderConfig):
    """What T5 and BART have in common: two sides, and Megatron's bias of the head."""

    architecture_class: ClassVar[type[ModelConfig]] = EncoderDecoderConfig
    foreign_keys: ClassVar[Mapping[str, ForeignKey]] = ENCODER_DECODER_KEYS

    data: T5DataConfig | BartDataConfig
    output_bias: bool = setting(True, "Each token's logit has a bias (Megatron's T5).")
    pipeline_model_parallel_split_rank: int | None = setting(
        None,
        "The pipeline stage at which the decoder begins; null or 0: in proportion to the layers of either side.",
        ge=0,
    )

    @property
    def sizes(self) -> Sizes:
        """The layout, and where the decoder begins in a pipeline."""
        split = self.pipeline_model_parallel_split_rank or None
        return replace(super().sizes, pipeline_split=split if self.pipeline_model_parallel_size > 1 else None)

    @property
    def sample(self) -> Sample:
        """A row of each side."""
        return Sample(self.encoder_seq_length, self.decoder_length)

    @property
    def shape(self) -> Shape:
        """Groups of sentences; windows for the prefix language model."""
        return self.data.shape(self.encoder_seq_length)

    @property
    def decoder_length(self) -> int:
        """Tokens of a decoder's row."""
        raise NotImplementedError

    def masks(self, tokenizer: Tokenizer) -> Masks:
        """What each side reads. Errors: `ConfigError` where the vocabulary or the decoder's length does not fit."""
        return self.data.masks(TokenIds.of(tokenizer), self.encoder_seq_length)

    def numbers(self, vocab: int | None = None, *, batch: bool = False) -> Divisible:
        """Those of both sides, the encoder's first; what divides the common divisor of two widths divides either."""
        numbers = super().numbers(vocab, batch=batch)
        return replace(
            numbers,
            layers=(self.encoder_layers, self.decoder_layers),
            ffn=gcd(self.ffn_size, self.decoder_ffn_size),
            length=(self.encoder_seq_length, self.decoder_length),
        )

    def _layout_problems(self) -> Iterator[Problem]:
        yield from super()._layout_problems()
        if self.pipeline_model_parallel_split_rank and self.pipeline_model_parallel_size == 1:
            yield warning("pipeline_model_parallel_split_rank", "has no effect without a pipeline")


class T5ModelConfig(EncoderDecoderModelConfig):
    """A T5: the decoder writes what was cut out of the encoder's text, or its second part (prefix language model)."""

    family: ClassVar[str] = "t5"

    preset: str | None = preset_setting("t5")
    data: T5DataConfig = setting(T5DataConfig, "Token files, splits, order, masks.")
    tokenizer: T5TokenizerConfig = setting(T5TokenizerConfig, "Which tokenizer made the files.")

    @property
    def decoder_length(self) -> int:
        """`data.seq_length_dec`; one more in NeMo's prefix language model."""
        more = self.data.dataset_type == "t5_prefix_lm" and self.data.order == "megatron"
        return self.data.seq_length_dec + more

    def masks(self, tokenizer: Tokenizer) -> Masks:
        """As the reference asks: sentinels for about all spans, and the padding id that T5s begin to write from."""
        masks = super().masks(tokenizer)
        spans = 0 if self.data.dataset_type == "t5_prefix_lm" else self._spans
        if problems := [
            *_sentinel_problems(tokenizer, self.encoder_seq_length, spans),
            *_pad_problems(tokenizer),
        ]:
            raise ConfigError(problems)
        return masks

    @property
    def _spans(self) -> int:
        """About how many runs make up what is cut out of a row, if every word were one token."""
        return int(self.encoder_seq_length * self.data.masked_lm_prob / self.data.lengths.average)

    def _length_problems(self) -> Iterator[Problem]:
        yield from super()._length_problems()
        learned = self.position_embedding_type == "learned_absolute"
        if learned and self.decoder_length > self.positions:
            yield error(
                "data.seq_length_dec",
                f"{self.decoder_length} is longer than the position table, max_position_embeddings {self.positions}",
                f"model.max_position_embeddings={self.decoder_length}, or a shorter decoder",
            )


class BartModelConfig(EncoderDecoderModelConfig):
    """A BART: the decoder writes the whole text of which the encoder saw a damaged copy."""

    family: ClassVar[str] = "bart"

    preset: str | None = preset_setting("bart")
    data: BartDataConfig = setting(BartDataConfig, "Token files, splits, order, masks.")
    tokenizer: BartTokenizerConfig = setting(BartTokenizerConfig, "Which tokenizer made the files.")

    @property
    def decoder_length(self) -> int:
        """As the encoder's."""
        return self.encoder_seq_length


def _sentinel_problems(tokenizer: Tokenizer, length: int, spans: int) -> Iterator[Problem]:
    count = len(tokenizer.sentinels)
    if count < spans:
        what = f"too few sentinels (<extra_id_0> …): {count}, for about {spans} spans in {length} tokens"
        yield Problem("model.tokenizer.num_sentinel_tokens", what, f"{max(100, spans)}")


def _pad_problems(tokenizer: Tokenizer) -> Iterator[Problem]:
    pad = tokenizer.special.get("pad", 0)
    if pad:
        what = f"its padding token has the id {pad}; a T5's is 0, which other programs begin to write from"
        fix = "a vocabulary that begins with the padding token, as BERT's vocab.txt and T5's .model do"
        yield Problem("model.tokenizer", what, fix)
