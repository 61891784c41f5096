"""Names from templates, as Lightning and NeMo write them."""

from __future__ import annotations

import math

import pytest

from megalith.checkpoint.naming import Template

NEMO = Template("megatron_gpt--{val_loss:.2f}-{step}-{consumed_samples}")


def test_nemos_template():
    name = NEMO.name({"val_loss": 3.2149, "step": 1000, "consumed_samples": 8000.0})
    assert name == "megatron_gpt--val_loss=3.21-step=1000-consumed_samples=8000.0"
    assert NEMO.metrics == ("val_loss", "step", "consumed_samples")


@pytest.mark.parametrize(
    ("template", "values", "lightning"),
    [
        ("{epoch}-{step}", {"epoch": 2, "step": 30}, "epoch=2-step=30"),
        ("x--{loss:.4f}-{epoch:02d}", {"loss": 0.35123, "epoch": 3}, "x--loss=0.3512-epoch=03"),
        ("plain", {}, "plain"),
        ("{a}-{ab}-{abc:.1f}", {"a": 1, "ab": 2.5, "abc": 3.14}, "a=1-ab=2.5-abc=3.1"),
    ],
)
def test_names_equal_what_lightning_2_6_makes_of_them(template, values, lightning):
    assert Template(template).name(values) == lightning


def test_an_unknown_metric_is_not_a_number():
    assert NEMO.name({"step": 5}) == "megatron_gpt--val_loss=nan-step=5-consumed_samples=nan"
    assert NEMO.name({"val_loss": math.inf, "step": 5}).startswith("megatron_gpt--val_loss=inf")


def test_a_metric_with_a_slash_makes_no_folder():
    template = Template("x-{val/loss:.1f}")
    assert template.name({"val/loss": 2.0}) == "x-val_loss=2.0"
    assert template.matches("x-val_loss=2.0-last")


def test_its_own_names_are_known_again():
    for tail in ("", "-last", "-v1", "-v12-last"):
        assert NEMO.matches("megatron_gpt--val_loss=3.21-step=1000-consumed_samples=8000.0" + tail)
    for name in (
        "best",
        "step_0000001",
        "megatron_gpt--val_loss=3.21",
        "megatron_gpt--val_loss=3.21-step=1-consumed_samples=8-x",
    ):
        assert not NEMO.matches(name)
    assert Template("a.b{x}").matches("a.bx=1e-05")
    assert not Template("a.b{x}").matches("aXbx=1")


@pytest.mark.parametrize(
    "text", ["", "a/b{step}", ".hidden", "{}", "{step", "step}", "{step:.2q}", "{step!r}", "a\0"]
)
def test_a_template_that_cannot_work_is_refused_when_it_is_made(text):
    with pytest.raises(ValueError, match=r".+"):
        Template(text)
