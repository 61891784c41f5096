"""The head of a safetensors file: what we write others read, and nothing malformed gets through."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megalith.checkpoint.header import ITEM_BYTES, HeaderError, encode, layout, read_header
from megalith.checkpoint.tensor_files import DTYPES, open_tensors, write_tensors

from .helpers import same, tensors_of


def test_every_dtype_has_its_width_and_survives_both_libraries(tmp_path):
    assert DTYPES.keys() == ITEM_BYTES.keys()
    assert all(dtype.itemsize == ITEM_BYTES[name] for name, dtype in DTYPES.items())
    tensors = {
        f"model.{n}": torch.arange(48, dtype=torch.uint8).view(d) for n, d in DTYPES.items() if n != "BOOL"
    }
    tensors["model.BOOL"] = torch.tensor([True, False, True])
    write_tensors(tmp_path / "ours", tensors)
    theirs = load_file(tmp_path / "ours")
    assert theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert theirs[name].dtype == tensor.dtype
        assert torch.equal(theirs[name].view(torch.uint8), tensor.view(torch.uint8))
    save_file(tensors, tmp_path / "theirs")
    for lazy in open_tensors(tmp_path / "theirs"):
        assert torch.equal(lazy.read().view(torch.uint8), tensors[lazy.name].view(torch.uint8))


def test_hugging_face_libraries_find_the_metadata_they_ask_for(tmp_path):
    write_tensors(tmp_path / "x", tensors_of(1))
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_start_aligned_to_their_element():
    entries = layout({"a": ("BOOL", (3,)), "b": ("F64", (2,)), "c": ("BF16", (5,)), "d": ("F32", ())})
    assert all(entry.start % ITEM_BYTES[entry.dtype] == 0 for entry in entries.values())
    assert len(encode(entries, {})) % 8 == 0


def test_names_beyond_ascii(tmp_path):
    tensors = {'model.ñ"\\\n': torch.ones(2)}
    write_tensors(tmp_path / "x", tensors)
    assert same(load_file(tmp_path / "x"), tensors)


def header(table: object, data: bytes = b"") -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data


def one(**changes: object) -> dict[str, object]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"1234567", "too few"),
        (struct.pack("<Q", 1 << 62) + b"{}", "claims 4611686018427387904 bytes"),
        (struct.pack("<Q", (1 << 64) - 1) + b"{}", "claims"),
        (struct.pack("<Q", 99) + b"{}", "claims 99"),
        (header(b"{not json"), "not JSON"),
        (header(b"\xff\xfe"), "not JSON"),
        (header(b"[" * 100_000), "not JSON"),
        (header([1, 2]), "not a JSON object"),
        (header({"__metadata__": 3}), "__metadata__"),
        (header(one(dtype="F33"), bytes(8)), "describes a"),
        (header(one(dtype=["F32"]), bytes(8)), "describes a"),
        (header(one(shape=[-2]), bytes(8)), "describes a"),
        (header(one(shape=[2.0]), bytes(8)), "describes a"),
        (header(one(shape=[True, 2]), bytes(8)), "describes a"),
        (header(one(shape="22"), bytes(8)), "describes a"),
        (header(one(shape=[3]), bytes(8)), "12 bytes, but takes 8"),
        (header(one(data_offsets=[0]), bytes(8)), "describes a"),
        (header(one(data_offsets=[8, 0]), bytes(8)), "takes -8"),
        (header({"a": None}), "describes a"),
        (header(one(), bytes(9)), "the file at"),
        (header(one(), bytes(7)), "the file at"),
        (header(one(data_offsets=[4, 12]), bytes(12)), "starts at byte 4"),
        (header(one() | {"b": one()["a"]}, bytes(8)), "starts at byte 0, not at 8"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path, content, why):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(HeaderError, match=why.replace("[", r"\[")):
        read_header(tmp_path / "x")


def test_a_header_longer_than_readers_take_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "x", "wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)  # a hole: no such bytes on the disk
    with pytest.raises(HeaderError, match="claims 200000000"):
        read_header(tmp_path / "x")
