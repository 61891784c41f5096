"""BERT's rows: nothing is lost, words stay whole, and what is guessed is what was asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.data.groups import Group
from megalith.data.masked import BertMasks, truncated
from megalith.data.ngrams import Budget, Lengths, Words, generator
from megalith.errors import ConfigError
from tests.data.sentences import CLS, FIRST_WORD, MASK, PAD, SEP, SIZE, WORDS, token_ids

IDS = token_ids()


def group(seed, target=60, sentences=5, longest=20):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest, sentences).tolist()
    return Group(random.integers(FIRST_WORD, WORDS, sum(lengths)), lengths, target)


def restored(row):
    """The tokens of a row before they were masked."""
    count = int(row["lengths"])
    return np.where(row["targets"] >= 0, row["targets"], row["tokens"])[:count]


def halves(row):
    """(first, second) half as the row has them."""
    tokens, ends = restored(row), np.flatnonzero(restored(row) == SEP)
    return tokens[1 : ends[0]].tolist(), tokens[ends[0] + 1 : ends[-1]].tolist()


@given(
    seed=st.integers(0, 10**6),
    number=st.integers(0, 10**9),
    target=st.integers(2, 61),
    sentences=st.integers(2, 7),
    order=st.sampled_from(["native", "megatron"]),
)
@settings(max_examples=80, deadline=None)
def test_a_row_says_all_of_its_group(seed, number, target, sentences, order):
    made = group(seed, target, sentences)
    row = BertMasks(IDS, 64).sample(made, order, generator(order, 7, number))
    count, (first, second) = int(row["lengths"]), halves(row)
    assert restored(row)[0] == CLS
    assert restored(row)[-1] == SEP
    assert count == len(first) + len(second) + 3 <= target + 3
    assert row["types"].tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1) + [0] * (64 - count)
    assert (row["tokens"][count:] == PAD).all()
    assert (row["targets"][count:] == -1).all()
    assert not np.isin(row["targets"], [CLS, SEP]).any()
    if row["order"]:
        first, second = second, first
    text, borders = made.tokens.tolist(), np.cumsum([0, *made.lengths])
    if sum(made.lengths) <= target:
        assert first + second == text
        assert len(first) in borders[1:-1]
    else:
        assert len(first) + len(second) == target
        found = [
            border
            for border in borders[1:-1]
            if inside(first, text[:border]) and inside(second, text[border:])
        ]
        assert found, "each half is a stretch of its own side of a border between sentences"
    if order == "native":
        assert (row["targets"] >= 0).any(), "every sample has a target"


def inside(part, text):
    return any(text[i : i + len(part)] == part for i in range(len(text) - len(part) + 1))


@given(seed=st.integers(0, 10**6), target=st.integers(4, 60), prob=st.sampled_from([0.15, 0.4]))
@settings(max_examples=60, deadline=None)
def test_whole_words_within_the_share(seed, target, prob):
    row = BertMasks(IDS, 64, masked_lm_prob=prob).sample(
        group(seed, target), "native", generator("native", 1, seed)
    )
    guessed, count = row["targets"] >= 0, int(row["lengths"])
    words = [token for token in range(count) if restored(row)[token] not in (CLS, SEP)]
    starts = [i for i, place in enumerate(words) if i == 0 or not IDS.continues[restored(row)[place]]]
    sizes = []
    for begin, end in zip(starts, [*starts[1:], len(words)], strict=True):
        places = words[begin:end]
        assert len({bool(guessed[place]) for place in places}) == 1, "a word is guessed as a whole"
        sizes += [len(places)]
    share = min(prob * target, max(1, round(prob * count)))
    assert 1 <= guessed.sum() <= max(share, min(sizes))


def test_single_tokens_without_whole_words():
    ids = token_ids(continues=False)
    with pytest.raises(ConfigError, match="whole_word_masking"):
        BertMasks(ids, 64)
    row = BertMasks(ids, 64, whole_words=False).sample(group(1), "native", generator("native", 1, 1))
    assert (row["targets"] >= 0).sum() == 9  # 0.15 · 60


def test_four_fifths_read_the_mask():
    """80, 10 and 10 % within five standard deviations; the random ones from the whole vocabulary."""
    masks, kinds, others = BertMasks(IDS, 64), np.zeros(3), []
    for i in range(1500):
        row = masks.sample(group(i), "native", generator("native", 3, i))
        guessed = row["targets"] >= 0
        read, wanted = row["tokens"][guessed], row["targets"][guessed]
        kept, masked = read == wanted, read == MASK
        kinds += [masked.sum(), kept.sum(), (~kept & ~masked).sum()]
        others += read[~kept & ~masked].tolist()
    total = kinds.sum()
    for found, share in zip(kinds, (0.8, 0.1, 0.1), strict=True):
        assert abs(found - share * total) < 5 * np.sqrt(total * share * (1 - share))
    assert max(others) > 0.99 * SIZE
    assert min(others) < 0.01 * SIZE


def test_a_short_target_is_masked_natively_only():
    """Megatron chooses nothing where prob · target is below one token."""
    masks = BertMasks(IDS, 64)
    rows = {
        order: [masks.sample(group(i, target=4), order, generator(order, 1, i)) for i in range(50)]
        for order in ("native", "megatron")
    }
    assert all((row["targets"] == -1).all() for row in rows["megatron"])
    assert all((row["targets"] >= 0).any() for row in rows["native"])


def test_without_a_binary_head():
    row = BertMasks(IDS, 64, binary_head=False).sample(group(2), "native", generator("native", 1, 1))
    assert "order" not in row
    assert row["types"].sum() == 0
    tokens = restored(row)
    assert (tokens == SEP).sum() == 1
    assert inside(tokens[1:-1].tolist(), group(2).tokens.tolist())


@given(
    first=st.integers(1, 40), second=st.integers(0, 40), target=st.integers(1, 80), seed=st.integers(0, 99)
)
@settings(max_examples=80, deadline=None)
def test_truncation_is_one_token_at_a_time(first, second, target, seed):
    a, b = list(range(first)), list(range(100, 100 + second))
    cut = truncated(np.array(a), np.array(b, np.int64), target, np.random.RandomState(seed))
    random = np.random.RandomState(seed)
    while len(a) + len(b) > target:
        longer = a if len(a) > len(b) else b
        longer.pop(0 if random.random_sample() < 0.5 else -1)
    assert [half.tolist() for half in cut] == [a, b]


def test_streams_of_samples_are_their_own():
    draws = {
        (seed, number): generator("native", seed, number).random_sample(4).tobytes()
        for seed in range(20)
        for number in range(20)
    }
    assert len(set(draws.values())) == len(draws)
    same = generator("megatron", 3, 4).random_sample(), generator("megatron", 2, 5).random_sample()
    assert same[0] == same[1]
    assert generator("megatron", 2**32 - 1, 6).random_sample() == np.random.RandomState(5).random_sample()


@pytest.mark.parametrize(
    "lengths", [Lengths(), Lengths(3, favor_longer=True), Lengths(10, True), Lengths(10, True, 2.0)]
)
def test_lengths_of_runs(lengths):
    draw = lengths.drawn_from(np.random.RandomState(0))
    counts = np.bincount([draw() for _ in range(20_000)], minlength=lengths.longest + 1)[1:] / 20_000
    n = np.arange(1, lengths.longest + 1)
    if lengths.geometric:
        p = 1 / (lengths.mean or 5)
        expected = p * (1 - p) ** (n - 1)
        expected[-1] += (1 - p) ** lengths.longest
    else:
        expected = (1 / n)[:: -1 if lengths.favor_longer else 1] / (1 / n).sum()
    assert np.abs(counts - expected).max() < 0.02


def test_limits_of_a_choice():
    def chosen(budget, seed=0, words=40):
        text = Words.of(np.arange(words * 2) % 2 == 0)
        return list(text.choose(budget, Lengths(3), np.random.RandomState(seed)))

    assert sum(end - first for first, end in chosen(Budget(20))) == 20
    assert len(chosen(Budget(60, spans=4))) == 4
    for seed in range(20):
        found = chosen(Budget(60, room=17), seed)
        assert sum(end - first + 1 for first, end in found) <= 17
    assert chosen(Budget(1)) == []
    ((first, end),) = chosen(Budget(1, at_least_one=True))
    assert end - first == 2
    assert chosen(Budget(1, room=2, at_least_one=True)) == []
    assert (
        list(
            Words.of(np.zeros(0, bool)).choose(
                Budget(3, at_least_one=True), Lengths(), np.random.RandomState(0)
            )
        )
        == []
    )


def test_what_the_vocabulary_lacks():
    with pytest.raises(ConfigError, match=r"has no \[CLS\], \[MASK\] token, which BERT samples"):
        BertMasks(token_ids(cls=None, mask=None), 64)
