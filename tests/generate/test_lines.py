"""Files of prompts: every line a prompt, every bad line named, nothing generated before all are checked."""

import io
import json

import pytest

from megalith.errors import DataError
from megalith.generate.lines import check_prompts, open_lines, read_prompts
from tests.generate.tiny import tiny_loaded


def read(tmp_path, data, name="prompts.txt"):
    file = tmp_path / name
    file.write_bytes(data)
    return read_prompts(str(file))


@pytest.mark.parametrize(
    ("data", "prompts"),
    [
        (b"one", ["one"]),
        (b"one\n", ["one"]),
        (b"one\ntwo", ["one", "two"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"\n", [""]),
        (b"one\n\n  two  \n", ["one", "", "  two  "]),
        ("a\u2028b\x0bc\x85d\n".encode(), ["a\u2028b\x0bc\x85d"]),
        (b"\xef\xbb\xbfone\n", ["one"]),
        ("stop\nnaïve\n".encode(), ["stop", "naïve"]),
    ],
)
def test_lines(tmp_path, data, prompts):
    assert read(tmp_path, data) == prompts


@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
def test_json_lines(tmp_path, name):
    data = b'"one\\ntwo"\n{"prompt": "three", "text": "not this"}\n{"text": "four"}'
    assert read(tmp_path, data, name) == ["one\ntwo", "three", "four"]


def test_bad_lines_are_named_together(tmp_path):
    with pytest.raises(DataError) as error:
        read(tmp_path, b'{"prompt": "fine"}\n{"prompt": 3}\nnot json\n[]\n\xff\n', "p.jsonl")
    text = str(error.value)
    assert "4 of 5 lines" in text
    assert [f"line {n}: " in text for n in (1, 2, 3, 4, 5)] == [False, True, True, True, True]
    assert "not UTF-8 (byte 0 of the line)" in text


def test_many_bad_lines_are_counted(tmp_path):
    with pytest.raises(DataError, match="and 5 more"):
        read(tmp_path, b"\xff\n" * 15)


@pytest.mark.parametrize(("data", "what"), [(b"", "holds no line"), (None, "cannot be read")])
def test_no_prompts(tmp_path, data, what):
    with pytest.raises(DataError, match=what):
        read_prompts(str(tmp_path / "absent")) if data is None else read(tmp_path, data)


def test_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo")))
    assert read_prompts("-") == ["one", "two"]


def test_lines_without_room_are_named(tmp_path):
    loaded = tiny_loaded(tmp_path, positions=12)
    check_prompts(loaded, ["short", "", "b" * 11], "p.txt")
    with pytest.raises(DataError) as error:
        check_prompts(loaded, ["short", "b" * 12, "", "b" * 30], "p.txt")
    assert "line 2: the prompt has 12 tokens, the model reads 12 at most" in str(error.value)
    assert "line 4: the prompt has 30 tokens" in str(error.value)
    assert "line 3" not in str(error.value)


def test_an_empty_line_needs_a_beginning(tmp_path):
    loaded = tiny_loaded(tmp_path)
    loaded.tokenizer.__dict__["special"] = {}
    with pytest.raises(DataError, match="line 2: an empty prompt"):
        check_prompts(loaded, ["a", ""], "p.txt")


def test_output(tmp_path, capsys):
    target = tmp_path / "out.jsonl"
    with open_lines(str(target)) as write:
        write({"text": "naïve\n"})
        assert json.loads(target.read_text("utf-8")) == {"text": "naïve\n"}  # there before the end
        write({"text": "b"})
    assert len(target.read_text("utf-8").splitlines()) == 2
    with open_lines("-") as write:
        write({"a": 1})
    assert capsys.readouterr().out == '{"a": 1}\n'


def test_output_that_cannot_be(tmp_path):
    source = tmp_path / "prompts.txt"
    source.write_text("one\n")
    with (
        pytest.raises(DataError, match="is the file that is read"),
        open_lines(str(source), not_over=str(source)),
    ):
        pass
    assert source.read_text() == "one\n"
    with pytest.raises(DataError, match="cannot be written"), open_lines(str(tmp_path)):
        pass


def test_a_disk_that_is_full_is_named():
    full = pytest.raises(DataError, match=r"^/dev/full: cannot be written any further \(No space left")
    with full, open_lines("/dev/full") as write:
        write({"text": "x"})
