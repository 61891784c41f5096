"""Streaming writes, in-place and partial reads, and no second copy of a model in memory."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch

from megalith.checkpoint.files import Hasher
from megalith.checkpoint.tensor_files import describe, open_tensors, write_tensors

from .helpers import blank, same, tensors_of


def test_the_record_is_what_sha256sum_says(tmp_path):
    hasher = Hasher()
    one, two = (write_tensors(tmp_path / n, tensors_of(3), h) for n, h in (("a", hasher), ("b", None)))
    hasher.close()
    content = (tmp_path / "a").read_bytes()
    assert one == two
    assert (one.size, one.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_tensors_larger_than_a_piece_are_hashed_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("megalith.checkpoint.files.CHUNK", 1000)
    hasher = Hasher()
    record = write_tensors(
        tmp_path / "a", {"model.w": torch.randn(12_345), "model.v": torch.ones(777)}, hasher
    )
    hasher.close()
    assert record.sha256 == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()


def test_short_writes_are_continued(tmp_path, monkeypatch):
    import os

    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[: max(1, len(data) // 3)]))
    record = write_tensors(tmp_path / "a", tensors_of(3))
    monkeypatch.undo()
    assert record == write_tensors(tmp_path / "b", tensors_of(3))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_reads_fill_live_tensors_of_any_memory_layout(tmp_path):
    write_tensors(tmp_path / "x", tensors_of(3))
    live = blank()
    live["model.token_embedding.weight"] = torch.zeros(4, 7).t()
    live["model.head.weight"] = torch.zeros(7, 4)
    base = torch.zeros(20)
    live["optim.w.exp_avg"] = torch.zeros(56)[::2].view(7, 4)
    live["model.blocks.0.norm.weight"] = base.bfloat16()[3:7]
    places = {name: tensor.data_ptr() for name, tensor in live.items()}
    for lazy in open_tensors(tmp_path / "x"):
        lazy.read_into(live[lazy.name])
    assert same(live, tensors_of(3))
    assert places == {name: tensor.data_ptr() for name, tensor in live.items()}


def test_a_parameter_that_wants_a_gradient_is_filled_and_keeps_wanting_it(tmp_path):
    write_tensors(tmp_path / "x", {"model.w": torch.arange(6.0).view(2, 3)})
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    next(open_tensors(tmp_path / "x")).read_into(parameter)
    assert parameter.requires_grad
    assert parameter.is_leaf
    assert torch.equal(parameter, torch.arange(6.0).view(2, 3))


def test_rows_read_only_rows(tmp_path):
    table = torch.randn(9, 2, 3, dtype=torch.float64)
    write_tensors(tmp_path / "x", {"model.w": table, "model.a": torch.ones(3)})
    lazy = {t.name: t for t in open_tensors(tmp_path / "x")}["model.w"]
    assert (lazy.shape, lazy.dtype, lazy.nbytes) == ((9, 2, 3), torch.float64, 9 * 6 * 8)
    assert torch.equal(lazy.rows(2, 5), table[2:5])
    assert lazy.rows(4, 4).shape == (0, 2, 3)
    for start, stop in ((-1, 2), (3, 10), (5, 4)):
        with pytest.raises(IndexError, match="rows"):
            lazy.rows(start, stop)


def test_a_dtype_that_the_format_lacks_is_refused():
    with pytest.raises(TypeError, match="complex128"):
        describe(torch.zeros(2, dtype=torch.complex128))


def test_writing_takes_no_second_copy(tmp_path):
    """Peak memory grows by a fraction of the 200 MB written."""
    code = """
import sys, torch
from pathlib import Path
from megalith.checkpoint.files import Hasher
from megalith.checkpoint.tensor_files import write_tensors

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024

tensors = {f"model.{i}": torch.ones(5 << 20) for i in range(10)}
write_tensors(Path(sys.argv[1]) / "warm", {"model.w": torch.ones(9)}, Hasher())
before = peak()
write_tensors(Path(sys.argv[1]) / "x", tensors, Hasher())
print(peak() - before)
"""
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert float(out.stdout) < 40
