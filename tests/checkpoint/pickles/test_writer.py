"""What is written loads in torch, weights only, mapped or not, bit by bit; nothing is there twice or in memory at once."""

from __future__ import annotations

import argparse
import collections
import hashlib
import tracemalloc
import zipfile

import pytest
import torch

from megalith.checkpoint.files import Hasher
from megalith.checkpoint.pickles import writer
from megalith.checkpoint.pickles.reader import open_pickle
from megalith.checkpoint.pickles.writer import Pending, write_pickle

from .helpers import assert_same, raw
from .test_reader import tensors

PLAIN = {
    "numbers": [1, -5, 2**31, -(2**31) - 1, 2**70, 0.1, float("inf"), True, False, None],
    "text": ["é", "", "\ud800", "a" * 70_000, b"\x00\xff", b""],
    "nested": ({"a": ({}, [], ())}, collections.OrderedDict(b=1), torch.float16, {0: "zero", (1, 2): "pair"}),
}


def every() -> dict[str, torch.Tensor]:
    return {
        **tensors(),
        "eighth": torch.linspace(-2, 2, 4).to(torch.float8_e4m3fn),
        "wide": torch.ones(2, dtype=torch.complex128),
    }


@pytest.mark.parametrize("mapped", [False, True])
def test_torch_loads_it(tmp_path, mapped):
    write_pickle(tmp_path / "x.pt", {"tensors": every(), **PLAIN})
    found = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mapped)
    for name, tensor in every().items():
        assert found["tensors"][name].dtype == tensor.dtype
        assert found["tensors"][name].shape == tensor.shape
        assert raw(found["tensors"][name]) == raw(tensor)
    assert {name: found[name] for name in PLAIN} == PLAIN
    assert isinstance(found["nested"][1], collections.OrderedDict)


def test_we_read_it_and_write_it_again_to_the_same_bytes(tmp_path):
    write_pickle(tmp_path / "x.pt", {"tensors": every(), **PLAIN})
    found = open_pickle(tmp_path / "x.pt").content
    assert_same({"tensors": every(), **PLAIN}, found)
    write_pickle(tmp_path / "y.pt", found)
    assert (tmp_path / "x.pt").read_bytes() == (tmp_path / "y.pt").read_bytes()


def test_it_is_a_whole_zip_file_with_aligned_storages(tmp_path):
    write_pickle(tmp_path / "x.pt", every())
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert archive.testzip() is None
    for tensor in open_pickle(tmp_path / "x.pt").content.values():
        assert tensor.parts[0].offset % 64 == 0


def test_the_record_is_that_of_the_file(tmp_path):
    hasher = Hasher()
    record = write_pickle(tmp_path / "x.pt", every(), hasher)
    hasher.close()
    content = (tmp_path / "x.pt").read_bytes()
    assert (record.size, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_what_is_there_twice_is_written_once(tmp_path):
    made = []

    def make() -> torch.Tensor:
        made.append(1)
        return torch.ones(1000)

    tied, pending = torch.randn(1000), Pending((1000,), torch.float32, make)
    write_pickle(tmp_path / "x.pt", {"a": tied, "b": [tied], "c": pending, "d": pending})
    assert (tmp_path / "x.pt").stat().st_size < 2 * 4000 + 2000
    assert made == [1]
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert found["a"].data_ptr() == found["b"][0].data_ptr()
    assert found["c"].data_ptr() == found["d"].data_ptr()
    lazy = open_pickle(tmp_path / "x.pt").content
    write_pickle(tmp_path / "y.pt", lazy)
    assert (tmp_path / "y.pt").stat().st_size == (tmp_path / "x.pt").stat().st_size


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    import numpy as np

    def make() -> torch.Tensor:
        return torch.from_numpy(np.full(1 << 18, 7, np.float32))

    content = {f"w{n}": Pending((1 << 18,), torch.float32, make) for n in range(8)}
    tracemalloc.start()
    write_pickle(tmp_path / "x.pt", content)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * (1 << 20)
    assert torch.load(tmp_path / "x.pt", weights_only=True)["w7"].sum() == 7 << 18


def test_large_members_and_offsets_take_the_wide_fields(tmp_path, monkeypatch):
    """As beyond 4 GiB, with the limit at 1000 bytes: what is written then is what torch and zipfile read."""
    monkeypatch.setattr(writer, "_WIDE", 1000)
    content = {"a": torch.randn(300), "b": torch.randn(2), "c": torch.randn(400)}
    raw_entry = writer._entry

    def entry(name: bytes, header: int, size: int, check: int) -> bytes:
        return raw_entry(name, header, size, check).replace(b"\xe8\x03\0\0", b"\xff\xff\xff\xff")

    monkeypatch.setattr(writer, "_entry", entry)
    write_pickle(tmp_path / "x.pt", content)
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert archive.testzip() is None
        assert archive.getinfo("archive/data/2").file_size == 1600
    for mapped in (False, True):
        found = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mapped)
        assert all(torch.equal(found[name], tensor) for name, tensor in content.items())
    assert_same(content, open_pickle(tmp_path / "x.pt").content)


def test_a_namespace_is_written_for_those_who_ask_for_its_attributes(tmp_path):
    saved = {"args": argparse.Namespace(num_layers=2, params_dtype=torch.float16)}
    write_pickle(tmp_path / "x.pt", saved)
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert torch.load(tmp_path / "x.pt", weights_only=True) == saved
    assert_same(saved, open_pickle(tmp_path / "x.pt").content)


def test_what_cannot_be_written_is_said(tmp_path):
    with pytest.raises(TypeError, match="Path is not written"):
        write_pickle(tmp_path / "x.pt", {"a": tmp_path})
    assert not (tmp_path / "x.pt").exists()
    with pytest.raises(TypeError, match=r"\[3\] was made where .* \[2\] was announced"):
        write_pickle(tmp_path / "y.pt", Pending((2,), torch.float32, lambda: torch.ones(3)))
    with pytest.raises(FileExistsError):
        write_pickle(tmp_path / "y.pt", 1)
