"""Any part of a tensor, out of any slices of it, into memory of any layout, and hardly a byte more than that is read."""

from __future__ import annotations

import os
import random

import pytest
import torch

from megalith.checkpoint import tensor_files
from megalith.checkpoint.local import Held
from megalith.checkpoint.slices import elements, inside, shape_of, whole
from megalith.checkpoint.tensor_files import LazyTensor, Part, open_tensors, write_tensors


def split(draw: random.Random, shape: tuple[int, ...], times: int) -> list:
    """Slices that cover a shape, by cutting at random."""
    parts = [whole(shape)]
    for _ in range(times):
        part = parts.pop(draw.randrange(len(parts)))
        dim = draw.randrange(len(shape))
        first, stop = part[dim]
        if stop - first < 2:
            parts.append(part)
            continue
        at = draw.randrange(first + 1, stop)
        parts += [(*part[:dim], (first, at), *part[dim + 1 :]), (*part[:dim], (at, stop), *part[dim + 1 :])]
    return parts


def in_files(folder, tensor: torch.Tensor, parts: list) -> LazyTensor:
    """The tensor in one file for each slice, found again as one."""
    places = []
    for number, part in enumerate(parts):
        path = folder / f"{number}"
        write_tensors(path, {"pad": torch.zeros(number), "x": tensor[inside(part, whole(tensor.shape))]})
        (entry,) = (t for t in open_tensors(path) if t.name == "x")
        places.append(Part(path, entry.parts[0].offset, part))
    return LazyTensor("x", tensor.dtype, tuple(tensor.shape), tuple(places))


@pytest.mark.parametrize("limits", [(8 << 20, 32 << 10), (64, 16), (1, 1), (40, 1 << 20)])
def test_any_part_of_any_slices(tmp_path, monkeypatch, limits):
    """Buffers from one byte up: rows that fit, rows that do not, rows read alone."""
    monkeypatch.setattr(tensor_files, "BUFFER", limits[0])
    monkeypatch.setattr(tensor_files, "LONG", limits[1])
    draw = random.Random(0)
    for number, shape in enumerate([(13,), (9, 7), (5, 4, 6), (2, 3, 4, 5), (1, 1)] * 3):
        folder = tmp_path / str(number)
        folder.mkdir()
        tensor = torch.randn(shape).to(draw.choice([torch.float32, torch.float64, torch.bfloat16]))
        lazy = in_files(folder, tensor, split(draw, shape, number % 7))
        assert torch.equal(lazy.read(), tensor)
        assert torch.equal(lazy.rows(0, shape[0] // 2), tensor[: shape[0] // 2])
        for _ in range(8):
            part = tuple(sorted(draw.sample(range(size + 1), 2)) for size in shape)
            part = tuple((a, b) for a, b in part)
            wanted = tensor[inside(part, whole(shape))]
            contiguous = torch.zeros(shape_of(part), dtype=tensor.dtype)
            wide = torch.zeros(*shape_of(part)[:-1], 2 * shape_of(part)[-1], dtype=tensor.dtype)
            for memory in (contiguous, wide[..., ::2]):
                lazy.fill(Held(memory, shape, part))
                assert torch.equal(memory, wanted)
            assert not wide[..., 1::2].any(), "the gaps stay as they were"


def test_a_scalar_and_an_empty_part(tmp_path):
    write_tensors(tmp_path / "x", {"s": torch.tensor(3.5), "t": torch.ones(4, 2)})
    scalar, table = sorted(open_tensors(tmp_path / "x"), key=lambda t: t.name)
    memory = torch.zeros(())
    scalar.read_into(memory)
    assert memory == 3.5
    table.fill(Held(torch.zeros(0, 2), (4, 2), ((4, 4), (0, 2))))


@pytest.fixture
def counted(monkeypatch):
    """Bytes that reads asked the kernel for."""
    total = [0]
    real = os.preadv

    def preadv(descriptor, views, offset):
        count = real(descriptor, views, offset)
        total[0] += count
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    return total


def test_rows_and_long_columns_are_read_alone_short_columns_with_their_rows(tmp_path, counted):
    table = torch.randn(64, 20_000)
    write_tensors(tmp_path / "x", {"x": table})
    (lazy,) = open_tensors(tmp_path / "x")
    for part, most in [
        (((16, 32), (0, 20_000)), 1.0),
        (((0, 64), (10_000, 20_000)), 1.0),
        (((0, 64), (0, 1000)), 20.0),
    ]:
        counted[0] = 0
        memory = torch.zeros(shape_of(part))
        lazy.fill(Held(memory, (64, 20_000), part))
        assert torch.equal(memory, table[inside(part, whole(table.shape))])
        assert counted[0] <= most * elements(part) * 4


def test_files_without_a_part_are_not_opened(tmp_path):
    lazy = in_files(tmp_path, torch.arange(12.0), [((0, 6),), ((6, 12),)])
    (tmp_path / "1").unlink()
    assert torch.equal(lazy.rows(1, 6), torch.arange(1.0, 6.0))
    with pytest.raises(FileNotFoundError):
        lazy.read()
