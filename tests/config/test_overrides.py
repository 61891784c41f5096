"""The command line: Hydra's grammar, and what becomes of arguments that it cannot read."""

from __future__ import annotations

import math

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.config.overrides import parse_overrides


def one(text: str):
    found, problems = parse_overrides([text])
    assert not problems, problems
    return found[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.b=c", "c"),
        ("a=1", 1),
        ("a=-1", -1),
        ("a=1e-4", 1e-4),
        ("a=true", True),
        ("a=null", None),
        ("a=", ""),
        ("a=[1,2]", [1, 2]),
        ("a=[0.3, /x/y, 0.7, /z]", [0.3, "/x/y", 0.7, "/z"]),
        ("a=[[0.5,x],[0.5,y]]", [[0.5, "x"], [0.5, "y"]]),
        ("a={b:1,c:[x y]}", {"b": 1, "c": ["x y"]}),
        ("a='900,50,50'", "900,50,50"),
        ('a="x,y"', "x,y"),
        ("a='1'", "1"),
        ("a=['a=b',c]", ["a=b", "c"]),
        ("a={b:'d e'}", {"b": "d e"}),
        ("a=hello world", "hello world"),
        ("a=${.x}", "${.x}"),
        ("a=???", "???"),
        ("+a=1", 1),
        ("++a=1", 1),
    ],
)
def test_values_are_hydras(text, value):
    assert one(text).value == value
    assert type(one(text).value) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=/data/lr=1e-4/step=3", "/data/lr=1e-4/step=3"),
        ("a=http://host:9/x?y=z", "http://host:9/x?y=z"),
        ("a=megatron--{val_loss:.2f}-{step}", "megatron--{val_loss:.2f}-{step}"),
        ("a=900,50,50", "900,50,50"),
        ("a=[1,2", "[1,2"),
        ("a=it's", "it's"),
        ("a=`x`", "`x`"),
        ("a={b:1", "{b:1"),
    ],
)
def test_what_the_grammar_cannot_read_or_takes_for_a_sweep_is_text(text, value):
    assert one(text).value == value


def test_deletions():
    assert one("~a.b").delete
    assert one("~a.b").path == ("a", "b")
    assert one("~a=3").only_if
    assert one("~a=3").value == 3


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "does nothing"),
        ("   ", "does nothing"),
        ("a", "is not key=value"),
        ("=3", "has no key"),
        ("+=3", "has no key"),
        ("a b=3", "has a space in its key"),
        ("a[0]=3", "sets an item of a list"),
        ("a..b=3", "is not a dotted key"),
        (".a=3", "is not a dotted key"),
        ("a.=3", "is not a dotted key"),
        ("model@pkg=x", "packages and config groups"),
        ("a/b=c", "packages and config groups"),
        ("a=range(1,3)", "is a sweep"),
        ("a=choice(1,2)", "is a sweep"),
        ("a=" + "[" * 5000, ""),
        ("--flag", "is not a dotted key"),
    ],
)
def test_what_is_no_override_is_a_problem_that_shows_it(text, what):
    found, problems = parse_overrides([text])
    if not what:
        assert len(found) + len(problems) == 1
        return
    assert not found
    assert what in problems[0].what
    assert text.strip() in problems[0].where


def test_all_problems_come_at_once():
    found, problems = parse_overrides(["a=1", "b", "", "c=2", "=4"])
    assert [o.path for o in found] == [("a",), ("c",)]
    assert len(problems) == 3


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30))
def test_any_text_is_an_override_or_a_problem(text):
    found, problems = parse_overrides([text])
    assert len(found) + len(problems) == 1


@settings(max_examples=60, deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers(-999, 999) | st.floats(-9, 9) | st.from_regex(r"[a-z]{1,5}", fullmatch=True),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"[a-z]{1,4}", fullmatch=True), inner, max_size=3),
))  # fmt: skip
def test_values_written_in_the_grammar_are_read_as_hydra_reads_them(value):
    def written(v):
        if isinstance(v, bool) or v is None:
            return {True: "true", False: "false", None: "null"}[v]
        if isinstance(v, list):
            return "[" + ",".join(map(written, v)) + "]"
        if isinstance(v, dict):
            return "{" + ",".join(f"{k}:{written(x)}" for k, x in v.items()) + "}"
        return repr(v) if isinstance(v, int | float) else v

    text = f"key={written(value)}"
    expected = OverridesParser.create().parse_override(text).value()
    ours = one(text).value
    assert ours == expected or (isinstance(ours, float) and math.isnan(ours))
