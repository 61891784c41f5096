"""YAML files: values, lines, defaults lists, and everything that a file can be instead of a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalith.config import sources
from megalith.errors import ConfigError


def write(folder: Path, name: str, text: str | bytes) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def refused(file: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        sources.read(file)
    return " | ".join(str(p) for p in caught.value.problems)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2E5", 2e5),
        (".5", 0.5),
        ("1.", 1.0),
        ("-3", -3),
        ("1_000", 1000),
        ("007", "007"),
        ("0", 0),
        ("12:30:00", "12:30:00"),
        ("00:12:00:00", "00:12:00:00"),
        ("2024-01-31", "2024-01-31"),
        ("900,50,50", "900,50,50"),
        ("yes", True),
        ("Off", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ("None", "None"),
        ("[a, 0.5, null]", ["a", 0.5, None]),
        ("{}", {}),
        ("${.x}", "${.x}"),
        ("1.2.3", "1.2.3"),
        ("1e5x", "1e5x"),
    ],
)
def test_values_are_read_as_omegaconf_reads_them(tmp_path, text, value):
    (layer,) = sources.read(write(tmp_path, "a.yaml", f"key: {text}"))
    assert layer.values[0].value == value
    assert type(layer.values[0].value) is type(value)


def test_each_value_knows_its_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (layer,) = sources.read(
        write(tmp_path, "sub/a.yaml", "# head\na:\n  b: 1\n\n  c: [1,\n     2]\nd: {e: 5}\n")
    )
    assert [(".".join(v.path), v.origin) for v in layer.values] == [
        ("a.b", "sub/a.yaml:3"),
        ("a.c", "sub/a.yaml:5"),
        ("d.e", "sub/a.yaml:7"),
    ]


def test_anchors_and_merges_work_and_circles_do_not(tmp_path):
    (layer,) = sources.read(write(tmp_path, "a.yaml", "base: &b {x: 1, y: 2}\nmine:\n  <<: *b\n  y: 3\n"))
    assert {".".join(v.path): v.value for v in layer.values} == {
        "base.x": 1, "base.y": 2, "mine.x": 1, "mine.y": 3,
    }  # fmt: skip
    assert "refers to itself" in refused(write(tmp_path, "b.yaml", "a: &a\n  b: *a\n"))
    assert "refers to itself" in refused(write(tmp_path, "c.yaml", "a: &a [1, *a]\n"))


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        (b"a: 1\nb: [1,\nc: 2\n", ":4", "in what begins on line 2"),
        (b"a: 1\n\tb: 2\n", ":2", "not valid YAML"),
        (b"a: 'open\n", "", "not valid YAML"),
        (b"a: *nowhere\n", ":1", "undefined alias"),
        (b"- a\n- b\n", ":1", "holds a list"),
        (b"just words\n", ":1", "holds a single value"),
        (b"a: 1\nb: \xff\xfe\n", ":2", "is not UTF-8"),
        ("a: ä".encode("utf-16"), ":1", "is not UTF-8"),
        (
            b"a: !!python/object/apply:os.system ['true']\n",
            ":1",
            "!!python/object/apply:os.system is not allowed",
        ),
        (b"a: !Thing {}\n", ":1", ""),
        (b"? [a, b]\n: 1\n", ":1", "a key must be a name"),
        (b"a: 1\n---\nb: 2\n", ":2", "not valid YAML"),
        (b"a: \x00\n", "", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_clear_problem_with_its_line(tmp_path, content, line, what):
    said = refused(write(tmp_path, "a.yaml", content))
    assert f"a.yaml{line}" in said
    assert what in said
    assert "Traceback" not in said
    assert "\n  in " not in said


def test_tags_execute_nothing(tmp_path):
    target = tmp_path / "proof"
    refused(write(tmp_path, "a.yaml", f"a: !!python/object/apply:pathlib.Path.touch [{target}]\n"))
    assert not target.exists()


def test_a_tag_on_a_group_is_refused_too(tmp_path):
    assert "not allowed" in refused(write(tmp_path, "a.yaml", "a: !Thing {b: 1}\n"))
    assert "not allowed" in refused(write(tmp_path, "b.yaml", "a: !Thing [1]\n"))


def test_every_duplicate_is_named_with_both_lines(tmp_path):
    said = refused(write(tmp_path, "a.yaml", "a: 1\nm:\n  x: 1\n  y: 2\n  x: 3\na: 2\n"))
    assert "a.yaml:6: a is written twice (first on line 1)" in said
    assert "a.yaml:5: m.x is written twice (first on line 3)" in said


def test_empty_files_say_nothing(tmp_path):
    for i, text in enumerate(("", "# only words\n", "\ufeff", "---\n")):
        (layer,) = sources.read(write(tmp_path, f"{i}.yaml", text))
        assert layer.values == ()


def values(layers):
    merged = {}
    for layer in layers:
        merged.update({".".join(v.path): v.value for v in layer.values})
    return merged


def test_defaults_come_beneath_the_file_itself(tmp_path):
    write(tmp_path, "base.yaml", "a: 1\nb: 1\n")
    write(tmp_path, "size/small.yaml", "width: 8\n")
    write(tmp_path, "size/large.yaml", "width: 80\n")
    file = write(tmp_path, "top.yaml", "defaults:\n- base\n- size: small\nb: 2\n")
    assert values(sources.read(file)) == {"a": 1, "b": 2, "size.width": 8}
    assert values(sources.read(file, {"size": "large"}))["size.width"] == 80
    assert sources.groups(file) == ["size"]


def test_self_says_where_the_file_itself_stands(tmp_path):
    write(tmp_path, "base.yaml", "b: 1\n")
    file = write(tmp_path, "top.yaml", "defaults: [_self_, base]\nb: 2\n")
    assert values(sources.read(file))["b"] == 1


def test_packages_place_a_group_elsewhere(tmp_path):
    write(tmp_path, "size/small.yaml", "width: 8\n")
    write(tmp_path, "size/everywhere.yaml", "# @package _global_\nmodel:\n  width: 9\n")
    by_entry = write(tmp_path, "a.yaml", "defaults:\n- size@model.shape: small\n")
    by_header = write(tmp_path, "b.yaml", "defaults:\n- size: everywhere\n")
    assert values(sources.read(by_entry)) == {"model.shape.width": 8}
    assert values(sources.read(by_header)) == {"model.width": 9}


def test_packaged_files_can_be_built_on(tmp_path):
    file = write(tmp_path, "mine.yaml", "defaults: [megatron_gpt_config]\nname: mine\n")
    found = values(sources.read(file))
    assert found["name"] == "mine"
    assert found["model.num_layers"] == 12


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("defaults: 3\n", "defaults must be a list"),
        ("defaults: [{a: b, c: d}]\n", "holds names and group"),
        ("defaults: [bass]\n", "did you mean base?"),
        ("defaults: [{size: smalll}]\n", "did you mean small?"),
        ("defaults: [top]\n", "comes back to itself: top.yaml → top.yaml"),
        ("defaults: [{size: '${x}'}]\n", "interpolation in a defaults list"),
    ],
)
def test_defaults_lists_that_lead_nowhere(tmp_path, text, what):
    write(tmp_path, "base.yaml", "b: 1\n")
    write(tmp_path, "size/small.yaml", "width: 8\n")
    said = refused(write(tmp_path, "top.yaml", text))
    assert what in said
    assert "top.yaml" in said


def test_optional_null_and_hydra_entries_are_skipped(tmp_path):
    text = "defaults:\n- optional size: none\n- other: null\n- override hydra/launcher: x\na: 1\n"
    assert values(sources.read(write(tmp_path, "top.yaml", text))) == {"a": 1}


def test_locating_files(tmp_path):
    file = write(tmp_path, "mine.yaml", "a: 1")
    assert sources.locate(None, None, file) == file
    assert sources.locate("mine", tmp_path, None) == file
    assert sources.locate("mine.yaml", tmp_path, None) == file
    assert sources.locate(None, None, None).name == "megatron_gpt_config.yaml"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((None, None, "mien.yaml"), "did you mean"),
        ((None, None, "."), "is a folder"),
        (("megatron_gtp_config", None, None), "did you mean megatron_gpt_config?"),
        (("mine.yaml", None, None), "use --config mine.yaml"),
        (("a", "nowhere", None), "is not a folder"),
        (("a", None, "mine.yaml"), "cannot be given together"),
    ],
)
def test_locating_what_is_not_there(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "mine.yaml", "a: 1")
    with pytest.raises(ConfigError) as caught:
        sources.locate(*arguments)
    assert said in str(caught.value)


def test_unreadable_files_are_a_problem_not_a_traceback(tmp_path, monkeypatch):
    file = write(tmp_path, "a.yaml", "a: 1")
    monkeypatch.setattr(
        Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    with pytest.raises(ConfigError, match="Permission denied"):
        sources.load_yaml(file)
