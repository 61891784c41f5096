"""Writes files that `torch.load(weights_only=True)` reads, tensor by tensor: no more than one is in memory.

    content ─▶ data.pkl (protocol 2) ─▶ data/0, data/1, … each made, written and let go ─▶ the directory of the zip file

Knows the zip layout of torch ≥ 1.6: nothing compressed, each storage at a multiple of 64 bytes. The same content gives the
same bytes.
"""

from __future__ import annotations

import argparse
import math
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalith.checkpoint.files import CHUNK, Buffer, FileRecord, Hasher, write_file
from megalith.checkpoint.pickles.names import DTYPES, STORAGES
from megalith.checkpoint.tensor_files import LazyTensor, raw_bytes

ALIGNMENT = 64
ROOT = "archive/"
_WIDE = 0xFFFFFFFF
_CLASSES = {dtype: name for name, dtype in reversed(STORAGES.items()) if "Untyped" not in name}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class Pending:
    """A tensor that is made when its turn to be written comes; `make` returns one of this shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    def read(self) -> torch.Tensor:
        """Makes it."""
        return self.make()


def write_pickle(path: Path, content: Any, hasher: Hasher | None = None) -> FileRecord:
    """Writes a new torch file: dicts, lists, tuples, numbers, text, bytes, dtypes, tensors (live, lazy or `Pending`).

    A tensor that is there twice is written once. An `argparse.Namespace` is written too, but a file with one loads only
    where that class is allowed. Raises `TypeError` for anything else, `OSError` for a full disk.
    """
    return write_file(path, torch_chunks(content), hasher)


def torch_chunks(content: Any) -> Iterator[Buffer]:
    """The bytes of a torch file, block by block. Raises `TypeError` at once for what is not written to one."""
    pickler = Pickler()
    return _chunks(pickler.program(content), pickler.tensors)


def torch_size(content: Any) -> int:
    """Bytes that `torch_chunks` makes of it; no tensor is read or made."""
    pickler = Pickler()
    program, zipped = pickler.program(content), _Zip()
    sizes = [tensor_bytes(tensor) for tensor in pickler.tensors]
    members = {"data.pkl": len(program), "byteorder": 6}
    members |= {f"data/{number}": size for number, size in enumerate(sizes)}
    for name, size in (members | {"version": 2}).items():
        zipped.skip(name, size)
    return zipped.size + len(zipped.directory())


def tensor_bytes(tensor: Any) -> int:
    """Bytes of a tensor that may be lazy."""
    return math.prod(tensor.shape) * int(tensor.dtype.itemsize)


def _chunks(program: bytes, tensors: list[Any]) -> Iterator[Buffer]:
    zipped = _Zip()
    yield from zipped.member("data.pkl", len(program), iter([program]))
    yield from zipped.member("byteorder", 6, iter([b"little"]))
    for number, tensor in enumerate(tensors):
        yield from zipped.member(f"data/{number}", tensor_bytes(tensor), _bytes_of(tensor))
    yield from zipped.member("version", 2, iter([b"3\n"]))
    yield zipped.directory()


def _bytes_of(lazy: Any) -> Iterator[Buffer]:
    tensor = lazy if isinstance(lazy, torch.Tensor) else lazy.read()
    if tuple(tensor.shape) != tuple(lazy.shape) or tensor.dtype != lazy.dtype:
        raise TypeError(
            f"{tensor.dtype} {list(tensor.shape)} was made where {lazy.dtype} {list(lazy.shape)} was announced"
        )
    if tensor.numel():
        yield raw_bytes(tensor.detach().cpu().contiguous())


class Pickler:
    """Writes the program of a pickle; `tensors` are those that it refers to, in the order of their numbers."""

    def __init__(self) -> None:
        self.tensors: list[Any] = []
        self._numbers: dict[Any, int] = {}

    def program(self, content: Any) -> bytes:
        """The whole pickle, protocol 2."""
        return b"\x80\x02" + b"".join(self._value(content)) + b"."

    def _value(self, value: Any) -> Iterator[bytes]:
        if value is None or value is True or value is False:
            yield {None: b"N", True: b"\x88", False: b"\x89"}[value]
        elif isinstance(value, (int, float, str, bytes)):
            yield _plain(value)
        elif isinstance(value, OrderedDict):
            yield b"ccollections\nOrderedDict\n)R"
            yield from self._items(value)
        elif isinstance(value, dict):
            yield b"}"
            yield from self._items(value)
        elif isinstance(value, (list, tuple)):
            yield b"(" if isinstance(value, tuple) else b"]("
            for each in value:
                yield from self._value(each)
            yield b"t" if isinstance(value, tuple) else b"e"
        elif isinstance(value, torch.dtype):
            yield _dtype(value)
        elif isinstance(value, argparse.Namespace):
            yield b"cargparse\nNamespace\n)\x81}"
            yield from self._items(vars(value))
            yield b"b"
        elif all(hasattr(value, each) for each in ("shape", "dtype")) and (
            isinstance(value, torch.Tensor) or hasattr(value, "read")
        ):
            yield self._tensor(value)
        else:
            raise TypeError(f"a {type(value).__name__} is not written to a torch file")

    def _items(self, items: dict[Any, Any]) -> Iterator[bytes]:
        yield b"("
        for key, value in items.items():
            yield from self._value(key)
            yield from self._value(value)
        yield b"u"

    def _tensor(self, tensor: Any) -> bytes:
        number = self._numbers.setdefault(_identity(tensor), len(self.tensors))
        if number == len(self.tensors):
            self.tensors.append(tensor)
        shape = tuple(tensor.shape)
        stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        typed = _CLASSES.get(tensor.dtype)
        kind = f"ctorch\n{typed}\n" if typed else "ctorch.storage\nUntypedStorage\n"
        numel = math.prod(shape) * (1 if typed else tensor.dtype.itemsize)
        storage = (
            b"("
            + _plain("storage")
            + kind.encode()
            + _plain(str(number))
            + _plain("cpu")
            + _plain(numel)
            + b"tQ"
        )
        place = _plain(0) + b"".join(self._value(shape)) + b"".join(self._value(stride))
        hooks = b"\x89ccollections\nOrderedDict\n)R"
        name = b"ctorch._utils\n_rebuild_tensor_v2\n(" if typed else b"ctorch._utils\n_rebuild_tensor_v3\n("
        return name + storage + place + hooks + (b"" if typed else _dtype(tensor.dtype)) + b"tR"


def _identity(tensor: Any) -> Any:
    """What two tensors have in common that are one in memory, or in a file."""
    if isinstance(tensor, torch.Tensor) and tensor.numel():
        return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()
    if isinstance(tensor, LazyTensor) and tensor.nbytes:
        return tensor.parts, tensor.dtype, tensor.shape
    return id(tensor)


def _dtype(dtype: torch.dtype) -> bytes:
    if dtype not in _NAMES:
        raise TypeError(f"{dtype} is not written to a torch file")
    return f"ctorch\n{_NAMES[dtype]}\n".encode()


def _plain(value: int | float | str | bytes) -> bytes:
    if isinstance(value, bytes):  # as protocol 2 has no bytes: text, and the name of what makes bytes of it
        return b"c_codecs\nencode\n" + _plain(value.decode("latin-1")) + _plain("latin1") + b"\x86R"
    if isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(text)) + text
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


class _Zip:
    """Members one after another, sizes and checksums after each and in the directory at the end (zip64 where needed)."""

    def __init__(self) -> None:
        self.size = 0
        self._entries: list[bytes] = []

    def member(self, name: str, size: int, content: Iterator[Buffer]) -> Iterator[Buffer]:
        yield self._head(name, size)
        check = written = 0
        for block in content:
            view = memoryview(block).cast("B")
            for first in range(
                0, len(view), CHUNK
            ):  # hashed, summed and written while it is in the processor's cache
                piece = view[first : first + CHUNK]
                check, written = zlib.crc32(piece, check), written + len(piece)
                yield piece
        if written != size:
            raise TypeError(f"{written} bytes of {name} where {size} were announced")
        yield self._tail(name, size, check)

    def skip(self, name: str, size: int) -> None:
        """As if it had been written."""
        self._tail(name, size, 0)

    def _head(self, name: str, size: int) -> bytes:
        raw = f"{ROOT}{name}".encode()
        wide = struct.pack("<2H2Q", 1, 16, 0, 0) if size >= _WIDE else b""
        gap = -(self.size + 30 + len(raw) + len(wide) + 4) % ALIGNMENT
        extra = wide + struct.pack("<2H", 0x4246, gap) + b"\0" * gap
        fixed = struct.pack("<4s5H3I2H", b"PK\x03\x04", 45, 0x808, 0, 0, 33, 0, 0, 0, len(raw), len(extra))
        return fixed + raw + extra

    def _tail(self, name: str, size: int, check: int) -> bytes:
        """What stands behind a member, which is counted and listed now."""
        self._entries.append(_entry(f"{ROOT}{name}".encode(), self.size, size, check))
        tail = struct.pack("<4sI2Q" if size >= _WIDE else "<4s3I", b"PK\x07\x08", check, size, size)
        self.size += len(self._head(name, size)) + size + len(tail)
        return tail

    def directory(self) -> bytes:
        entries, count = b"".join(self._entries), len(self._entries)
        end = self.size + len(entries)
        record = struct.pack(
            "<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(entries), self.size
        )
        locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1)
        short = min(count, 0xFFFF)
        tail = struct.pack(
            "<4s4H2IH", b"PK\x05\x06", 0, 0, short, short, min(len(entries), _WIDE), min(self.size, _WIDE), 0
        )
        return entries + record + locator + tail


def _entry(raw: bytes, header: int, size: int, check: int) -> bytes:
    wide = [value for value in (size, size, header) if value >= _WIDE]
    extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    short = min(size, _WIDE)
    fields = (b"PK\x01\x02", 45, 45, 0x808, 0, 0, 33, check, short, short, len(raw), len(extra), 0, 0, 0, 0)
    return struct.pack("<4s6H3I5H2I", *fields, min(header, _WIDE)) + raw + extra
