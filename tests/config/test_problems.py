"""What is wrong with a configuration: every problem at once, in plain words, with what to do."""

from __future__ import annotations

import re

import pytest

from megalith.config.compose import gather, preview
from tests.config.conftest import BASE
from tests.config.sections import Root

JARGON = re.compile(
    r"pydantic|validat|Input should|type=|extra_forbidden|ValueError|NoneType|\bint\b|\bstr\b|omegaconf", re.I
)


def test_unknown_keys_name_the_nearest(problems):
    found = problems(
        "model.widtth=3", "width=3", "lr=3", "model.max_steps=3", "modal.width=3", "model.optm.lr=3", "trainer.device=1",
        "model.data.Prefix=[a]", "model.gpu=1",
    )  # fmt: skip
    assert {key: fix for key, (_, fix) in found.items()} == {
        "model.widtth": "did you mean model.width?",
        "width": "did you mean model.width?",
        "lr": "did you mean model.optim.lr?",
        "model.max_steps": "did you mean trainer.max_steps?",
        "modal.width": "did you mean model.width?",
        "model.optm.lr": "did you mean model.optim.lr?",
        "trainer.device": "did you mean trainer.devices?",
        "model.data.Prefix": "did you mean model.data.prefix?",
        "model.gpu": found["model.gpu"][1],
    }
    assert found["modal.width"][0] == "is not a section"
    assert found["width"][0] == "is not a key"


def test_an_unknown_section_is_reported_once(problems):
    found = problems(text=BASE + "modal:\n  a: 1\n  b: {c: 2, d: 3}\nfoo: {a: 1, b: 2}\n")
    assert set(found) == {"modal", "foo"}
    assert found["modal"] == ("is not a section", "did you mean model?")
    assert found["foo"][1].startswith("`megalith explain` lists the keys")


def test_a_deep_unknown_path_is_shown_whole(problems):
    assert set(problems("a.b.c.d.e=1")) == {"a.b.c.d.e"}


def test_dotted_names_in_yaml_say_to_nest(problems):
    assert "nested" in problems(text=BASE + "model.width: 3\n")["model.width"][1]


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("model.width=wide", 'expected a whole number above 0 and of at most 100000, got the text "wide"'),
        ("model.width=2.5", "expected a whole number above 0 and of at most 100000, got 2.5"),
        ("model.width=true", "expected a whole number above 0 and of at most 100000, got true"),
        ("model.width=null", "expected a whole number above 0 and of at most 100000, got null"),
        ("model.width=0", "expected a whole number above 0 and of at most 100000, got 0"),
        ("model.width=[1]", "expected a whole number above 0 and of at most 100000, got the list [1]"),
        (
            "model.width={a:1}",
            "expected a whole number above 0 and of at most 100000, got a group of keys (a)",
        ),
        ("model.width=", "expected a whole number above 0 and of at most 100000, got an empty text"),
        ("model.rate=1", "expected a number of at least 0 and below 1, got 1"),
        ("model.rate=nan", "expected a number of at least 0 and below 1, got nan"),
        ("model.optim.lr=inf", "expected a number above 0, got inf"),
        ("model.flag=perhaps", 'expected true or false, got the text "perhaps"'),
        ("model.flag=2", "expected true or false, got 2"),
        ("model.kind=gelo", 'expected one of gelu, swiglu or null, got the text "gelo"'),
        ("model.data.prefix=a", 'expected a list of texts or numbers, got the text "a"'),
        ("model.data.prefix=[{a:1}]", "expected a list of texts or numbers, got the list [{a: 1}]"),
        ("model.optim.betas=[0.9]", "expected a list of 2 numbers, got the list [0.9]"),
        ("model.optim.betas=[0.9,x]", "expected a list of 2 numbers, got the list [0.9, x]"),
        ("model.optim.sched.warmup_steps=-1", "expected a whole number of at least 0, or null, got -1"),
        ("name=[a]", "expected text, got the list [a]"),
        ("name=true", "expected text, got true"),
        ("trainer.devices=[1]", "expected a whole number or text, got the list [1]"),
        ("model.width=" + "9" * 60, "expected a whole number above 0 and of at most 100000, got " + "9" * 60),
        ("model.preset=small", "there is no preset small"),
        ("model.scaling=3", "is a section (a group of keys), not 3"),
        ("model.scaling.factor=0.5", "expected a number of at least 1, got 0.5"),
    ],
)
def test_wrong_values_in_plain_words(problems, override, what):
    found = problems(override)
    assert next(iter(found.values()))[0] == what
    assert len(found) == 1


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("model.kind=gelo", "did you mean model.kind=gelu?"),
        ("model.optim.sched.name=cosine", "did you mean model.optim.sched.name=Cosine?"),
        ("model.optim.betas=0.9,0.98", "a list is written model.optim.betas=[0.9,0.98]"),
        (
            "model.data.prefix=[/a=b,c]",
            "quote items that hold = or other signs: \"model.data.prefix=['a=b',c]\"",
        ),
        ("model.width='1,000'", "write the number out, without commas and letters"),
        ("model.width=4k", "write the number out, without commas and letters"),
        ("model.preset=small", "big"),
    ],
)
def test_what_to_do_about_a_wrong_value(problems, override, fix):
    assert next(iter(problems(override).values()))[1] == fix


def test_sections_and_values_are_told_apart(problems):
    found = problems("model=3", "trainer=null", "model.optim=[1]", "logs=yes")
    assert {what for what, _ in found.values()} == {
        "is a section (a group of keys), not 3",
        "is a section (a group of keys), not null",
        "is a section (a group of keys), not the list [1]",
        'is a section (a group of keys), not the text "yes"',
    }
    assert found["model"][1] == "model.KEY=VALUE sets a key in it; ~model goes back to its defaults"


def test_an_empty_section_in_yaml_is_a_null(problems):
    assert "not null" in problems(text=BASE + "  optim:\n")["model.optim"][0]


@pytest.mark.parametrize("text", ["{}", "model: {}", "model: {data: {}}", "name: x", "# nothing"])
def test_mandatory_keys_are_missed_wherever_the_file_ends(problems, text):
    assert problems(text=text) == {
        "model.data.prefix": (
            "has no value, and it must have one (Token files)",
            "model.data.prefix=[…] on the command line, or in a YAML file",
        )
    }


def test_mandatory_marks_and_deleted_mandatory_keys(problems):
    assert "has no value yet" in problems("model.data.prefix=???")["model.data.prefix"][0]
    assert "has no value yet" in problems("model.heads=???")["model.heads"][0]
    assert "must have one" in problems("~model.data.prefix")["model.data.prefix"][0]
    assert "must have one" in problems("~model.data")["model.data.prefix"][0]


def test_combinations_are_reported_with_their_fix_and_origin(problems, composed):
    assert problems("model.heads=7")["model.width"] == ("768 does not divide into 7 heads", "model.heads=1")
    assert composed("model.optim.lr=2").notices == ["model.optim.lr: 2 is large (a thousandth)"]


def test_combinations_across_sections(problems):
    assert "trainer.max_steps" in problems("model.data.length=99999")


def test_combinations_are_found_beside_wrong_values_elsewhere(problems):
    found = problems(
        "model.heads=7", "name=[1]", "modal.x=3", "model.data.length=99999", "~model.data.prefix"
    )
    assert set(found) == {"model.width", "name", "modal.x", "trainer.max_steps", "model.data.prefix"}


def test_combinations_of_wrong_values_are_not_guessed(problems):
    assert set(problems("model.heads=seven", "model.width=100")) == {"model.heads"}
    assert set(problems("model.width=wide", "model.heads=7")) == {"model.width"}


@pytest.mark.parametrize(
    ("value", "what", "fix"),
    [
        ("${model.widtth}", "refers to model.widtth, which does not exist", "did you mean ${model.width}?"),
        ("${.nothing}", "which does not exist", "references are full paths, or start with a dot"),
        ("${name}", "refers to itself in a circle", "write one of the values out"),
        ("${model.data.nope.deep}", "does not exist", ""),
        ("${nosuch:3}", "uses nosuch, which is not known", "write it out"),
        ("${multiply:a,3}", "multiply takes numbers", "write the value out"),
        ("${multiply:true,3}", "multiply takes numbers", "write the value out"),
        ("${unclosed", "cannot be read", ""),
        ("${}", "cannot be", ""),
        ("${oc.env:TOY_NOT_SET}", "TOY_NOT_SET", "write the value out"),
    ],
)
def test_references_that_lead_nowhere(problems, value, what, fix):
    (key, (said, cure)) = problems(f"name='{value}'").popitem()
    assert key == "name"
    assert what in said
    assert fix in cure
    assert "full_key" not in said


def test_circles_of_several_keys(problems):
    found = problems("name=${logs.name}", "logs.name=${name}")
    assert all("circle" in what for what, _ in found.values())
    assert found


def test_references_to_what_has_no_value(problems):
    found = problems("name=${model.data.prefix}", "~model.data.prefix")
    assert "without a value" in found["name"][0]
    assert "model.data.prefix" in found


def test_thirty_problems_at_once(problems):
    bad = [f"model.unknown_{i}=1" for i in range(10)]
    bad += [f"nowhere_{i}.a=1" for i in range(10)]
    bad += [
        "name=[1]", "model.width=wide", "model.rate=2", "model.flag=3", "model.kind=x", "model.optim.lr=-1",
        "model.optim.betas=[1]", "model.optim.sched.name=x", "trainer.max_steps=0", "logs.on=x", "~gone.key", "nokey",
    ]  # fmt: skip
    found = problems(*bad)
    assert len(found) == 32
    assert not [text for pair in found.values() for text in pair if JARGON.search(text)]


def test_what_was_written_can_be_shown_although_it_is_wrong(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("model: {width: wide}", encoding="utf-8")
    shown = preview(Root, gather(Root, config_file=file, overrides=["model.heads=3"]))
    assert shown["model"]["width"] == "wide"
    assert shown["model"]["heads"] == 3
    assert shown["model"]["rate"] == 0.1
    assert shown["model"]["data"]["prefix"] == "???"
    assert shown["model"]["scaling"] is None
