"""Tensors to and from safetensors files, one piece at a time: no whole model is ever in memory twice.

    write_tensors: name → tensor ─▶ head + raw bytes, hashed while written
    read_into: slices in files ─▶ straight into what this process holds of a live tensor; little else is read

Knows torch tensors and files. Knows nothing of step folders or of other processes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megalith.checkpoint.files import Buffer, FileRecord, Hasher, write_file
from megalith.checkpoint.header import encode, layout, read_header
from megalith.checkpoint.lazy import Lazy
from megalith.checkpoint.local import Held, held
from megalith.checkpoint.slices import Slice, elements, inside, overlap, shape_of, whole

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
BUFFER = 8 << 20
"""Bytes read at once on the way to memory that a file's bytes cannot go to directly."""
LONG = 32 << 10
"""Bytes of a row from which on its wanted part is read alone; below that, whole rows are read and the rest is left."""
METADATA = {"format": "pt"}
"""What Hugging Face libraries ask for before they open a file."""


def describe(tensor: torch.Tensor | Lazy) -> tuple[str, tuple[int, ...]]:
    """(dtype as safetensors names it, shape). Raises `TypeError` for a dtype that the format does not have."""
    if tensor.dtype not in NAMES:
        raise TypeError(f"safetensors has no {tensor.dtype}")
    return NAMES[tensor.dtype], tuple(tensor.shape)


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], hasher: Hasher | None = None
) -> FileRecord:
    """Writes a new safetensors file straight from the tensors' memory (a copy is made of one that is not contiguous or on a GPU)."""
    return write_file(path, tensor_chunks(tensors), hasher)


def tensor_chunks(tensors: Mapping[str, torch.Tensor | Lazy]) -> Iterator[Buffer]:
    """The bytes of a safetensors file, tensor by tensor; one that still lies in files is read when its turn comes."""
    entries = layout({name: describe(tensor) for name, tensor in tensors.items()})
    yield encode(entries, METADATA)
    for name in entries:
        tensor = tensors[name]
        memory = tensor if isinstance(tensor, torch.Tensor) else tensor.read()
        yield raw_bytes(memory.detach().cpu().contiguous())
        del memory


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor in host memory, without a copy."""
    flat = tensor.as_strided((tensor.numel(),), (1,))  # a single element may have any stride
    view: memoryview = flat.view(torch.uint8).numpy().data
    return view


@dataclass(frozen=True)
class Part:
    """A slice of a tensor in a file: `offset` is its first byte."""

    path: Path
    offset: int
    place: Slice


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that still lies in its files; `read` and `rows` fetch it. `shape` and `dtype` are known without reading."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The whole tensor, in host memory."""
        return self._fetch(whole(self.shape))

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` (exclusive) of the first dim; nothing else is read."""
        if not (self.shape and 0 <= start <= stop <= self.shape[0]):
            raise IndexError(f"rows {start}:{stop} of {self.name} {list(self.shape)}")
        return self._fetch(((start, stop), *whole(self.shape[1:])))

    def read_into(self, tensor: torch.Tensor) -> None:
        """Fills `tensor` (same shape and dtype) in place: of a DTensor, what this process holds."""
        self.fill(held({self.name: tensor})[self.name])

    def fill(self, mine: Held) -> None:
        """Fills the memory that a process holds, straight from the files where it is contiguous in both."""
        for part in self.parts:
            common = overlap(part.place, mine.part)
            if common is not None:
                _fill_from(part, common, mine.memory[inside(common, mine.part)])

    def _fetch(self, place: Slice) -> torch.Tensor:
        tensor = torch.empty(shape_of(place), dtype=self.dtype)
        if elements(place):
            self.fill(Held(tensor, self.shape, place))
        return tensor


@dataclass(frozen=True)
class _Block:
    """A contiguous tensor in an open file."""

    descriptor: int
    offset: int
    shape: tuple[int, ...]

    def at(self, index: int, item: int) -> _Block:
        """One row of it; `item` bytes an element."""
        rest = self.shape[1:]
        return _Block(self.descriptor, self.offset + index * math.prod(rest) * item, rest)


def _fill_from(part: Part, place: Slice, target: torch.Tensor) -> None:
    with open(part.path, "rb", buffering=0) as file:
        block = _Block(file.fileno(), part.offset, shape_of(part.place))
        _fill(block, tuple((i.start, i.stop) for i in inside(place, part.place)), target)


def _fill(block: _Block, place: Slice, target: torch.Tensor) -> None:
    """`place` of a block into a tensor of that shape: in one read, row by row, or by way of a buffer of several rows."""
    item = target.element_size()
    if place[1:] == whole(block.shape[1:]):
        first = place[0][0] if place else 0
        _fill_run(block.descriptor, block.at(first, item).offset if place else block.offset, target)
        return
    (first, stop), inner = place[0], place[1:]
    row = math.prod(block.shape[1:]) * item
    if elements(inner) * item >= LONG or row > BUFFER:
        for index in range(first, stop):
            _fill(block.at(index, item), inner, target[index - first])
        return
    columns = (slice(None), *(slice(a, b) for a, b in inner))
    for index in range(first, stop, BUFFER // row):
        last = min(index + BUFFER // row, stop)
        rows = torch.empty((last - index, *block.shape[1:]), dtype=target.dtype)
        _read(block.descriptor, rows, block.at(index, item).offset)
        target[index - first : last - first].copy_(rows[columns])


def _fill_run(descriptor: int, offset: int, target: torch.Tensor) -> None:
    """Contiguous bytes of a file into a tensor that may lie on a GPU or with gaps."""
    if target.device.type == "cpu" and target.is_contiguous():
        _read(descriptor, target, offset)
    elif target.nbytes <= BUFFER:
        rows = torch.empty(target.shape, dtype=target.dtype)
        _read(descriptor, rows, offset)
        target.copy_(rows)
    else:
        row = target[0].nbytes
        step = max(1, BUFFER // row)
        for index in range(0, len(target), step):
            _fill_run(
                descriptor, offset + index * row, target[index] if step == 1 else target[index : index + step]
            )


def _read(descriptor: int, tensor: torch.Tensor, offset: int) -> None:
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
        part = Part(path, header.data + entry.start, whole(entry.shape))
        yield LazyTensor(name, DTYPES[entry.dtype], entry.shape, (part,))
