"""Sentences: rules, nothing lost but white space, a text in parts as the whole, and borders against gold."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megalith.data.sentences import (
    CODES,
    LANGUAGES,
    Sentences,
    language_code,
    last_paragraph,
    split_sentences,
)
from megalith.errors import DataError

from .preprocessing import make_prose
from .sentence_gold import scores

PIECES = [
    ".",
    "!",
    "?",
    "…",
    '"',
    "“",
    "”",
    "«",
    "»",
    "'",
    "’",
    "(",
    ")",
    "[",
    "1.",
    "Dr.",
    "e.g.",
    "3.14",
    "é",
    "Ω",
    "ß",
    "中。",
    "？",
    "it",
    "\x00",
    "A_dog",
]
SPACES = (" ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u2028", "\u3000")
PARTS = st.sampled_from([*PIECES, *SPACES, "x" * 40])
TEXTS = st.lists(st.one_of(PARTS, PARTS, st.text(max_size=3)), max_size=40).map("".join)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("Dr. Smith paid 3.50 to Mr. Jones. He left.", ["Dr. Smith paid 3.50 to Mr. Jones.", "He left."]),
        ("“I will. Now.” He did.", ["“I will.", "Now.”", "He did."]),
        ('She said "Stop. Go." Then "No."', ['She said "Stop.', 'Go."', 'Then "No."']),
        ("“Come in!” said she. “No!” cried he.", ["“Come in!” said she.", "“No!” cried he."]),
        ("A title\n\nIts text", ["A title", "Its text"]),
        ("Wrapped\nlines go on. So\nhere.", ["Wrapped\nlines go on.", "So\nhere."]),
        ("", []),
        (" \n\n\t", []),
        ("...", ["..."]),
    ],
)
def test_rules(text, sentences):
    assert split_sentences(text, "en") == sentences


def test_white_space_behind_a_sentence_is_kept_on_demand():
    text = "  One.  Two!\n\n\nThree?\n"
    assert split_sentences(text, "en") == ["One.", "Two!", "Three?"]
    assert split_sentences(text, "en", keep_spaces=True) == ["  One.  ", "Two!\n\n\n", "Three?\n"]
    assert Sentences("en", keep_spaces=True).split(b" \n") == [b" \n"]
    assert Sentences("en").split("É. Ü.".encode()) == ["É.".encode(), "Ü.".encode()]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=TEXTS, language=st.sampled_from(["en", "de", "fr", "ja", "hy", "el"]))
@example(text='"" "', language="en")
@example(text="“”. “A. B”\n\n \n“", language="en")
def test_nothing_is_lost_but_white_space(text, language):
    dropped = split_sentences(text, language)
    kept = split_sentences(text, language, keep_spaces=True)
    assert "".join(kept) == text
    assert [sentence.strip() for sentence in kept if sentence.strip()] == dropped
    assert "".join("".join(dropped).split()) == "".join(text.split())
    assert all(sentence and sentence == sentence.strip() for sentence in dropped)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(head=TEXTS, tail=TEXTS)
def test_what_stands_before_the_last_paragraph_is_split_the_same_whatever_follows(head, tail):
    for keep in (False, True):
        place = last_paragraph(head)
        text = head + tail
        first = split_sentences(text[:place], "en", keep_spaces=keep) if place else []
        rest = split_sentences(text[place:], "en", keep_spaces=keep)
        assert first + rest == split_sentences(text, "en", keep_spaces=keep)


def test_prose_of_the_other_tests_has_many_sentences():
    texts = make_prose(50)
    assert sum(len(split_sentences(text, "en")) for text in texts) > 200


def test_languages():
    assert language_code("english") == language_code("EN") == "en"
    assert {language_code(name) for name in (*LANGUAGES, *CODES)} == CODES
    for code in CODES:
        assert len(split_sentences("Aa bb. Cc dd! Ee ff?", code)) >= 2
    with pytest.raises(DataError, match="no sentence splitter for 'klingon'") as caught:
        language_code("klingon")
    assert "english" in caught.value.problem.fix


def test_borders_of_abstracts(real_data):
    """1,692 abstracts; the gold itself has borders inside decimals (`0. 86`), so that 1 cannot be reached."""
    root = real_data("ner-bc5cdr").parent
    real_data("ner-ncbi-disease")
    found, texts, sentences = scores(root, lambda text: split_sentences(text, "en"))
    assert (texts, sentences) == (1692, 15488)
    assert found > 0.985
