"""The side-car: written whole, read back equal, damaged ones named."""

import json

import pytest

from megalith.data.indexed.sidecar import read_side_car, write_side_car
from megalith.errors import DataError

from .corpus import make_pair, make_tokenizer


@pytest.fixture
def prefix(tmp_path):
    make_tokenizer(tmp_path / "tokenizer")
    return make_pair(tmp_path / "x", tmp_path / "tokenizer")


def test_round_trip(prefix):
    side_car = read_side_car(prefix)
    assert (side_car.documents, side_car.append_eod, side_car.sources) == (3, True, ["x.jsonl"])
    assert side_car.tokenizer.type == "GPT2BPETokenizer"
    path = write_side_car(prefix, side_car)
    assert read_side_car(f"{prefix}.bin") == side_car
    assert json.loads(path.read_text())["format_version"] == 1
    assert not list(prefix.parent.glob("*.partial"))


def test_none_where_there_is_none(tmp_path):
    assert read_side_car(tmp_path / "x") is None


def test_later_keys_are_ignored_and_later_versions_refused(prefix):
    path = prefix.with_name("x.meta.json")
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "new": 1}))
    assert read_side_car(prefix).documents == 3
    path.write_text(json.dumps({**values, "format_version": 2}))
    with pytest.raises(DataError, match="format version 2"):
        read_side_car(prefix)


@pytest.mark.parametrize("change", [b"", b"{", b"[]", b"\xff", b'{"items": "three"}'])
def test_damaged(prefix, change):
    path = prefix.with_name("x.meta.json")
    path.write_bytes(change)
    with pytest.raises(DataError, match=r"x\.meta\.json.*damaged side-car"):
        read_side_car(prefix)


def test_every_cut_is_noticed(prefix):
    path = prefix.with_name("x.meta.json")
    whole = path.read_bytes()
    for length in range(0, len(whole) - 2, 3):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError):
            read_side_car(prefix)
