"""The section `model.data` of BERT, T5 and BART: GPT's keys, and what is masked. NeMo's names, meanings and defaults.

Each class says what its samples are made of (`shape`) and makes the masks that its keys describe (`masks`). Knows keys.
Opens no file and imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal

from pydantic import field_validator

from megalith.config.schema import ForeignKey, error, renamed, setting, warning
from megalith.data.config import DataConfig
from megalith.data.masked import BertMasks
from megalith.data.masks import Masks
from megalith.data.ngrams import Lengths
from megalith.data.shape import Shape
from megalith.data.span import PrefixMasks, SpanMasks
from megalith.data.token_ids import TokenIds
from megalith.errors import Problem

_ENDS = ("eod_mask_loss", "reset_position_ids", "reset_attention_mask")


class MaskedDataConfig(DataConfig):
    """What the three families share."""

    foreign_keys: ClassVar[Mapping[str, ForeignKey]] = {
        **DataConfig.foreign_keys,
        "favor_long_ngrams": renamed("favor_longer_ngrams"),
    }

    masked_lm_prob: float = setting(0.15, "Share of the tokens to be guessed.", gt=0, lt=1)
    short_seq_prob: float = setting(
        0.0, "Share of the samples that end at a random length instead of the full one.", ge=0, le=1
    )
    max_ngram_size: int = setting(
        10, "Longest run of words that is masked as one.", unit="words", ge=1, le=512
    )
    mean_ngram_size: float | None = setting(
        None, "Mean run before max_ngram_size cuts it, with geometric_dist; null: 5.", unit="words", ge=1
    )
    geometric_dist: bool = setting(
        True, "true: lengths of runs are geometric (SpanBERT); false: length n with probability ∝ 1/n."
    )
    favor_longer_ngrams: bool = setting(
        False, "Long runs as likely as short ones would be, with geometric_dist=false."
    )
    whole_word_masking: bool = setting(True, "Mask words as a whole; false: single tokens.")

    @property
    def lengths(self) -> Lengths:
        """How long runs are."""
        return Lengths(
            self.max_ngram_size, self.geometric_dist, self.mean_ngram_size, self.favor_longer_ngrams
        )

    def problems(self) -> Iterable[Problem]:
        yield from super().problems()
        for key in _ENDS:
            if getattr(self, key):
                what = "is for GPT: these samples do not run across ends of documents"
                yield error(key, what, f"model.data.{key}=false")
        if self.mean_ngram_size is not None and not self.geometric_dist:
            what = "is a mean of geometric lengths, and geometric_dist is false"
            yield error("mean_ngram_size", what, "geometric_dist=true, or leave mean_ngram_size out")
        if self.favor_longer_ngrams and self.geometric_dist:
            yield warning("favor_longer_ngrams", "has no effect on geometric lengths: geometric_dist=false")


class BertDataConfig(MaskedDataConfig):
    """BERT: sentence pairs (`bert_binary_head`) with masked words."""

    dataset_type: Literal["bert"] = setting("bert", "Kind of samples.")
    short_seq_prob: float = setting(
        0.1, "Share of the samples that end at a random length instead of the full one.", ge=0, le=1
    )
    max_ngram_size: int = setting(
        3, "Longest run of words that is masked as one.", unit="words", ge=1, le=512
    )
    geometric_dist: bool = setting(
        False, "true: lengths of runs are geometric (SpanBERT); false: length n with probability ∝ 1/n."
    )

    @field_validator("dataset_type", mode="before")
    @classmethod
    def _megatrons_name(cls, value: object) -> object:
        return "bert" if value == "standard_bert" else value

    def shape(self, seq_length: int, *, binary_head: bool) -> Shape:
        """What the samples of rows of `seq_length` tokens are made of."""
        return Shape.bert(seq_length, short_seq_prob=self.short_seq_prob, binary_head=binary_head)

    def masks(self, ids: TokenIds, seq_length: int, *, binary_head: bool) -> Masks:
        """ConfigError where the vocabulary does not fit."""
        return BertMasks(
            ids,
            seq_length,
            binary_head=binary_head,
            masked_lm_prob=self.masked_lm_prob,
            whole_words=self.whole_word_masking,
            lengths=self.lengths,
        )


class T5DataConfig(MaskedDataConfig):
    """T5: span corruption, or the prefix language model."""

    splits_string: str = setting(
        "949,45,5",
        "Shares of the documents of each file for train, validation and test, in file order.",
        examples=["969,30,1", "98/2/0"],
    )
    dataset_type: Literal["t5", "t5_prefix_lm"] = setting(
        "t5",
        "t5: span corruption of sentences; t5_prefix_lm: a text's first part is read, its second written.",
    )
    seq_length_dec: int = setting(128, "Tokens of the decoder.", unit="tokens", ge=2)
    permutation: bool = setting(
        False, "As many tokens as are masked change places in what the encoder reads."
    )

    def shape(self, seq_length: int) -> Shape:
        """What the samples of encoder rows of `seq_length` tokens are made of."""
        if self.dataset_type == "t5_prefix_lm":
            return Shape.prefix(self.seq_length_dec)
        return Shape.span("t5", seq_length, short_seq_prob=self.short_seq_prob)

    def masks(self, ids: TokenIds, seq_length: int) -> Masks:
        """ConfigError where the vocabulary does not fit, or the decoder is too short."""
        if self.dataset_type == "t5_prefix_lm":
            return PrefixMasks(ids, seq_length)
        return SpanMasks(
            "t5",
            ids,
            seq_length,
            self.seq_length_dec,
            masked_lm_prob=self.masked_lm_prob,
            lengths=self.lengths,
            whole_words=self.whole_word_masking,
            permutation=self.permutation,
        )


class BartDataConfig(MaskedDataConfig):
    """BART: each masked run becomes one mask, or nothing; the decoder writes the whole text."""

    splits_string: str = setting(
        "949,45,5",
        "Shares of the documents of each file for train, validation and test, in file order.",
        examples=["969,30,1", "98/2/0"],
    )
    dataset_type: Literal["bart"] = setting("bart", "Kind of samples.")
    masked_lm_prob: float = setting(0.15, "Share of the tokens to be guessed.", ge=0, lt=1)
    permutation: bool = setting(
        False, "As many tokens as are masked change places in what the encoder reads."
    )
    delete_mask_prob: float = setting(0.3, "Share of the masks that are deleted.", ge=0, le=1)

    def shape(self, seq_length: int) -> Shape:
        """What the samples of encoder rows of `seq_length` tokens are made of."""
        return Shape.span("bart", seq_length, short_seq_prob=self.short_seq_prob)

    def masks(self, ids: TokenIds, seq_length: int) -> Masks:
        """ConfigError where the vocabulary does not fit. The decoder is as long as the encoder."""
        return SpanMasks(
            "bart",
            ids,
            seq_length,
            seq_length,
            masked_lm_prob=self.masked_lm_prob,
            lengths=self.lengths,
            whole_words=self.whole_word_masking,
            permutation=self.permutation,
            delete_mask_prob=self.delete_mask_prob,
        )
