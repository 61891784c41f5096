"""The n-gram bars against slow, obvious counting."""

import itertools
from collections import Counter

import numpy as np
import pytest

from megalith.evaluate import ngram


def slow(train, held_out, vocabulary):
    words, pairs = Counter(train), Counter(itertools.pairwise(train))
    history = Counter(train[:-1])
    kinds = Counter(h for h, _ in pairs)
    uni = bi = 0.0
    for h, w in itertools.pairwise(held_out):
        p = (words[w] + 1) / (len(train) + vocabulary)
        uni -= np.log(p)
        bi -= np.log((pairs[h, w] + kinds[h] * p) / (history[h] + kinds[h])) if history[h] else np.log(p)
    n = len(held_out) - 1
    return uni / n, bi / n


@pytest.mark.parametrize("seed", range(4))
def test_equals_slow_counting(seed):
    random = np.random.default_rng(seed)
    vocabulary = 13
    train, held_out = random.integers(0, 9, 300), random.integers(0, vocabulary, 80)
    scores = ngram.score(train, held_out, vocabulary)
    unigram, bigram = slow(train.tolist(), held_out.tolist(), vocabulary)
    assert scores.unigram == pytest.approx(unigram, abs=1e-12)
    assert scores.bigram == pytest.approx(bigram, abs=1e-12)
    assert scores.targets == 79


def test_bigram_is_a_distribution():
    train = np.array([0, 1, 2, 0, 1, 1, 0])
    vocabulary = 5
    unigram = (np.bincount(train, minlength=vocabulary) + 1) / (len(train) + vocabulary)
    for history in range(vocabulary):
        total = 0.0
        for word in range(vocabulary):
            stream = np.array([history, word])
            total += ngram.witten_bell(train, stream, vocabulary, unigram[[word]])[0]
        assert total == pytest.approx(1.0)


def test_a_cycle_is_learnt():
    train = np.tile(np.arange(10), 200)
    scores = ngram.score(train, np.tile(np.arange(10), 3), 10)
    assert scores.bigram_perplexity < 1.1 < 9 < scores.unigram_perplexity
