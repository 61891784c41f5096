"""Samples of encoder-decoder models: T5's span corruption, BART's infilling and deletion, T5's prefix language model.

```
text            a b c d e f g                  chosen: b c, f
t5    encoder   a ‹0› d e ‹1› g                decoder  [BOS] ‹0› b c ‹1› f      targets  ‹0› b c ‹1› f [EOS]
bart  encoder   a [MASK] d e   g               decoder  [BOS] a b c d e f g      targets  a b c d e f g [EOS]
                             (a mask is deleted with probability delete_mask_prob: here the second)
t5_prefix_lm    window a b c d e f             encoder  a b c    decoder  [BOS] d e    targets  d e f
```
A batch holds `encoder_tokens` int64[B, S], `encoder_lengths` int64[B]; `tokens` (what the decoder reads), `targets` (−1:
not counted) int64[B, D], `lengths` int64[B]. Padding is told by the lengths, never by an id.

Two chosen spans may lie side by side: each has a sentinel (or mask) of its own, in both orders. There are never more spans
than sentinels, nor more than the decoder has room for (where Megatron stops with an error). With `permutation` as many
tokens again, of other words, change places in what the encoder reads.

A group with more tokens than a row has room for is cut: natively anywhere, so that everything is read in some epoch;
Megatron's rows always begin with its first token.

The algorithm is Megatron-LM's t5_dataset.py and NeMo 1.8's bart_dataset.py, in order `megatron` with their draws bit for
bit (but for permutation, where theirs come from a generator without a seed); NeMo 1.8's BART has no [EOS] behind its
targets, and native adds it, as NeMo did later. Knows ids. Refuses to know files and orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from megalith.data.groups import Group
from megalith.data.masks import IGNORED
from megalith.data.ngrams import Budget, Lengths, Words, generator
from megalith.data.shape import Order
from megalith.data.stream import Numbers, Stream
from megalith.data.token_ids import TokenIds, filled, refuse
from megalith.errors import Problem

Array = npt.NDArray
Row = dict[str, Array]
Spans = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class SpanMasks:
    """T5's and BART's rows. ConfigError where the vocabulary lacks a token, or the decoder is too short."""

    kind: Literal["t5", "bart"]
    ids: TokenIds
    seq_length: int
    decoder_length: int
    masked_lm_prob: float = 0.15
    lengths: Lengths = field(default_factory=lambda: Lengths(longest=10, geometric=True))
    whole_words: bool = True
    permutation: bool = False
    delete_mask_prob: float = 0.3

    def __post_init__(self) -> None:
        roles = ("bos", "eos") if self.kind == "t5" else ("bos", "eos", "mask")
        family = "T5" if self.kind == "t5" else "BART"
        problems = self.ids.missing(roles, family=family, whole_words=self.whole_words)
        if self.kind == "t5" and not self.ids.sentinels:
            what = "has no sentinel tokens (<extra_id_0> …), which stand for the spans"
            problems.append(Problem("model.tokenizer.num_sentinel_tokens", what, "100, as T5's own"))
        needed = self.seq_length if self.kind == "bart" else int(self.seq_length * self.masked_lm_prob)
        if self.decoder_length < max(needed, 2):
            what = (
                f"{self.decoder_length} is too short for what is masked: {needed} of {self.seq_length} tokens"
            )
            fix = f"{needed + 1} or more: every span costs one more, so {int(1.7 * needed)} is comfortable"
            problems.append(Problem("model.data.seq_length_dec", what, fix))
        refuse(problems)

    def batch(self, stream: Stream, numbers: Numbers) -> Row:
        """Rows of the groups `numbers`: a function of the plan's seed and of each sample's number in its source."""
        order, seed = stream.plan.order, stream.plan.seed
        return _stacked(
            [self.sample(group, order, generator(order, seed, i)) for i, group in stream.samples(numbers)]
        )

    def sample(self, group: Group, order: Order, random: np.random.RandomState) -> Row:
        """One row of the arrays that the module names."""
        tokens = _cut(group, order, random)
        words = Words.of(self.ids.begins(tokens, self.whole_words))
        budget = Budget.share(self.masked_lm_prob, len(tokens), group.target, order)
        if order == "megatron":  # more is drawn behind
            budget = replace(budget, draw_on=True)
        spans = self._spans(words, budget, random)
        read = self._permuted(tokens, words, budget, random)
        if self.kind == "t5":
            return self._t5(tokens, read, spans)
        kept = [random.random_sample() >= self.delete_mask_prob for _ in spans]
        return self._bart(tokens, read, spans, (kept, order))

    def _spans(self, words: Words, budget: Budget, random: np.random.RandomState) -> Spans:
        if not self.masked_lm_prob:
            return []
        if self.kind == "t5":
            budget = replace(budget, spans=len(self.ids.sentinels), room=self.decoder_length - 1)
        return sorted(words.choose(budget, self.lengths, random))

    def _permuted(
        self, tokens: Array, words: Words, budget: Budget, random: np.random.RandomState
    ) -> list[int]:
        """What the encoder reads, before spans are taken out."""
        read: list[int] = tokens.tolist()
        if not self.masked_lm_prob:
            return read
        if not self.permutation:
            random.shuffle(words.order)  # Megatron draws it in any case
            return read
        chosen = words.choose(Budget(budget.tokens), self.lengths, random)
        places = np.array(sorted(i for span in chosen for i in range(*span)), np.int64)
        moved = places.copy()
        random.shuffle(moved)
        for place, origin in zip(places.tolist(), tokens[moved].tolist(), strict=True):
            read[place] = origin
        return read

    def _t5(self, tokens: Array, read: list[int], spans: Spans) -> Row:
        original, at = tokens.tolist(), 0
        wanted: list[int] = []
        encoder: list[int] = []
        for sentinel, (first, end) in zip(self.ids.sentinels, spans, strict=False):
            encoder += [*read[at:first], sentinel]
            wanted += [sentinel, *original[first:end]]
            at = end
        return self._row(encoder + read[at:], [self.ids["bos"], *wanted], [*wanted, self.ids["eos"]])

    def _bart(self, tokens: Array, read: list[int], spans: Spans, how: tuple[Sequence[bool], Order]) -> Row:
        original, at = tokens.tolist(), 0
        encoder: list[int] = []
        for kept, (first, end) in zip(how[0], spans, strict=True):
            encoder += read[at:first] + ([self.ids["mask"]] if kept else [])
            at = end
        encoder += read[at:]
        if how[1] == "megatron":
            return self._row(encoder, [self.ids["bos"], *original[:-1]], original)
        return self._row(encoder, [self.ids["bos"], *original], [*original, self.ids["eos"]])

    def _row(self, encoder: list[int], decoder: list[int], targets: list[int]) -> Row:
        filler = self.ids.filler
        return {
            "encoder_tokens": filled(encoder, self.seq_length, filler),
            "encoder_lengths": np.array(len(encoder)),
            "tokens": filled(decoder, self.decoder_length, filler),
            "targets": filled(targets, self.decoder_length, IGNORED),
            "lengths": np.array(len(decoder)),
        }


@dataclass(frozen=True)
class PrefixMasks:
    """T5's prefix language model: the encoder reads the first `seq_length` tokens of a window, the decoder writes the rest.

    Nothing is drawn. NeMo's windows (order `megatron`) give the decoder one token more than seq_length_dec.
    """

    ids: TokenIds
    seq_length: int

    def __post_init__(self) -> None:
        refuse(self.ids.missing(("bos",), family="prefix language model", whole_words=False))

    def batch(self, stream: Stream, numbers: Numbers) -> Row:
        """Rows of the windows `numbers`."""
        windows = stream.read(numbers)
        targets = np.ascontiguousarray(windows[:, self.seq_length :])
        begin = np.full((len(windows), 1), self.ids["bos"], np.int64)
        return {
            "encoder_tokens": np.ascontiguousarray(windows[:, : self.seq_length]),
            "encoder_lengths": np.full(len(windows), self.seq_length),
            "tokens": np.concatenate([begin, targets[:, :-1]], axis=1),
            "targets": targets,
            "lengths": np.full(len(windows), targets.shape[1]),
        }


def _cut(group: Group, order: Order, random: np.random.RandomState) -> Array:
    """`target` tokens of a group: Megatron's are its first, so the others are never read; native begins anywhere."""
    surplus = len(group.tokens) - group.target
    begin = random.randint(0, surplus + 1) if surplus > 0 and order == "native" else 0
    return group.tokens[begin : begin + group.target]


def _stacked(rows: Sequence[Row]) -> Row:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
