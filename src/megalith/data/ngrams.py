"""Which words of a text are masked: whole n-grams of words, in random order, until a share of the tokens is reached.

The algorithm is `create_masked_lm_predictions` of Megatron-LM's dataset_utils.py (after ALBERT's), with its draws in its
order; what it does with lists of lists is done here with borders of words. Knows words as numbers. Refuses to know
tokens, and what becomes of what is chosen.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil, floor

import numpy as np
import numpy.typing as npt

from megalith.data.shape import Order

_SPANBERT_MEAN = 5.0
"""Mean of the geometric lengths before they are clipped (SpanBERT, arXiv 1907.10529, section 3.1)."""


def generator(order: Order, seed: int, number: int) -> np.random.RandomState:
    """What a sample draws from: Megatron's `RandomState(seed + number)`; native a stream of its own for each (seed, number).

    Megatron's neighbours share streams between seeds (seed 1, sample 2 draws what seed 2, sample 1 does); native ones do
    not. Both make numbers by numpy's legacy rules, which never change.
    """
    if order == "megatron":
        return np.random.RandomState((seed + number) % (1 << 32))
    return np.random.RandomState(np.random.Philox(key=np.array([seed, number], np.uint64)))


@dataclass(frozen=True)
class Lengths:
    """Words of an n-gram, 1 … `longest`: with probability ∝ 1/n (`favor_longer`: reversed), or geometric with mean `mean`
    and clipped."""

    longest: int = 3
    geometric: bool = False
    mean: float | None = None
    favor_longer: bool = False

    def drawn_from(self, random: np.random.RandomState) -> Callable[[], int]:
        """Draws a length as numpy's `geometric` or `choice` does (one uniform number, looked up in the cumulated shares)."""
        if self.geometric:
            prob, geometric = 1 / (self.mean or _SPANBERT_MEAN), random.geometric
            return lambda: min(geometric(prob), self.longest)
        cumulated, uniform = self._cumulated, random.random_sample
        return lambda: bisect_right(cumulated, uniform()) + 1

    @property
    def average(self) -> float:
        """Words of a run, on average."""
        if self.geometric:
            stay = 1 - 1 / (self.mean or _SPANBERT_MEAN)
            return sum(stay**n for n in range(self.longest))
        return sum(1 - share for share in [0.0, *self._cumulated[:-1]])

    @cached_property
    def _cumulated(self) -> list[float]:
        shares = 1.0 / np.arange(1, self.longest + 1)
        shares /= shares.sum()
        shares = shares[::-1] if self.favor_longer else shares
        cumulated = (shares / shares.sum()).cumsum()
        cumulated /= cumulated[-1]
        listed: list[float] = cumulated.tolist()
        return listed


@dataclass(frozen=True)
class Budget:
    """How much may be chosen: `tokens` in all; at most `spans` n-grams; tokens and n-grams together at most `room`.

    `at_least_one`: the shortest word is chosen where nothing else fits into `tokens`. `draw_on`: go on drawing where not
    even one more token fits, as Megatron does, for the sake of what is drawn from the same stream afterwards.
    """

    tokens: float
    spans: int = 1 << 62
    room: int = 1 << 62
    at_least_one: bool = False
    draw_on: bool = False

    @classmethod
    def share(cls, prob: float, length: int, target: int, order: Order) -> Budget:
        """`prob` of `length` tokens, but no more than `prob` of `target`. Megatron's is below one token, so none, where
        the target is short; native is at least one."""
        tokens = min(prob * target, float(max(1, round(length * prob))))
        if order == "megatron":
            return cls(tokens)
        return cls(max(tokens, 1.0), at_least_one=True)


@dataclass
class Words:
    """The words of a text: word w is tokens `borders[w] … borders[w + 1] − 1` of its candidates. `order` int64[W] is the
    order in which they are tried, `covered` says which are chosen; both change while it works."""

    borders: list[int]
    order: npt.NDArray[np.int64]
    covered: bytearray

    @classmethod
    def of(cls, begins: npt.NDArray[np.bool_]) -> Words:
        """`begins` bool[n]: whether each candidate token begins a word. The first one does in any case."""
        starts = np.flatnonzero(begins).tolist()
        if len(begins) and (not starts or starts[0]):
            starts = [0, *starts]
        return cls([*starts, len(begins)], np.arange(len(starts)), bytearray(len(starts)))

    def choose(
        self, budget: Budget, lengths: Lengths, random: np.random.RandomState
    ) -> Iterator[tuple[int, int]]:
        """(first, behind the last) candidate token of each n-gram chosen, in the order of choice.

        Draws from `random` between two results, as its caller may. No word is chosen twice.
        """
        random.shuffle(self.order)
        borders, covered, draw = self.borders, self.covered, lengths.drawn_from(random)
        count, spans, left, room = len(covered), 0, floor(budget.tokens), budget.room
        enough = left - ceil(budget.tokens) if budget.draw_on else 0
        for word in self.order.tolist():
            if left <= enough or spans >= budget.spans:
                break
            fits = borders[word] + (left if left < room else room - 1)
            end = word + draw()
            if end > count:
                end = count
            while borders[end] > fits and end > word + 1:
                end -= 1
            if borders[end] > fits or covered.find(1, word, end) >= 0:
                continue
            covered[word:end] = b"\1" * (end - word)
            size = borders[end] - borders[word]
            left, room, spans = left - size, room - size - 1, spans + 1
            yield borders[word], borders[end]
        if budget.at_least_one and not spans:
            yield from self._shortest(budget)

    def _shortest(self, budget: Budget) -> Iterator[tuple[int, int]]:
        free = [word for word in self.order.tolist() if not self.covered[word]]
        sizes = [self.borders[word + 1] - self.borders[word] for word in free]
        if sizes and budget.spans and min(sizes) < budget.room:
            word = free[sizes.index(min(sizes))]
            self.covered[word] = 1
            yield self.borders[word], self.borders[word + 1]
