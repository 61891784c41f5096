"""Megatron's and NeMo's own numbers for BERT, T5 and BART: computed by running the reference pieces, not by us.

The digests are CRC-32s of what `build_training_sample` of Megatron-LM 3.0 (BERT, T5) and NeMo 1.8 (BART), and
`build_mapping` compiled from helpers.cpp, gave for the inputs below.
"""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from megalith.data.groups import Group
from megalith.data.masked import BertMasks
from megalith.data.ngrams import Lengths
from megalith.data.sentence_index import megatron_groups
from megalith.data.shape import Shape
from megalith.data.span import SpanMasks
from megalith.data.token_ids import TokenIds
from megalith.data.twister import draws_32, draws_64

DOCUMENTS = np.array([0, 3, 4, 9, 12])
SIZES = np.array([10, 12, 8, 30, 20, 5, 7, 9, 11, 6, 600, 4], np.int32)


def test_twisters():
    """Of a C++ program that prints `std::mt19937(1234)` and `std::mt19937_64(1235)`."""
    assert next(draws_32(np.random.RandomState(1234)))[:3].tolist() == [822569775, 2137449171, 2671936806]
    drawn = draws_64(1235, 1000)
    assert drawn[[0, 1, 155, 156, 311, 312, 999]].tolist() == [
        12475983374653888083, 573922149886606219, 14564710730054251276, 9346701578828031780,
        13160480149720714830, 5122116058505594815, 1212260750814134155,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("min_sentences", "prob", "samples", "rows"),
    [
        (2, 0.1, 4, [[7, 9, 29], [4, 7, 29], [0, 3, 29], [7, 9, 29], [4, 7, 29], [0, 3, 29]]),
        (1, 0.1, 5, [[0, 3, 29], [3, 4, 29], [3, 4, 29], [7, 9, 29], [0, 3, 29], [4, 7, 29], [4, 7, 29], [7, 9, 29]]),
        (2, 0.5, 5, [[7, 9, 29], [4, 6, 16], [0, 3, 29], [6, 9, 29], [4, 7, 29], [0, 3, 10]]),
    ],
)  # fmt: skip
def test_mapping(min_sentences, prob, samples, rows):
    shape = Shape("bert", 29, min_sentences, prob)
    index = megatron_groups(SIZES, DOCUMENTS, shape, samples=samples, seed=1234)
    assert index.groups.tolist() == rows
    assert index.groups.dtype == np.uint32


def corpus(case):
    random = np.random.RandomState(case)
    lengths = random.randint(0, 12, 200)
    sizes = random.randint(1, 560 if case % 2 else 60, lengths.sum()).astype(np.int32)
    return sizes, np.concatenate([[0], np.cumsum(lengths)])


@pytest.mark.parametrize(
    ("case", "shape", "rows", "digest"),
    [
        (1, Shape("bert", 125, 2, 0.1), 2000, 3658012456),
        (2, Shape("bert", 125, 2, 0.15), 5000, 2268887973),
        (3, Shape("t5", 30, 1, 0.0), 3000, 5691894),
        (4, Shape("t5", 510, 1, 0.5), 700, 657873429),
    ],
)
def test_longer_mappings(case, shape, rows, digest):
    sizes, documents = corpus(case)
    groups = megatron_groups(sizes, documents, shape, samples=rows, seed=77 + case).groups
    assert len(groups) >= rows
    assert zlib.crc32(groups.tobytes()) == digest


# ---- masks: the toy of the reference study ----

CONTINUES = np.array([k % 5 == 4 and 4 < k < 30 for k in range(60)])
SENTENCES = [[5, 6, 9, 7], [8, 10, 14, 19], [11, 12, 13], [15, 16, 24, 17, 18]]
IDS = TokenIds(30, cls=1, sep=2, mask=3, pad=0, bos=30, eos=31, sentinels=range(40, 60), continues=CONTINUES)


def group(sentences, target):
    tokens = np.concatenate(sentences).astype(np.int64)
    return Group(tokens, [len(sentence) for sentence in sentences], target)


@pytest.mark.parametrize(
    ("seed", "swapped", "original", "read", "places"),
    [
        (1234, 0, [1, 5, 6, 9, 7, 8, 10, 14, 19, 2, 15, 16, 24, 17, 18, 2],
         [1, 3, 6, 9, 7, 3, 10, 14, 19, 2, 3, 16, 24, 3, 3, 2], [1, 5, 10, 13, 14]),
        (1235, 0, [1, 6, 9, 7, 8, 10, 14, 19, 11, 2, 15, 16, 24, 17, 18, 2],
         [1, 6, 9, 3, 3, 3, 3, 3, 11, 2, 15, 16, 24, 17, 18, 2], [3, 4, 5, 6, 7]),
        (1236, 1, [1, 12, 13, 15, 16, 24, 17, 18, 2, 6, 9, 7, 8, 10, 14, 2],
         [1, 3, 13, 15, 16, 24, 17, 3, 2, 3, 3, 7, 3, 10, 14, 2], [1, 7, 9, 10, 12]),
    ],
)  # fmt: skip
def test_bert(seed, swapped, original, read, places):
    masks = BertMasks(IDS, 20, masked_lm_prob=0.4)
    row = masks.sample(group(SENTENCES, 13), "megatron", np.random.RandomState(seed))
    assert int(row["order"]) == swapped
    assert int(row["lengths"]) == 16
    assert row["tokens"].tolist() == [*read, 0, 0, 0, 0]
    assert np.flatnonzero(row["targets"] >= 0).tolist() == places
    assert row["targets"][places].tolist() == [original[place] for place in places]


@pytest.mark.parametrize(
    ("seed", "spans"),
    [(1234, [range(10, 16)]), (1235, [range(8, 14)]), (1236, [range(3), range(3, 5), range(15, 16)])],
)
def test_t5(seed, spans):
    text = np.concatenate(SENTENCES).tolist()
    row = SpanMasks("t5", IDS, 20, 20, 0.4).sample(
        group(SENTENCES, 16), "megatron", np.random.RandomState(seed)
    )
    wanted = [token for i, span in enumerate(spans) for token in (40 + i, *(text[place] for place in span))]
    assert row["targets"][row["targets"] >= 0].tolist() == [*wanted, 31]
    assert row["tokens"][: int(row["lengths"])].tolist() == [30, *wanted]
    covered = {place: i for i, span in enumerate(spans) for place in span}
    encoder = [40 + covered[p] if p in covered else t for p, t in enumerate(text)
               if p not in covered or p == spans[covered[p]].start]  # fmt: skip
    assert row["encoder_tokens"][: int(row["encoder_lengths"])].tolist() == encoder


# ---- many more, as digests ----


def inputs(case):
    """(group, length of a row, probability, seed) of a case."""
    random = np.random.RandomState(case)
    sentences = [random.randint(4, 30, random.randint(1, 30)) for _ in range(random.randint(2, 8))]
    length = random.randint(24, 100)
    target, prob = random.randint(12, length - 2), (0.15, 0.4)[case % 2]
    return group(sentences, target), length, prob, 1000 + case


def digest_of(rows):
    return zlib.crc32(np.concatenate([np.concatenate(row) for row in rows]).astype(np.int64).tobytes())


def test_many_of_bert():
    rows = []
    for case in range(200):
        made, length, prob, seed = inputs(case)
        masks = BertMasks(IDS, length, binary_head=case % 3 != 0, masked_lm_prob=prob)
        row = masks.sample(made, "megatron", np.random.RandomState(seed))
        rows.append([row["tokens"], row["types"], row["targets"]])
    assert digest_of(rows) == 1750834766


def test_many_of_t5():
    rows = []
    for case in range(200):
        made, length, prob, seed = inputs(case)
        row = SpanMasks("t5", IDS, length, 80, prob).sample(made, "megatron", np.random.RandomState(seed))
        rows.append([row["encoder_tokens"], row["tokens"], row["targets"]])
    assert digest_of(rows) == 80061930


def test_many_of_bart():
    rows = []
    for case in range(200):
        made, length, prob, seed = inputs(case)
        lengths = Lengths(1 + case % 10, case % 2 == 0, 3.0 if case % 4 == 0 else None, case % 5 == 0)
        masks = SpanMasks("bart", IDS, length, length, prob, lengths=lengths, delete_mask_prob=0.3)
        row = masks.sample(made, "megatron", np.random.RandomState(seed))
        rows.append([row["encoder_tokens"], row["tokens"], row["targets"]])
    assert digest_of(rows) == 3057904935
