"""Tensors to and from safetensors files, one piece at a time: no whole model is ever in memory twice.

    write_tensors: name → tensor ─▶ head + raw bytes, hashed while written       read_into: file ─▶ straight into a live tensor

Knows torch tensors that lie on one device. Knows nothing of step folders or of processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megalith.checkpoint.files import Buffer, FileRecord, Hasher, write_file
from megalith.checkpoint.header import encode, layout, read_header

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
READ = 1 << 30
"""Bytes asked of one read; Linux gives at most 2 GiB."""
METADATA = {"format": "pt"}
"""What Hugging Face libraries ask for before they open a file."""


def describe(tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    """(dtype as safetensors names it, shape). Raises `TypeError` for a dtype that the format does not have."""
    if tensor.dtype not in NAMES:
        raise TypeError(f"safetensors has no {tensor.dtype}")
    return NAMES[tensor.dtype], tuple(tensor.shape)


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], hasher: Hasher | None = None
) -> FileRecord:
    """Writes a new safetensors file straight from the tensors' memory (a copy is made of one that is not contiguous or on a GPU)."""
    entries = layout({name: describe(tensor) for name, tensor in tensors.items()})

    def chunks() -> Iterator[Buffer]:
        yield encode(entries, METADATA)
        for name in entries:
            yield raw_bytes(tensors[name].detach().cpu().contiguous())

    return write_file(path, chunks(), hasher)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor in host memory, without a copy."""
    view: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return view


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that still lies in its file; `read` and `rows` fetch it. `shape` and `dtype` are known without reading."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the file."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The whole tensor, in host memory."""
        return self._fetch(self.shape, 0)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` (exclusive) of the first dim; nothing else is read."""
        if not (self.shape and 0 <= start <= stop <= self.shape[0]):
            raise IndexError(f"rows {start}:{stop} of {self.name} {list(self.shape)}")
        row = int(torch.Size(self.shape[1:]).numel()) * self.dtype.itemsize
        return self._fetch((stop - start, *self.shape[1:]), start * row)

    def read_into(self, tensor: torch.Tensor) -> None:
        """Fills `tensor` (same shape and dtype) in place: straight from the file where its memory allows."""
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            with open(self.path, "rb", buffering=0) as file:
                _fill(file.fileno(), tensor.detach(), self.offset)
        else:
            tensor.detach().copy_(self.read())

    def _fetch(self, shape: tuple[int, ...], skip: int) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=self.dtype)
        with open(self.path, "rb", buffering=0) as file:
            _fill(file.fileno(), tensor, self.offset + skip)
        return tensor


def _fill(descriptor: int, tensor: torch.Tensor, offset: int) -> None:
    view = raw_bytes(tensor)
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done : done + READ]], offset + done)
        if count == 0:
            raise EOFError("the file became shorter while it was read")
        done += count


def open_tensors(path: Path) -> Iterator[LazyTensor]:
    """The tensors of a safetensors file in the order of its bytes. Raises `HeaderError` where it is malformed."""
    header = read_header(path)
    for name, entry in header.entries.items():
        yield LazyTensor(name, path, DTYPES[entry.dtype], entry.shape, header.data + entry.start)
