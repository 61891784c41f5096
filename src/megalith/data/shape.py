"""What a sample is made of: a window of the joint stream of items, or a group of consecutive sentences of one document.

```
kind           made of                              in the file an item is
gpt            window of seq_length + 1 tokens      a document
t5_prefix_lm   window, cut into encoder | decoder   a document
bert           group of ≥ 2 sentences (≥ 1 without sentence-order prediction)   a sentence
t5, bart       group of ≥ 1 sentences               a sentence (or a document: what is longer than a sample is cut off)
```
Knows sizes. It is part of the data plan: samples already read would be other ones under another shape. How tokens are
masked is not in it: masks may change while a run goes on, and nothing moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["gpt", "bert", "t5", "t5_prefix_lm", "bart"]
Order = Literal["native", "megatron"]

_BERT_SPECIALS, _SPAN_SPECIALS = (
    3,
    2,
)  # tokens that Megatron keeps free: [CLS] [SEP] [SEP]; two more in the encoder


@dataclass(frozen=True)
class Shape:
    """The default is GPT's. `max_length`, `min_sentences`, `short_seq_prob` are for groups of sentences.

    `max_length`: tokens of a group without special ones; with probability `short_seq_prob` a group is only about as long
    as a random number below it. `decoder_length`: tokens that a prefix-LM window has for the decoder.
    """

    kind: Kind = "gpt"
    max_length: int = 0
    min_sentences: int = 1
    short_seq_prob: float = 0.0
    decoder_length: int = 0

    @classmethod
    def bert(cls, seq_length: int, *, short_seq_prob: float = 0.1, binary_head: bool = True) -> Shape:
        """Sentence pairs (or, without a binary head, groups) for rows of `seq_length` tokens."""
        return cls("bert", seq_length - _BERT_SPECIALS, 2 if binary_head else 1, short_seq_prob)

    @classmethod
    def span(cls, kind: Literal["t5", "bart"], seq_length: int, *, short_seq_prob: float = 0.0) -> Shape:
        """Groups for encoder rows of `seq_length` tokens."""
        return cls(kind, seq_length - _SPAN_SPECIALS, 1, short_seq_prob)

    @classmethod
    def prefix(cls, decoder_length: int) -> Shape:
        """Windows of which the decoder gets the last `decoder_length` tokens."""
        return cls("t5_prefix_lm", decoder_length=decoder_length)

    @property
    def grouped(self) -> bool:
        """Groups of sentences, not windows."""
        return self.max_length > 0

    def window(self, seq_length: int, order: Order) -> int:
        """Tokens by which windows advance when the encoder reads `seq_length`; each window holds one more.

        Prefix-LM: NeMo's windows hold seq_length + decoder_length + 1 tokens, and its decoder one more than its length.
        That is kept in Megatron's order; native windows hold just what fits.
        """
        extra = self.decoder_length if order == "megatron" else self.decoder_length - 1
        return seq_length + extra if self.kind == "t5_prefix_lm" else seq_length
