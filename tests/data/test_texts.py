"""Texts one after another, from every form of file."""

import gzip
import json

import pytest
import zstandard

from megalith.data.preprocess.sources import find_sources
from megalith.data.texts import Tally, read_texts
from megalith.errors import DataError

LINES = ["first", "zweite Zeile ä", "third\nwith newline"]


def jsonl(key="text"):
    return "".join(json.dumps({key: line, "other": 1}) + "\n" for line in LINES).encode()


def read(path, key="text", **options):
    tally = Tally()
    return list(read_texts(find_sources([str(path)]), key, tally, **options)), tally


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("x.jsonl", bytes),
        ("x.json", bytes),
        ("x.jsonl.gz", gzip.compress),
        ("x.jsonl.zst", zstandard.compress),
    ],
)
def test_json_lines(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(jsonl("body")))
    texts, tally = read(tmp_path / name, "body")
    assert texts == LINES
    assert (tally.documents, tally.bytes, tally.bad_lines) == (3, sum(len(t.encode()) for t in LINES), 0)


def test_bad_lines_are_counted_and_left_out(tmp_path):
    bad = [b"{", b"[]", b'{"text": 3}', b'{"other": "x"}', b'"text"', b'{"text": "\xff"}', b"", b"  "]
    (tmp_path / "x.jsonl").write_bytes(jsonl() + b"\n".join(bad))
    texts, tally = read(tmp_path / "x.jsonl")
    assert texts == LINES
    assert tally.bad_lines == 6


@pytest.mark.parametrize(("name", "pack"), [("x.txt", bytes), ("x.txt.gz", gzip.compress)])
def test_plain_text_in_pieces_that_join_to_the_whole(tmp_path, name, pack):
    text = "".join(f"line {number} é\n" for number in range(200_000)) + "no end"
    (tmp_path / name).write_bytes(pack(text.encode()))
    pieces, tally = read(tmp_path / name)
    assert "".join(pieces) == text
    assert len(pieces) > 2
    assert all(piece.endswith("\n") for piece in pieces[:-1])
    assert tally.bytes == len(text.encode())


def test_a_line_longer_than_a_block_comes_whole(tmp_path):
    long = "é" * (3 << 20)
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": long}, ensure_ascii=False) + '\n{"text": "b"}')
    assert read(tmp_path / "x.jsonl")[0] == [long, "b"]


def test_it_stops_after_the_bytes_asked_for(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(jsonl())
    assert read(tmp_path / "x.jsonl", max_bytes=6)[0] == LINES[:2]


@pytest.mark.parametrize(
    ("name", "pack"), [("x.jsonl.gz", gzip.compress), ("x.jsonl.zst", zstandard.compress)]
)
def test_cut_compressed_files(tmp_path, name, pack):
    whole = pack(jsonl() * 1000)
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cut off"):
        read(tmp_path / name)
