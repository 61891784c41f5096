"""The fast path of WordPiece agrees with the reference on every character, wherever it stands."""

from __future__ import annotations

import random

import numpy as np
import pytest

from megalith.tokenizers import words
from megalith.tokenizers.fast import ReferenceEncoder
from megalith.tokenizers.load import load_tokenizer
from megalith.tokenizers.names import TokenizerFiles

from .bert import write_vocabulary

ALIKE = [chr(code) for first, last in words._ALIKE for code in range(first, last + 1)]
ANY = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
CONTEXTS = ("{}", "the {} cat", "a{}b", "E{}", "{}e")


@pytest.fixture(scope="module", params=["BertWordPieceLowerCase", "BertWordPieceCase"])
def tokenizer(request, tmp_path_factory):
    """A vocabulary where each alike character is a piece, so that nothing hides behind [UNK]."""
    from .bert import pieces

    kept = [c for c in ALIKE if not c.isspace() and ord(c) > 0x20 and c.isprintable()]
    lines = list(dict.fromkeys([*pieces(), *kept, *(f"##{c}" for c in kept)]))
    path = write_vocabulary(tmp_path_factory.mktemp("vocabulary") / "vocab.txt", lines)
    return load_tokenizer(TokenizerFiles(type=request.param, vocab_file=str(path)))


def assert_same(tokenizer, texts):
    documents = [text.encode() for text in texts]
    ids, lengths = words.TokieEncoder(tokenizer).encode(documents)
    expected, counts = ReferenceEncoder(tokenizer).encode(documents)
    if not np.array_equal(lengths, counts) or not np.array_equal(ids, expected):
        rows = zip(
            np.split(ids, np.cumsum(lengths)), np.split(expected, np.cumsum(counts)), texts, strict=False
        )
        assert [text for own, reference, text in rows if own.tolist() != reference.tolist()] == []


def test_strings_of_any_characters(tokenizer):
    rng = random.Random(0)
    marks = [chr(code) for code in range(0x300, 0x370)] + list("aeiouÅéǖΣσßİı\u1e9e\u212b")
    pools = (
        ALIKE,
        ANY,
        marks,
        [" ", "\n", "\u3000", "\u00a0", "\x00", "x" * 100, "x" * 101, "中", "#", "##"],
    )
    texts = []
    for _ in range(2500):
        pool = rng.choice(pools)
        texts.append(
            "".join(rng.choice(rng.choice((pool, pool, " ab.\n"))) for _ in range(rng.randint(0, 16)))
        )
    assert_same(tokenizer, texts)


def test_characters_that_differ_are_routed():
    assert not words._has_other("naïve 中文 👍".encode())
    assert words._has_other("a \u0378".encode())
    assert [part.text for part in words._parts(0, "ab c\u0378\nd ef \x7f")] == [
        *("ab ", "c\u0378\nd", " ef ", "\x7f"),
        "",
    ]


def test_a_long_text_without_spaces_is_cut_in_linear_time():
    assert len(words._parts(0, "x" * 1_000_000 + "\x7f")) == 3


@pytest.mark.slow
@pytest.mark.parametrize("context", CONTEXTS)
def test_every_code_point(tokenizer, context):
    """All those that tokie is trusted with; the others are the reference's anyway: some of them, for the way they take."""
    assert_same(tokenizer, [context.format(character) for character in ALIKE + ANY[::100]])


@pytest.mark.parametrize("context", CONTEXTS)
def test_every_hundredth_code_point(tokenizer, context):
    assert_same(tokenizer, [context.format(character) for character in ALIKE[::37] + ANY[::500]])
