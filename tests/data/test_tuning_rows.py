"""Rows of tuning files: what stands for a text, and everything that is wrong in a file at once."""

from __future__ import annotations

import json

import pytest

from megalith.data.tuning_rows import first_fields, read_rows
from megalith.errors import DataError

WANTED = ["prompt_tag", "text", "answer"]


def write(tmp_path, *lines, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def row(**fields):
    return {"prompt_tag": "a", "text": "t", "answer": "x", **fields}


@pytest.mark.parametrize(
    ("value", "text"), [("yes", "yes"), (["yes"], "yes"), (True, "True"), (3, "3"), (0.5, "0.5"), ([False], "False"), ("", "")]
)  # fmt: skip
def test_what_stands_for_a_text(tmp_path, value, text):
    (found,) = read_rows(write(tmp_path, row(answer=value, id=7)), WANTED)
    assert found.fields == {"prompt_tag": "a", "text": "t", "answer": text}
    assert found.where.endswith("rows.jsonl:1")


def test_everything_that_is_wrong_is_told_by_line(tmp_path):
    good = row()
    path = write(
        tmp_path,
        good,
        "",
        row(answer=["a", "b"]),
        {"text": "t", "answer": "x"},
        "[1, 2]",
        "{oops",
        row(text=None),
        good,
    )
    with pytest.raises(DataError) as caught:
        read_rows(path, WANTED)
    said = str(caught.value)
    assert said.startswith(f"{path}: 5 rows of this file cannot be used")
    for part in (
        'line 3: "answer" is a list of 2, not a text', 'line 4: has no "prompt_tag" (it has text, answer)',
        "line 5: is a list of 2, not an object", "line 6: is not JSON", 'line 7: "text" is null, not a text',
    ):  # fmt: skip
        assert part in said
    assert "fix: one object a line" in said


def test_half_a_character_is_told_by_line(tmp_path):
    path = write(tmp_path, row(text="whole \U0001f600"), row(text="half \ud83d"))
    with pytest.raises(DataError, match=r'line 2: "text" holds half a character \(U\+D83D\)'):
        read_rows(path, WANTED)


def test_of_many_the_first_few_and_their_number(tmp_path):
    with pytest.raises(DataError) as caught:
        read_rows(write(tmp_path, *[{"text": 1}] * 9), ["text", "answer"])
    assert str(caught.value).count("has no") == 5
    assert "and 4 more" in str(caught.value)


def test_rows_are_counted_not_what_is_wrong_in_them(tmp_path):
    with pytest.raises(DataError, match=r"1 row of this file cannot be used\n    line 2: .*\n    line 2: "):
        read_rows(write(tmp_path, row(), {}), ["text", "answer"])


def test_a_folder_is_no_file_of_rows(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read: .*\n.*give a \.jsonl or \.json file"):
        read_rows(tmp_path, WANTED)


def test_json_may_be_a_list_or_lines(tmp_path):
    lines = write(tmp_path, row(), row(text="u"), name="a.json")
    whole = tmp_path / "b.json"
    whole.write_text(json.dumps([row(), row(text="u")], indent=1))
    assert [r.fields for r in read_rows(lines, WANTED)] == [r.fields for r in read_rows(whole, WANTED)]
    assert [r.line for r in read_rows(whole, WANTED)] == [1, 2]
    whole.write_text("[1, ")
    with pytest.raises(DataError, match="is not JSON"):
        read_rows(whole, WANTED)


def test_a_byte_order_mark_and_windows_lines_are_no_matter(tmp_path):
    path = tmp_path / "w.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row()).encode() + b"\r\n\r\n" + json.dumps(row()).encode())
    assert [r.line for r in read_rows(path, WANTED)] == [1, 3]
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match="line 1: is not UTF-8 text"):
        read_rows(path, WANTED)


def test_no_file(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):
        read_rows(tmp_path / "gone.jsonl", WANTED)
    assert first_fields(write(tmp_path, row(id=1))) == {*WANTED, "id"}
    assert first_fields(write(tmp_path, "")) == set()
