"""Tensors of a pickle: pieces of storages that stay in the file until somebody reads them.

Knows storages, strides and what torch's rebuilding functions get. Never reads a storage to make a tensor of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalith.checkpoint.lazy import Lazy
from megalith.checkpoint.pickles.source import PickleError, Unreadable, shown
from megalith.checkpoint.pickles.stub import Maker, Name
from megalith.checkpoint.slices import whole
from megalith.checkpoint.tensor_files import BUFFER, LazyTensor, Part

MAX_DIMS = 64
MAX_ELEMENTS = 1 << 60
EXPANDED = 1 << 26
"""Bytes that a tensor may have beyond its storage (`expand` repeats elements): reading it may not fill the memory."""


@dataclass(frozen=True)
class Storage:
    """`nbytes` bytes of a file from byte `offset`, of elements of one dtype; `typed` says that its class named the dtype."""

    path: Path
    name: str
    dtype: torch.dtype
    offset: int
    nbytes: int
    typed: bool = True


@dataclass(frozen=True)
class StridedTensor:
    """A tensor that does not lie in one run: transposed, every other column, or expanded. Has the face of a `LazyTensor`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    path: Path
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of all of it once it is read."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The whole tensor, contiguous, in host memory."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self._fill(tensor, self.offset)
        return tensor

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` (exclusive) of the first dim; bytes between them may be read too."""
        if not (self.shape and 0 <= start <= stop <= self.shape[0]):
            raise IndexError(f"rows {start}:{stop} of {self.name} {list(self.shape)}")
        tensor = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        if tensor.numel():
            self._fill(tensor, self.offset + start * self.stride[0] * self.dtype.itemsize)
        return tensor

    def _fill(self, target: torch.Tensor, offset: int) -> None:
        """Reads the run that a tensor spans; of a long one, piece by piece along its longest stride."""
        run = span(tuple(target.shape), self.stride)
        longest = max(range(target.dim()), key=lambda d: self.stride[d] if target.shape[d] > 1 else -1)
        if run * self.dtype.itemsize <= BUFFER or target.shape[longest] == 1:
            source = LazyTensor(self.name, self.dtype, (run,), (Part(self.path, offset, ((0, run),)),))
            target.copy_(source.read().as_strided(target.shape, self.stride))
            return
        half = target.shape[longest] // 2
        step = half * self.stride[longest] * self.dtype.itemsize
        self._fill(target.narrow(longest, 0, half), offset)
        self._fill(target.narrow(longest, half, target.shape[longest] - half), offset + step)


def span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first of a tensor to its last, both included."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def place(storage: Any, offset: Any, shape: Any, stride: Any, dtype: torch.dtype | None = None) -> Lazy:
    """The tensor at element `offset` of a storage. Raises `PickleError` where it is not all inside."""
    if not isinstance(storage, Storage):
        raise PickleError("a tensor of something that is no storage")
    shape, stride = _sizes(shape), _sizes(stride)
    if type(offset) is not int or offset < 0 or len(shape) != len(stride):
        raise PickleError(f"a tensor at {shown(offset)} of {shape} with strides {stride}")
    if math.prod(size for size in shape if size) > MAX_ELEMENTS:
        raise PickleError(f"a tensor {list(shape)}")
    dtype = dtype or storage.dtype
    first, size = storage.offset + offset * dtype.itemsize, math.prod(shape) * dtype.itemsize
    if math.prod(shape) == 0:
        return LazyTensor(storage.name, dtype, shape, (Part(storage.path, storage.offset, whole(shape)),))
    end = (offset + span(shape, stride)) * dtype.itemsize
    if end > storage.nbytes:
        raise PickleError(
            f"a tensor {list(shape)} ends at byte {end} of {storage.name}, which has {storage.nbytes}"
        )
    if size > storage.nbytes + EXPANDED:
        raise PickleError(f"a tensor {list(shape)} repeats the {storage.nbytes} bytes of {storage.name}")
    if _contiguous(shape, stride):
        return LazyTensor(storage.name, dtype, shape, (Part(storage.path, first, whole(shape)),))
    return StridedTensor(storage.name, dtype, shape, stride, storage.path, first)


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > MAX_DIMS:
        raise PickleError(f"a shape of {shown(value)}")
    if any(type(size) is not int or not 0 <= size <= MAX_ELEMENTS for size in value):
        raise PickleError("a shape or strides of something else than sizes")
    return value


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _v2(args: tuple[Any, ...]) -> Lazy:
    storage, offset, shape, stride, _, _, *metadata = args
    _plain(metadata)
    return place(storage, offset, shape, stride)


def _v3(args: tuple[Any, ...]) -> Lazy:
    storage, offset, shape, stride, _, _, dtype, *metadata = args
    _plain(metadata)
    if not isinstance(dtype, torch.dtype):
        raise PickleError(f"a tensor of dtype {shown(dtype)}")
    return place(storage, offset, shape, stride, dtype)


def _plain(metadata: list[Any]) -> None:
    """Refuses what says that the values are not those in the file."""
    for each in metadata:
        if not isinstance(each, dict):
            raise PickleError("a tensor with metadata that is no dict")
        if any(each.values()):
            raise Unreadable(f"it holds a lazily changed tensor ({', '.join(map(str, each))})")


def _of_type(args: tuple[Any, ...]) -> Any:
    made_by, _, inner, _ = args
    maker = MAKERS.get((made_by.module, made_by.name)) if isinstance(made_by, Name) else None
    if maker is None:
        raise PickleError(f"a tensor made by {shown(made_by)}")
    return maker(inner)


def _parameter(args: tuple[Any, ...]) -> Any:
    if not 1 <= len(args) <= 4 or not isinstance(args[0], (LazyTensor, StridedTensor)):
        raise PickleError("a parameter of something that is no tensor")
    return args[0]


MAKERS: dict[tuple[str, str], Maker] = {
    ("torch._utils", "_rebuild_tensor"): lambda args: place(*args),
    ("torch._utils", "_rebuild_tensor_v2"): _v2,
    ("torch._utils", "_rebuild_tensor_v3"): _v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch.nn.parameter", "Parameter"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _of_type,
}
