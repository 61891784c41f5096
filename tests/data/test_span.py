"""T5, BART and prefix-LM rows: the decoder's side undoes the encoder's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.data.ngrams import Lengths, generator
from megalith.data.span import SpanMasks
from megalith.errors import ConfigError
from tests.data.sentences import BOS, EOS, MASK, PAD, SENTINELS, token_ids
from tests.data.test_masked import group

IDS = token_ids()
cases = given(
    seed=st.integers(0, 10**6),
    target=st.integers(2, 62),
    prob=st.sampled_from([0.15, 0.5]),
    order=st.sampled_from(["native", "megatron"]),
    whole=st.booleans(),
)


def sample(masks, seed, target, order="native"):
    made = group(seed, target)
    return made.tokens.tolist(), masks.sample(made, order, generator(order, 1, seed))


def stretches(tokens, target, order):
    """What of a group a row may be made of."""
    last = max(len(tokens) - target, 0) if order == "native" else 0
    return [tokens[begin : begin + target] for begin in range(last + 1)]


def parts(row):
    """(what the encoder reads, what the decoder reads, targets), without the filling."""
    encoder = row["encoder_tokens"][: int(row["encoder_lengths"])].tolist()
    decoder = row["tokens"][: int(row["lengths"])].tolist()
    return encoder, decoder, row["targets"][row["targets"] >= 0].tolist()


@cases
@settings(max_examples=80, deadline=None)
def test_t5_can_be_put_together_again(seed, target, prob, order, whole):
    masks = SpanMasks("t5", IDS, 64, 48, prob, whole_words=whole)
    tokens, row = sample(masks, seed, target, order)
    encoder, decoder, targets = parts(row)
    assert decoder == [BOS, *targets[:-1]]
    assert targets[-1] == EOS
    spans = {}
    for token in targets[:-1]:
        if token in SENTINELS:
            spans[token] = []
        else:
            spans[next(reversed(spans))].append(token)
    assert list(spans) == list(SENTINELS[: len(spans)]), "sentinels go up from the first"
    assert [token for token in encoder if token in SENTINELS] == list(spans)
    text = [t for token in encoder for t in spans.get(token, [token])]
    assert text in stretches(tokens, target, order)
    assert all(spans.values())
    assert (row["encoder_tokens"][len(encoder) :] == PAD).all()
    assert (row["tokens"][len(decoder) :] == PAD).all()
    if order == "native":
        assert spans, "every sample has a target"
    if whole:
        for span in spans.values():
            place = inside(text, span)
            assert place
    assert sum(map(len, spans.values())) <= max(prob * target + 1, 3)


def inside(text, part):
    """Whether `part` is a stretch of whole words of `text`."""
    marks = IDS.continues
    return any(
        text[i : i + len(part)] == part
        and (i == 0 or not marks[text[i]])
        and (i + len(part) == len(text) or not marks[text[i + len(part)]])
        for i in range(len(text) - len(part) + 1)
    )


@cases
@settings(max_examples=60, deadline=None)
def test_bart_writes_the_original(seed, target, prob, order, whole):
    masks = SpanMasks("bart", IDS, 64, 64, prob, whole_words=whole, delete_mask_prob=0.5)
    tokens, row = sample(masks, seed, target, order)
    encoder, decoder, targets = parts(row)
    text = targets[:-1] if order == "native" else targets
    assert text in stretches(tokens, target, order)
    if order == "native":
        assert (decoder, targets) == ([BOS, *text], [*text, EOS])
    else:
        assert (decoder, targets) == ([BOS, *text[:-1]], text)
    kept = [token for token in encoder if token != MASK]
    rest = iter(text)
    assert all(token in rest for token in kept), "what is left is in its order"
    assert len(text) - len(kept) <= max(prob * target + 1, 3)


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 1.0, 1.0), (1.0, 0.0, 0.0), (0.3, 0.6, 0.8)])
def test_masks_that_are_deleted(share, low, high):
    masks = SpanMasks("bart", IDS, 64, 64, 0.4, delete_mask_prob=share)
    whole = SpanMasks("bart", IDS, 64, 64, 0.4, delete_mask_prob=0.0)
    seen = possible = 0
    for seed in range(60):
        seen += parts(sample(masks, seed, 60)[1])[0].count(MASK)
        possible += parts(sample(whole, seed, 60)[1])[0].count(MASK)
    assert low <= seen / possible <= high


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_permutation_moves_tokens_and_loses_none(kind):
    plain = SpanMasks(kind, IDS, 64, 64, 0.3, delete_mask_prob=0.0)
    moved = SpanMasks(kind, IDS, 64, 64, 0.3, delete_mask_prob=0.0, permutation=True)
    changed = 0
    for seed in range(20):
        one, other = (parts(sample(masks, seed, 60)[1]) for masks in (plain, moved))
        assert one[1:] == other[1:], "the decoder writes the same"
        assert sorted(one[0]) == sorted(other[0])
        changed += sum(a != b for a, b in zip(one[0], other[0], strict=True))
    assert 0.15 < changed / (20 * 60) < 0.35


def test_spans_are_limited_by_the_sentinels():
    masks = SpanMasks("t5", token_ids(sentinels=SENTINELS[:3]), 64, 64, 0.5, lengths=Lengths(1))
    for order in ("native", "megatron"):
        for seed in range(20):
            encoder, _, targets = parts(sample(masks, seed, 60, order)[1])
            assert sum(token in SENTINELS for token in targets) == 3
            assert sum(token in SENTINELS for token in encoder) == 3


def test_spans_are_limited_by_the_decoder():
    """Megatron stops with an error where the decoder's row is full."""
    masks = SpanMasks("t5", IDS, 64, 24, 0.3, lengths=Lengths(1))
    full = [parts(sample(masks, seed, 60)[1])[1] for seed in range(40)]
    assert max(map(len, full)) <= 24
    assert np.mean([len(row) for row in full]) > 21


def test_a_long_group_is_read_from_anywhere_natively_only():
    masks, begins = SpanMasks("bart", IDS, 64, 64, 0.0), {"native": set(), "megatron": set()}
    made = group(1)._replace(tokens=np.arange(6, 6 + 65), target=62)
    for order, seen in begins.items():
        for seed in range(60):
            seen.add(parts(masks.sample(made, order, generator(order, 1, seed)))[0][0] - 6)
    assert begins == {"native": {0, 1, 2, 3}, "megatron": {0}}


def test_bart_without_masks_copies():
    tokens, row = sample(SpanMasks("bart", IDS, 64, 64, 0.0), 1, 60)
    text = parts(row)[0]
    assert text in stretches(tokens, 60, "native")
    assert parts(row) == (text, [BOS, *text], [*text, EOS])


@pytest.mark.parametrize(
    ("kind", "changes", "length", "words"),
    [
        ("t5", {"sentinels": ()}, 48, ["num_sentinel_tokens", "has no sentinel tokens"]),
        ("t5", {"bos": None, "eos": None}, 48, ["begin-of-sequence, end-of-sequence", "T5"]),
        ("t5", {}, 8, ["seq_length_dec", "8 is too short", "9 of 64 tokens", "10 or more"]),
        ("bart", {"mask": None}, 64, [r"has no \[MASK\] token, which BART"]),
    ],
)
def test_what_does_not_fit(kind, changes, length, words):
    for word in words:
        with pytest.raises(ConfigError, match=word):
            SpanMasks(kind, token_ids(**changes), 64, length)


def test_all_that_does_not_fit_at_once():
    with pytest.raises(ConfigError) as caught:
        SpanMasks("t5", token_ids(bos=None, sentinels=(), continues=False), 64, 2)
    assert len(caught.value.problems) == 4
