"""Unigram and bigram models of a token stream: the bars that a trained model has to clear.

Counts only; knows no neural model. N tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class NgramScores:
    """Mean negative log-likelihoods in nats a token of one held-out stream, on the same targets."""

    unigram: float
    bigram: float
    targets: int

    @property
    def unigram_perplexity(self) -> float:
        return float(np.exp(self.unigram))

    @property
    def bigram_perplexity(self) -> float:
        return float(np.exp(self.bigram))


def score(train: np.ndarray, held_out: np.ndarray, vocabulary: int) -> NgramScores:
    """Scores every token of `held_out` but the first, having counted `train`.

    Unigram: add-one smoothing over `vocabulary`. Bigram: Witten-Bell interpolation with that unigram,
    p(w|h) = (c(h,w) + T(h) p(w)) / (c(h) + T(h)), T(h) the number of kinds seen after h (Witten and Bell 1991).
    Both arrays are one-dimensional token ids below `vocabulary`.
    """
    train = np.asarray(train, dtype=np.int64)
    held_out = np.asarray(held_out, dtype=np.int64)
    probabilities = (np.bincount(train, minlength=vocabulary) + 1) / (len(train) + vocabulary)
    targets = held_out[1:]
    unigram = probabilities[targets]
    bigram = witten_bell(train, held_out, vocabulary, unigram)
    return NgramScores(float(-np.log(unigram).mean()), float(-np.log(bigram).mean()), len(targets))


def witten_bell(train: np.ndarray, held_out: np.ndarray, vocabulary: int, backoff: np.ndarray) -> np.ndarray:
    """Probability of each of `held_out[1:]` after its predecessor; `backoff` holds their unigram probabilities."""
    pairs, counts = np.unique(train[:-1] * vocabulary + train[1:], return_counts=True)
    histories = np.bincount(train[:-1], minlength=vocabulary)
    kinds = np.bincount(pairs // vocabulary, minlength=vocabulary)
    wanted = held_out[:-1] * vocabulary + held_out[1:]
    if len(pairs):
        place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
        seen = np.where(pairs[place] == wanted, counts[place], 0)
    else:
        seen = np.zeros(len(wanted), dtype=np.int64)
    history = held_out[:-1]
    mass = histories[history] + kinds[history]
    with np.errstate(invalid="ignore", divide="ignore"):
        mixed = (seen + kinds[history] * backoff) / mass
    return np.where(mass > 0, mixed, backoff)
