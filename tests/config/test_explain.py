"""`explain`: a key, a section, a foreign key, a misspelt key, a word."""

from __future__ import annotations

import pytest

from megalith.config.compose import gather
from megalith.config.explain import Explanation, explain
from tests.config.conftest import BASE
from tests.config.sections import Root


@pytest.fixture
def ask(tmp_path):
    def run(question: str, *overrides: str, text: str = BASE) -> Explanation:
        file = tmp_path / "toy.yaml"
        file.write_text(text, encoding="utf-8")
        return explain(Root, question, gather(Root, config_file=file, overrides=overrides))

    return run


def test_a_key_says_everything_about_itself(ask):
    found = ask("model.width", "model.width=24").found
    assert found.meaning == "Width."
    assert found.unit == "channels"
    assert found.type == "a whole number above 0 and of at most 100000"
    assert (found.default, found.value, found.origin) == ("768", "24", "command line")
    assert ask("model.data.prefix").found.examples == ("[a]",)


def test_values_that_are_missing_or_wrong_are_still_explained(ask):
    assert ask("model.data.prefix", text="name: x").found.value == "none: it must be given"
    assert ask("model.width", "model.width=wide").found.value == "wide"


def test_presets_and_references_show_what_they_come_to(ask):
    assert ask("model.width", "model.preset=big").found.origin == "model.preset=big"
    assert ask("model.data.length", "model.data.length=${model.width}").found.value == "768"


def test_a_section_lists_its_keys(ask):
    keys = {name: value for name, value, _ in ask("model").found.keys}
    assert keys["width"] == "768"
    assert keys["optim."] == "…"
    assert [name for name, _, _ in ask("").found.keys] == ["name", "trainer.", "logs.", "model."]


def test_a_last_name_that_exists_once_is_enough(ask):
    assert ask("warmup_steps").found.key == "model.optim.sched.warmup_steps"
    assert ask("name").found.key == "name"


def test_foreign_keys_say_what_becomes_of_them(ask):
    assert ask("trainer.gpus").foreign == "trainer.gpus is called trainer.devices here"
    assert ask("gpus").foreign == "trainer.gpus is called trainer.devices here"
    assert "accepted without effect" in ask("dead").foreign
    assert "refused" in ask("model.harmful").foreign


def test_misspelt_keys_and_words(ask):
    assert ask("model.widtth").nearest == ("model.width",)
    assert [key.key for key in ask("peak").containing] == ["model.optim.lr"]
    nothing = ask("xyzzy")
    assert not nothing.containing
    assert not nothing.nearest
