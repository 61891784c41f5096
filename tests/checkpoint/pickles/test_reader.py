"""Whatever torch.save writes is read as it was, and opening costs nothing that grows with the tensors."""

from __future__ import annotations

import argparse
import collections
import enum
import pickle
import random
import struct
import sys
import tracemalloc
import types

import numpy as np
import pytest
import torch

from megalith.checkpoint.pickles.reader import open_pickle
from megalith.checkpoint.pickles.stub import Stub
from megalith.checkpoint.pickles.tensors import StridedTensor
from megalith.checkpoint.tensor_files import LazyTensor
from megalith.errors import CheckpointError
from tests.faults.pickle_corpus import zipped

from .helpers import assert_same, raw


def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    base = torch.randn(40, 30, generator=draw)
    return {
        "whole": base, "again": base, "view": base[3:7], "column": base[:, 4], "turned": base.t(), "steps": base[:, ::3],
        "permuted": base.view(4, 10, 30).permute(2, 0, 1), "repeated": torch.randn(1, 3, generator=draw).expand(4, 3),
        "number": torch.tensor(3.5), "empty": torch.zeros(0, 4), "one": torch.ones(1, 1, 1),
        "double": torch.randn(3, generator=draw).double(), "half": torch.randn(3, generator=draw).half(),
        "brain": torch.randn(5, generator=draw).bfloat16(), "flags": torch.tensor([True, False]),
        "bytes": torch.arange(9, dtype=torch.uint8), "long": torch.tensor([-(2**62)]), "short": torch.ones(2, dtype=torch.int16),
        "complex": torch.randn(3, generator=draw, dtype=torch.complex64), "nan": torch.tensor([float("nan"), -0.0]),
        "u16": torch.arange(4).to(torch.uint16), "u64": torch.arange(5).to(torch.uint64)[1:4],
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }  # fmt: skip


def content() -> dict[str, object]:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return {
        "tensors": tensors(), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(num_layers=2, dtype=torch.bfloat16, names=["a"], nested=argparse.Namespace(x=1.5)),
        "python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(),
        "arrays": [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.zeros((0, 2)), np.array(3)],
        "numbers": (1, -5, 2**70, -(2**33), 1.5, True, None, 1 + 2j, np.float64(0.1), np.int64(4), np.bool_(True)),
        "text": ["é", "", "a" * 70_000, b"\x00\xff", b"", bytearray(b"xy")],
        "others": [{1, 2}, frozenset("ab"), slice(1, None, 2), torch.Size([2, 3]), collections.OrderedDict(k=1), (), ((),)],
    }  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("legacy", [False, True])
def test_what_torch_saves_is_read(tmp_path, legacy, protocol):
    saved = content()
    torch.save(saved, tmp_path / "x.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    found = open_pickle(tmp_path / "x.pt")
    assert_same(saved, found.content)
    assert "argparse.Namespace" in found.globals
    assert found.path == tmp_path / "x.pt"


@pytest.mark.parametrize("protocol", [0, 1, 2, 5])
def test_a_plain_pickle_is_read(tmp_path, protocol):
    saved = {k: v for k, v in content().items() if k in ("python", "numbers", "text", "others", "arrays")}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(saved, protocol=protocol))
    assert_same(saved, open_pickle(tmp_path / "x.pkl").content)
    (tmp_path / "y.pkl").write_bytes(pickle.dumps(np.arange(3), protocol=protocol))
    assert_same(np.arange(3), open_pickle(tmp_path / "y.pkl").content)


def test_contiguous_tensors_are_runs_of_the_file_and_others_are_not(tmp_path):
    torch.save(tensors(), tmp_path / "x.pt")
    found = open_pickle(tmp_path / "x.pt").content
    strided = {name for name, tensor in found.items() if isinstance(tensor, StridedTensor)}
    assert strided == {"column", "turned", "steps", "permuted", "repeated"}
    assert all(isinstance(found[name], LazyTensor) for name in found.keys() - strided)
    assert found["whole"].parts == found["again"].parts
    bytes_of = (tmp_path / "x.pt").read_bytes()
    (part,) = found["view"].parts
    assert bytes_of[part.offset : part.offset + found["view"].nbytes] == bytes(raw(tensors()["view"]))


def test_a_long_strided_tensor_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("megalith.checkpoint.pickles.tensors.BUFFER", 300)
    torch.save(tensors(), tmp_path / "x.pt")
    assert_same(tensors(), open_pickle(tmp_path / "x.pt").content)


def test_a_file_inside_a_file(tmp_path):
    for legacy in (False, True):
        torch.save({"a": torch.arange(5)}, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
        inner = (tmp_path / "x.pt").read_bytes()
        (tmp_path / "outer").write_bytes(b"before" * 11 + inner + b"after")
        found = open_pickle(tmp_path / "outer", offset=66, length=len(inner))
        assert_same({"a": torch.arange(5)}, found.content)


def test_opening_takes_no_memory_for_tensors(tmp_path):
    path = tmp_path / "x.pt"
    with torch.serialization.skip_data():
        torch.save({f"layer{n}": torch.empty(1 << 28) for n in range(10)}, path)
    assert path.stat().st_size > 10 << 30
    open_pickle(path)
    tracemalloc.start()
    found = open_pickle(path).content
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 300_000
    assert torch.equal(found["layer9"].rows(5, 8), torch.zeros(3))


class _Fake(enum.Enum):
    PADDING = 1


def test_classes_of_training_code_are_stubs_and_never_imported(tmp_path, monkeypatch):
    module = types.ModuleType("megatron.model.enums")
    _Fake.__module__, _Fake.__qualname__, _Fake.__name__ = module.__name__, "AttnMaskType", "AttnMaskType"
    module.AttnMaskType = _Fake
    for name in ("megatron", "megatron.model", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    torch.save({"args": argparse.Namespace(mask=_Fake.PADDING, kind=_Fake)}, tmp_path / "x.pt")
    monkeypatch.undo()
    args = open_pickle(tmp_path / "x.pt").content["args"]
    mask = args.value("mask")
    assert isinstance(mask, Stub)
    assert (mask.module, mask.name, mask.args) == ("megatron.model.enums", "AttnMaskType", (1,))
    assert str(args.value("kind")) == "megatron.model.enums.AttnMaskType"
    assert not any(name.startswith("megatron") for name in sys.modules)


def test_an_enum_as_python_3_11_writes_it(tmp_path):
    program = b"\x80\x02cbuiltins\ngetattr\ncmegatron.core.enums\nModelType\nX\x06\0\0\0scaled\x86R."
    (tmp_path / "x.pkl").write_bytes(program)
    found = open_pickle(tmp_path / "x.pkl").content
    assert (found.module, found.name, found.args) == ("megatron.core.enums", "ModelType", ("scaled",))


def test_what_python_2_wrote(tmp_path):
    """Text and bytes were one type; an array's content is such a string, and cPickle counts its memo from 1."""
    array = np.array([1.5, -2.0])
    body = b"U" + bytes([16]) + array.tobytes()
    program = (
        b"\x80\x02}q\x01(U\x05stepsq\x02K\x07U\x04nameq\x03U\x03\xc3\xa9xU\x05arrayq\x04"
        b"cnumpy.core.multiarray\n_reconstruct\nq\x05cnumpy\nndarray\nq\x06K\x00\x85U\x01b\x87Rq\x07"
        b"(K\x01K\x02\x85cnumpy\ndtype\nq\x08U\x02f8K\x00K\x01\x87Rq\t(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89" + body + b"tbU\x03oldc__builtin__\nset\nq\n]K\x01a\x85Ru."
    )
    (tmp_path / "x.pkl").write_bytes(program)
    assert_same(
        {"steps": 7, "name": b"\xc3\xa9x", "array": array, "old": {1}},
        open_pickle(tmp_path / "x.pkl").content,
    )


def test_a_view_of_a_storage_in_a_legacy_file(tmp_path):
    """As torch < 0.4 wrote a storage that is part of another: (key of the view, first element, elements)."""
    whole = torch.arange(10.0)
    saved = tmp_path / "x.pt"
    torch.save(whole, saved, _use_new_zipfile_serialization=False)
    content = saved.read_bytes()
    view = b"K\nX\x01\x00\x00\x00vK\x03K\x04\x87t"
    assert content.count(b"K\nNt") == 1
    place = content.index(b"K\nNt")
    broken = bytearray(content[:place] + view + content[place + 4 :])
    tail = broken.index(b"Q", place + len(view))
    assert broken[tail : tail + 5] == b"QK\x00K\n"
    broken[tail + 4] = 4  # the tensor has the view's four elements
    saved.write_bytes(bytes(broken))
    assert_same(torch.arange(3.0, 7.0), open_pickle(saved).content)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.eye(2).to_sparse(), "sparse tensor"),
        (lambda: torch.eye(2).to_sparse_csr(), "sparse tensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantised tensor"),
        (lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "nested tensor"),
        (lambda: torch.ones(2, device="meta"), "meta device"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj(), "lazily changed"),
        (lambda: np.array(["a", 1], dtype=object), "arrays of plain numbers"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_other_tensors_are_refused_by_name(tmp_path, make, words):
    torch.save([make()], tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=words):
        open_pickle(tmp_path / "x.pt")


def test_big_endian_files_are_refused_by_name(tmp_path):
    (tmp_path / "x.pt").write_bytes(zipped(b"\x80\x02N.", byteorder=b"big"))
    with pytest.raises(CheckpointError, match="big-endian"):
        open_pickle(tmp_path / "x.pt")
    torch.save(torch.ones(2), tmp_path / "y.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "y.pt").read_bytes()
    key = b"little_endian"
    at = content.index(key) + len(key)
    flag = content.index(b"\x88", at)
    assert flag - at < 4
    (tmp_path / "y.pt").write_bytes(content[:flag] + b"\x89" + content[flag + 1 :])
    with pytest.raises(CheckpointError, match="big-endian"):
        open_pickle(tmp_path / "y.pt")


def test_other_files_are_named(tmp_path):
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "program.pt")
    (tmp_path / "gzip.nemo").write_bytes(b"\x1f\x8b\x08" + bytes(20))
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "text.pt").write_bytes(struct.pack("<Q", 60) + b'{"a": 1}')
    for name, words in {
        "program.pt": "TorchScript", "gzip.nemo": "gzip", "empty.pt": "truncated",
        "folder.pt": "not an ordinary file", "text.pt": "no instruction", "absent.pt": "No such file",
    }.items():  # fmt: skip
        with pytest.raises(CheckpointError, match=words):
            open_pickle(tmp_path / name)
