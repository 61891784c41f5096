"""Composing: precedence, origins, foreign keys, presets, deletions, references, YAML out and in again."""

from __future__ import annotations

import pytest

from megalith.config.compose import check, compose, to_yaml
from megalith.errors import ConfigError
from tests.config.conftest import BASE
from tests.config.sections import Root


def test_defaults_file_and_command_line_win_in_that_order(composed):
    result = composed("model.heads=8", "model.heads=4")
    assert result.config.model.width == 768
    assert result.config.trainer.max_steps == 1000
    assert result.config.model.heads == 4
    assert result.config.model.rate == 0.1


def test_every_value_knows_where_it_came_from(composed):
    origin = composed("model.heads=8").origin
    assert origin["model.heads"] == "command line"
    assert origin["model.width"].endswith("toy.yaml:5")
    assert origin["trainer.max_steps"].endswith("toy.yaml:3")
    assert origin["model.rate"] == "default"
    assert "model" not in origin
    assert "model.scaling.factor" not in origin


def test_plus_on_a_known_key_is_set(composed):
    assert composed("+model.heads=8").config.model.heads == 8
    assert composed("++model.heads=8").config.model.heads == 8


def test_groups_on_the_command_line_are_merged(composed):
    result = composed("model.optim={lr: 0.5}", "model.optim={betas: [0.1, 0.2]}", "model.optim={}")
    assert result.config.model.optim.lr == 0.5
    assert result.config.model.optim.betas == (0.1, 0.2)


def test_lists_are_replaced_whole(composed):
    assert composed("model.data.prefix=[b]").config.model.data.prefix == ["b"]


def test_free_mappings_take_any_key_and_are_merged(composed):
    text = BASE + "  free: {a: 1, b: {c: 2}}\n"
    assert composed("model.free.b.d=3", text=text).config.model.free == {"a": 1, "b": {"c": 2, "d": 3}}


def test_an_optional_section_can_be_given(composed):
    assert composed().config.model.scaling is None
    assert composed("model.scaling.factor=2").config.model.scaling.factor == 2.0
    assert composed("model.scaling=null").config.model.scaling is None


def test_deleting_goes_back_to_the_default(composed):
    assert composed("~trainer.max_steps").config.trainer.max_steps == 100
    assert composed("~trainer").config.trainer.max_steps == 100
    assert composed("trainer.max_steps=5", "~trainer.max_steps").config.trainer.max_steps == 100
    assert composed("~trainer.max_steps", "trainer.max_steps=5").config.trainer.max_steps == 5
    assert composed("~model.width=768", "model.heads=1").config.model.width == 768
    assert composed("~model.rate").config.model.rate == 0.1


def test_deleting_what_is_not_there_or_not_so(problems):
    found = problems("~model.widtth", "~model.width=5", "~nothing.at.all")
    assert found['"~model.widtth" on the command line'][1] == "did you mean ~model.width?"
    assert "it is 768" in found['"~model.width=5" on the command line'][0]
    assert "there is no key nothing.at.all" in found['"~nothing.at.all" on the command line'][0]


def test_null_for_a_section_that_has_a_meaning_for_it(composed):
    assert composed("logs=null").config.logs.on is False
    assert composed("logs=null", "logs.on=true").config.logs.on is True


def test_none_is_read_as_null_where_null_is_possible(composed):
    result = composed("logs.name=None", "name=None")
    assert result.config.logs.name is None
    assert result.config.name == "None"
    assert result.notices == ["logs.name: None is read as null"]


# ---- foreign keys ----


def test_renamed_keys_are_read_with_one_notice(composed):
    result = composed("trainer.gpus=1", "trainer.gpus=2", "model.learning_rate=0.5")
    assert result.config.trainer.devices == 2
    assert result.config.model.optim.lr == 0.5
    assert result.notices == [
        "trainer.gpus is called trainer.devices here",
        "model.learning_rate is called model.optim.lr here",
    ]
    assert result.origin["trainer.devices"] == "command line"


def test_a_renamed_key_wins_over_an_earlier_file(composed):
    assert composed("trainer.gpus=2", text=BASE + "").config.trainer.devices == 2
    assert (
        composed(
            "trainer.gpus=2", text="trainer: {devices: 4}\nmodel: {data: {prefix: [a]}}"
        ).config.trainer.devices
        == 2
    )


def test_both_names_in_one_place_must_agree(composed, problems):
    text = "trainer: {devices: 4, gpus: 4}\nmodel: {data: {prefix: [a]}}"
    assert composed(text=text).config.trainer.devices == 4
    found = problems(text=text.replace("gpus: 4", "gpus: 2"))
    assert "they differ: 2 and 4" in found["trainer.gpus"][0]


def test_dead_keys_have_no_effect_and_one_notice(composed):
    text = BASE + "  dead: {a: 1, b: 2}\n  quiet: 1\nhydra:\n  run: {dir: .}\n  job: x\n"
    result = composed("model.dead=3", text=text)
    assert result.notices == [
        "model.dead has no effect: nothing reads it",
        "hydra has no effect: there is no Hydra",
    ]


def test_harmful_keys_are_refused_unless_they_ask_for_nothing(composed, problems):
    assert composed("model.harmful=false").notices == []
    assert composed("model.harmful=0")
    assert composed("model.harmful=null")
    what, fix = problems("model.harmful=true")["model.harmful"]
    assert what == "refused: it would do something else"
    assert fix == "remove it: ~model.harmful"
    assert "model.harmful" in problems("model.harmful={a:1}")


def test_translated_keys(composed, problems):
    assert composed("model.mode=2", "model.heads=1").config.model.width == 200
    assert problems("model.mode=7")["model.mode"][0] == "there is no mode 7"
    assert "write the value out" in problems("model.mode=${.width}")["model.mode"][1]


def test_weak_keys_give_way(composed):
    assert composed("model.hint=24").config.model.width == 24
    assert composed("model.hint=24", "model.width=36").config.model.width == 36


# ---- presets ----


def test_a_preset_stands_where_it_is_written(composed):
    assert composed("model.preset=big").config.model.width == 1200
    assert composed("model.preset=big", "model.width=60").config.model.width == 60
    assert composed("model.width=60", "model.preset=big").config.model.width == 60
    in_file = BASE.replace("  width: 768", "  preset: big\n  heads: 10")
    assert composed(text=in_file).config.model.heads == 10
    assert composed(text=in_file).config.model.width == 1200
    assert composed("~model.preset", "model.width=10", text=in_file).config.model.heads == 10
    assert composed("~model.preset", "~model.heads", text=in_file).config.model.width == 768


def test_a_presets_values_say_so(composed):
    result = composed("model.preset=big", "model.heads=1")
    assert result.origin["model.width"] == "model.preset=big"
    assert result.origin["model.heads"] == "command line"


# ---- references ----


def test_references_see_defaults_files_and_the_command_line(composed):
    assert composed("model.data.length=${model.width}").config.model.data.length == 768
    assert composed("model.data.length=${model.heads}").config.model.data.length == 12
    assert composed("model.heads=${..trainer.max_steps}", "model.width=1000").config.model.heads == 1000
    assert composed("model.data.length=${multiply:${model.heads}, 3}").config.model.data.length == 36
    assert composed("model.data.prefix=[x,'${name}']").config.model.data.prefix == ["x", "toy"]
    assert composed("logs.name=run-${trainer.max_steps}").config.logs.name == "run-1000.0"
    assert composed("logs.name='\\${not}'").config.logs.name == "${not}"


def test_references_to_foreign_keys_still_work(composed):
    assert composed("trainer.gpus=3", "logs.name=${trainer.gpus}").config.logs.name == "3"


def test_a_renamed_key_may_be_a_reference(composed):
    assert composed("trainer.gpus=${model.heads}").config.trainer.devices == 12


def test_references_to_the_environment(composed, monkeypatch):
    monkeypatch.setenv("TOY_NAME", "x7")
    assert composed("name=${oc.env:TOY_NAME}").config.name == "x7"


# ---- values ----


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("model.width='24'", 24),
        ("model.width=24.0", 24),
        ("model.width=2_400", 2400),
        ("model.rate=0", 0.0),
        ("model.rate='0.5'", 0.5),
        ("model.flag=true", True),
        ("model.flag='yes'", True),
        ("model.flag=1", True),
        ("name=345", "345"),
        ("name=1.5", "1.5"),
        ("name=''", ""),
    ],
)
def test_numbers_as_text_and_text_as_numbers(composed, override, value):
    key = override.split("=")[0].split(".")
    found = composed(override, "model.heads=1").config
    for part in key:
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_the_configuration_is_frozen(composed):
    with pytest.raises(Exception, match="frozen"):
        composed().config.model.width = 3


# ---- YAML ----


NASTY = [
    "1e-05",
    "1e5",
    "yes",
    "null",
    "007",
    "12:30:00",
    "${x}",
    "a: b",
    "# x",
    " x ",
    "é",
    "- a",
    "{",
    "'",
    '"',
    "1_0",
    "2024-01-01",
    "",
]


def test_the_printed_configuration_composes_to_itself(composed, tmp_path):
    first = composed("model.preset=big", "model.optim.lr=1e-5", "logs.name='${x}'".replace("$", "\\$"))
    file = tmp_path / "printed.yaml"
    file.write_text(first.yaml(), encoding="utf-8")
    again = compose(Root, config_file=file)
    assert again.config == first.config
    assert again.yaml() == first.yaml()


@pytest.mark.parametrize("text", NASTY)
def test_any_text_survives_yaml(tmp_path, text):
    file = tmp_path / "a.yaml"
    file.write_text(
        to_yaml({"name": text, "model": {"data": {"prefix": [text, 1e-5, 1.0]}}}), encoding="utf-8"
    )
    config = compose(Root, config_file=file).config
    assert config.name == text
    assert config.model.data.prefix == [text, 1e-5, 1.0]


def test_plain_values_can_be_checked_without_a_file():
    assert check(Root, {"model": {"data": {"prefix": ["a"]}}}).model.width == 768
    with pytest.raises(ConfigError) as refused:
        check(Root, {"model": {"widtth": 3}}, name="config.yaml of step 3")
    assert "model.widtth (config.yaml of step 3)" in str(refused.value)


def test_config_path_and_name(tmp_path):
    (tmp_path / "mine.yaml").write_text(BASE, encoding="utf-8")
    assert compose(Root, config_path=tmp_path, config_name="mine").config.model.width == 768


def test_a_group_of_the_defaults_list_is_chosen_on_the_command_line(tmp_path):
    (tmp_path / "size").mkdir()
    for name, width in (("s", 12), ("l", 1200)):
        (tmp_path / "size" / f"{name}.yaml").write_text(
            f"# @package model\nwidth: {width}\n", encoding="utf-8"
        )
    file = tmp_path / "top.yaml"
    file.write_text("defaults: [{size: s}]\n" + BASE.replace("  width: 768\n", ""), encoding="utf-8")
    assert compose(Root, config_file=file).config.model.width == 12
    assert compose(Root, config_file=file, overrides=["size=l"]).config.model.width == 1200
