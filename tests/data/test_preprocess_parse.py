"""Lines to documents: the fast way and the slow way must say the same of every line."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.data.preprocess.parse import JsonLines, Paragraphs, TextLines, WholeText
from tests.data.preprocessing import BAD_LINES

GOOD = [
    b'{"text": "plain"}',
    b'{"text": ""}',
    '{"text": "naïve 中文 👍"}'.encode(),
    b'{"text": "esc \\n \\t \\" \\\\ \\/ \\u00e9 \\ud83d\\ude00", "n": {"deep": [1, 2, {"text": 3}]}}',
    b'{"id": 1e999, "text": "big number elsewhere", "x": [{}]}',
    b'{"text": "first", "text": "last wins"}',
    b'  {"text": "indented"}  ',
    b'{"te\\u0078t": "escaped key"}',
    b'{"text": "carriage return"}\r',
    b'{"text": "brace}"}',
]
BLANK = [b"", b"  ", b"\r"]


def expected(lines: list[bytes]) -> tuple[list[bytes], list[int], int]:
    """Documents, numbers of rejected lines and blank lines, one line at a time by the standard library."""
    documents, bad, blank = [], [], 0
    for number, line in enumerate(lines):
        if not line.strip():
            blank += 1
        elif line in dict(BAD_LINES):
            bad.append(number)
        else:
            documents.append(json.loads(line)["text"].encode())
    return documents, bad, blank


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(GOOD * 3 + BLANK + [line for line, _ in BAD_LINES]), min_size=1, max_size=12))
def test_any_mixture_of_lines(lines):
    parsed = JsonLines(("text",)).parse(memoryview(b"\n".join(lines) + b"\n"))
    documents, bad, blank = expected(lines)
    assert parsed.columns == [documents]
    assert [reject.line for reject in parsed.rejects] == bad
    assert (parsed.lines, parsed.blank) == (len(lines), blank)


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_reasons(line, reason):
    parsed = JsonLines(("text",)).parse(memoryview(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n'))
    assert parsed.columns == [[b"before", b"after"]]
    (reject,) = parsed.rejects
    assert reject.line == 1
    assert reason in reject.reason
    assert reject.excerpt


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(GOOD * 3 + [line for line, _ in BAD_LINES]), min_size=1, max_size=8))
def test_lines_that_are_mostly_something_else(lines):
    """After a batch with little text in it, the next is parsed without decoding what is not text."""
    parser = JsonLines(("text",))
    parser.parse(memoryview(b'{"text": "a", "long": "' + b"x" * 99 + b'"}\n'))
    assert not parser._mostly_text
    parsed = parser.parse(memoryview(b"\n".join(lines) + b"\n"))
    documents, bad, _ = expected(lines)
    assert parsed.columns == [documents]
    assert [reject.line for reject in parsed.rejects] == bad


def test_two_objects_on_a_line_and_one_on_two_do_not_cancel_out():
    batch = b'{"text": "a"}{"text": "b"}\n{"text":\n"c"}\n'
    parsed = JsonLines(("text",)).parse(memoryview(batch))
    assert parsed.columns == [[]]
    assert [reject.line for reject in parsed.rejects] == [0, 1, 2]


def test_an_object_that_ends_at_a_nested_brace_before_the_newline():
    batch = b'{"text": "a"}{"text": "b"}\n{"text": "c", "x": {}\n}\n'
    parsed = JsonLines(("text",)).parse(memoryview(batch))
    assert parsed.columns == [[]]
    assert len(parsed.rejects) == 3


def test_clean_lines_take_the_fast_way(monkeypatch):
    parser = JsonLines(("text", "title"))
    monkeypatch.setattr(parser, "_parse_lines", None)
    for ending in (b"\n", b"\r\n"):
        batch = ending.join([b'{"title": "t", "text": "a", "more": {}}'] * 3) + ending
        assert parser.parse(memoryview(batch)).columns == [[b"a"] * 3, [b"t"] * 3]


def test_a_line_that_lacks_one_of_several_keys_is_rejected_whole():
    parsed = JsonLines(("text", "title")).parse(memoryview(b'{"text": "a"}\n{"text": "b", "title": "c"}\n'))
    assert parsed.columns == [[b"b"], [b"c"]]
    assert parsed.rejects[0].reason == "no key 'title'"


def test_the_last_line_may_lack_its_newline():
    assert JsonLines(("text",)).parse(memoryview(b'{"text": "a"}\n{"text": "b"}')).columns == [[b"a", b"b"]]


def test_nesting_too_deep_is_a_reject_not_a_crash():
    line = b'{"text": "a", "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    (reject,) = JsonLines(("text",)).parse(memoryview(line + b"\n")).rejects
    assert "deep" in reject.reason
    assert len(reject.excerpt) < 200


def test_text_lines():
    parsed = TextLines().parse(memoryview(b"one\r\n\n  \n two \nb\xffd\nthree"))
    assert parsed.columns == [[b"one", b" two ", b"three"]]
    assert (parsed.lines, parsed.blank) == (6, 2)
    assert [(reject.line, reject.reason) for reject in parsed.rejects] == [(4, "invalid UTF-8 at byte 1")]


def test_paragraphs():
    parsed = Paragraphs().parse(memoryview(b"\n \n one\ntwo\n\t\n\nthree\r\n\r\nb\xff\n\nfour\n"))
    assert parsed.columns == [[b" one\ntwo", b"three", b"four"]]
    assert Paragraphs().parse(memoryview(b"  \none\n\n")).columns == [[b"one"]]
    assert [(reject.line, reject.reason) for reject in parsed.rejects] == [(8, "invalid UTF-8 at byte 1")]


def test_a_whole_text_is_kept_as_it_is():
    assert WholeText().parse(memoryview(b" a\n\n")).columns == [[b" a\n\n"]]
    assert WholeText().parse(memoryview(b"a\xff")).rejects[0].reason == "invalid UTF-8 at byte 1"
