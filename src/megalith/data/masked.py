"""BERT's samples: two halves of a group of sentences, perhaps swapped, with 15 % of the tokens to be guessed.

```
group    a b c │ d e │ f g               sentences of one document
order    A = a b c d e   B = f g         cut between two sentences; swapped with probability ½ (order 1)
tokens   [CLS] a [M] c d e [SEP] f g [SEP] pad    types  0 0 0 0 0 0 0 1 1 1 0     lengths 10
targets  −1    −1 b  −1 …                         −1: not counted
```
A batch holds `tokens`, `types`, `targets` int64[B, T]; `lengths` int64[B] (tokens before the filling: padding is told by
it, never by an id); with a binary head `order` int64[B] (1: the halves are swapped; −1: not counted). Of the tokens to be
guessed 80 % read [MASK], 10 % another token, 10 % themselves.

The algorithm is Megatron-LM's bert_dataset.py, in order `megatron` with its draws bit for bit. Native differs in what it
draws from, and in that every sample has at least one target. Knows ids. Refuses to know files and orders.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megalith.data.groups import Group
from megalith.data.masks import IGNORED
from megalith.data.ngrams import Budget, Lengths, Words, generator
from megalith.data.shape import Order
from megalith.data.stream import Numbers, Stream
from megalith.data.token_ids import TokenIds, filled, refuse

Array = npt.NDArray
Row = dict[str, Array]

_MASKED, _KEPT = 0.8, 0.5  # of the tokens to be guessed; of the others


@dataclass(frozen=True)
class BertMasks:
    """Makes rows of `seq_length` tokens. ConfigError where the vocabulary lacks a token that is needed."""

    ids: TokenIds
    seq_length: int
    binary_head: bool = True
    masked_lm_prob: float = 0.15
    whole_words: bool = True
    lengths: Lengths = field(default_factory=Lengths)

    def __post_init__(self) -> None:
        refuse(self.ids.missing(("cls", "sep", "mask"), family="BERT", whole_words=self.whole_words))

    def batch(self, stream: Stream, numbers: Numbers) -> Row:
        """Rows of the groups `numbers`: a function of the plan's seed and of each sample's number in its source."""
        order, seed = stream.plan.order, stream.plan.seed
        rows = [self.sample(group, order, generator(order, seed, i)) for i, group in stream.samples(numbers)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def sample(self, group: Group, order: Order, random: np.random.RandomState) -> Row:
        """One row: `tokens`, `types`, `targets` int64[T]; `lengths`, and with a binary head `order`, of shape []."""
        first, second, swapped = self._halves(group, random)
        first, second = truncated(first, second, group.target, random)
        tokens, border = self._joined(first, second)
        masked, targets = self._masked(
            tokens, Budget.share(self.masked_lm_prob, len(tokens), group.target, order), random
        )
        types = np.zeros(self.seq_length, np.int64)
        types[border : len(tokens)] = 1
        row = {
            "tokens": filled(masked, self.seq_length, self.ids.filler),
            "types": types,
            "targets": filled(targets, self.seq_length, IGNORED),
            "lengths": np.array(len(tokens)),
        }
        return {**row, "order": np.array(int(swapped))} if self.binary_head else row

    def _halves(self, group: Group, random: np.random.RandomState) -> tuple[Array, Array, bool]:
        if not self.binary_head:
            return group.tokens, group.tokens[:0], False
        count = len(group.lengths)
        sentences = int(random.randint(1, count)) if count > 2 else 1
        border = sum(group.lengths[:sentences])
        first, second = group.tokens[:border], group.tokens[border:]
        if random.random_sample() < 0.5:
            return second, first, True
        return first, second, False

    def _joined(self, first: Array, second: Array) -> tuple[Array, int]:
        """(tokens with the special ones, where the second half begins)."""
        cls, sep = np.array([self.ids["cls"]]), np.array([self.ids["sep"]])
        joined = [cls, first, sep, second, sep] if len(second) else [cls, first, sep]
        return np.concatenate(joined), len(first) + 2

    def _masked(self, tokens: Array, budget: Budget, random: np.random.RandomState) -> tuple[Array, Array]:
        """(tokens as the model reads them, targets)."""
        mask, size = self.ids["mask"], self.ids.size
        candidates = np.flatnonzero((tokens != self.ids["cls"]) & (tokens != self.ids["sep"]))
        texts = tokens[candidates]
        words = Words.of(self.ids.begins(texts, self.whole_words))
        read, targets, uniform = texts.copy(), np.full(len(texts), IGNORED), random.random_sample
        for first, end in words.choose(budget, self.lengths, random):
            targets[first:end] = texts[first:end]
            for i in range(first, end):
                if uniform() < _MASKED:
                    read[i] = mask
                elif uniform() >= _KEPT:
                    read[i] = random.randint(0, size)
        masked, wanted = tokens.copy(), np.full(len(tokens), IGNORED)
        masked[candidates], wanted[candidates] = read, targets
        return masked, wanted


def truncated(first: Array, second: Array, target: int, random: np.random.RandomState) -> tuple[Array, Array]:
    """Two halves of together at most `target` tokens: each time the longer one (the second of two equal) loses one, at
    its front or its back with probability ½."""
    surplus = len(first) + len(second) - target
    if surplus <= 0:
        return first, second
    difference = len(first) - len(second)
    turns = np.arange(surplus)
    from_first = np.where(turns < abs(difference), difference > 0, (turns - abs(difference)) % 2 == 1)
    front = random.random_sample(surplus) < 0.5
    return _cut(first, front[from_first]), _cut(second, front[~from_first])


def _cut(tokens: Array, front: Array) -> Array:
    """Without one token for each of `front`: at the front where it is true, else at the back."""
    begin = int(front.sum())
    return tokens[begin : len(tokens) - (len(front) - begin)]
