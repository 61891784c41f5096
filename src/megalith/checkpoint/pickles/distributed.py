"""Folders of torch's distributed checkpoints, megatron-core's `torch_dist` among them, without running their pickles.

    .metadata (a pickle: tensors, their chunks, where each lies) ─▶ __0_0.distcp, … (torch files one after another)
    common.pt, metadata.json (megatron-core only)

Knows the layout of these folders. Knows no model: names of tensors and objects are those of the folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megalith.checkpoint.lazy import Lazy
from megalith.checkpoint.pickles.assembled import Assembled
from megalith.checkpoint.pickles.reader import DAMAGED, Pickled, open_pickle
from megalith.checkpoint.pickles.source import PickleError, shown
from megalith.checkpoint.pickles.stub import Stub
from megalith.checkpoint.pickles.tensors import StridedTensor
from megalith.checkpoint.slices import Slice, problem
from megalith.checkpoint.tensor_files import LazyTensor, Part
from megalith.errors import CheckpointError

METADATA = ".metadata"
COMMON, SETTINGS = "common.pt", "metadata.json"
Key = tuple[str, tuple[int, ...] | None]
"""Name, and for a chunk its first index along each dim."""


@dataclass(frozen=True)
class Item:
    """A torch file inside a .distcp."""

    path: Path
    offset: int
    length: int

    def open(self) -> Pickled:
        """Its content. Raises `CheckpointError`."""
        return open_pickle(self.path, offset=self.offset, length=self.length)


class Objects(Mapping[str, Any]):
    """Everything that is no tensor, each read when asked for: one that is refused does not keep the tensors from being read."""

    def __init__(self, items: Mapping[str, Item]) -> None:
        self._items = items

    def __getitem__(self, name: str) -> Any:
        return self._items[name].open().content

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


@dataclass(frozen=True)
class Distributed:
    """`tensors` by name, whole; `objects` by name; what megatron-core adds: `common` (common.pt) and `settings` (metadata.json)."""

    tensors: dict[str, Lazy]
    objects: Mapping[str, Any]
    common: Any
    settings: dict[str, Any]


def is_distributed(folder: Path) -> bool:
    """Whether a folder is one of torch's distributed checkpoints."""
    return (Path(folder) / METADATA).is_file()


def open_distributed(folder: Path) -> Distributed:
    """The tensors of a distributed checkpoint, each assembled of its chunks when it is read, and its objects.

    Raises `CheckpointError` where a chunk is missing or is not what the metadata says of it.
    """
    folder = Path(folder)
    settings = _settings(folder / SETTINGS)
    metadata = open_pickle(folder / METADATA).content
    tensors: dict[str, Lazy] = {}
    objects: dict[str, Item] = {}
    with _checked(folder):
        entries = _stub(metadata, "Metadata").value("state_dict_metadata")
        items = _items(folder, _stub(metadata, "Metadata").value("storage_data"))
        for name, entry in entries.items():
            if _stub(entry).name == "BytesStorageMetadata":
                objects[name] = items[name, None]
            else:
                tensors[name] = _tensor(name, _stub(entry, "TensorStorageMetadata"), items)
    common = open_pickle(folder / COMMON).content if (folder / COMMON).is_file() else None
    return Distributed(tensors, Objects(objects), common, settings)


def items_of(folder: Path) -> list[Item]:
    """Every torch file that the metadata of a folder refers to. Raises `CheckpointError`."""
    metadata = open_pickle(folder / METADATA).content
    with _checked(folder):
        return list(_items(folder, _stub(metadata, "Metadata").value("storage_data")).values())


@contextmanager
def _checked(folder: Path) -> Iterator[None]:
    """What malformed metadata raises becomes a `CheckpointError`."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        what = str(error) if isinstance(error, PickleError) else f"its list of tensors is malformed ({error})"
        raise CheckpointError(what, where=str(folder / METADATA), fix=DAMAGED) from None


def _settings(path: Path) -> dict[str, Any]:
    """metadata.json. Raises `CheckpointError` for a backend other than torch_dist."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
        backend = found["sharded_backend"]
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise CheckpointError(
            f"it is not JSON with a sharded_backend ({error})", where=str(path), fix=DAMAGED
        ) from None
    if backend != "torch_dist":
        fix = "save it again with --dist-ckpt-format torch_dist"
        raise CheckpointError(
            f"its tensors are in the format {shown(backend)}, torch_dist is read", where=str(path), fix=fix
        )
    return dict(found)


def _stub(value: Any, name: str | None = None) -> Stub:
    if not isinstance(value, Stub) or (name is not None and not value.name.endswith(name)):
        raise PickleError(f"it holds {shown(value)} where a {name or 'class'} is expected")
    return value


def _items(folder: Path, storage: Any) -> dict[Key, Item]:
    """Where each chunk and object lies."""
    items: dict[Key, Item] = {}
    for key, info in storage.items():
        index, place = _stub(key, "MetadataIndex"), _stub(info, "_StorageInfo")
        file, offset, length = (place.value(each) for each in ("relative_path", "offset", "length"))
        if place.value("transform_descriptors"):
            raise PickleError(
                f"{shown(index.value('fqn'))} is compressed or otherwise transformed, which is not read"
            )
        if (
            not isinstance(file, str)
            or file != Path(file).name
            or type(offset) is not int
            or type(length) is not int
        ):
            raise PickleError(f"it refers to {shown(file)}, which is no file of its folder")
        first = index.value("offset")
        items[index.value("fqn"), None if first is None else tuple(first)] = Item(
            folder / file, offset, length
        )
    return items


def _tensor(name: str, entry: Stub, items: Mapping[Key, Item]) -> Lazy:
    shape, chunks = entry.value("size"), entry.value("chunks")
    dtype = _stub(entry.value("properties")).state[0]
    if not isinstance(dtype, torch.dtype) or not isinstance(shape, tuple):
        raise PickleError(f"{name} is described as {shown(dtype)} {shown(shape)}")
    pieces: dict[Slice, Lazy] = {}
    for chunk in chunks:
        first, sizes = _stub(chunk).value("offsets"), _stub(chunk).value("sizes")
        place = tuple((a, a + n) for a, n in zip(first, sizes, strict=True))
        if place not in pieces:  # some writers list replicas
            pieces[place] = _piece(name, items[name, first], dtype, sizes)
    missing = "" if math.prod(shape) == 0 else problem(shape, pieces)
    if missing:
        raise PickleError(f"{name}: {missing}")
    return _joined(name, dtype, shape, pieces)


def _piece(name: str, item: Item, dtype: torch.dtype, sizes: tuple[int, ...]) -> Lazy:
    lazy = item.open().content
    if not isinstance(lazy, (LazyTensor, StridedTensor)):
        raise PickleError(f"{name} is {shown(lazy)} in {item.path.name}, not a tensor")
    if lazy.dtype != dtype or math.prod(lazy.shape) != math.prod(sizes):
        raise PickleError(
            f"{name} is {lazy.dtype} {list(lazy.shape)} in {item.path.name}, not {dtype} {list(sizes)}"
        )
    return lazy


def _joined(name: str, dtype: torch.dtype, shape: tuple[int, ...], pieces: Mapping[Slice, Lazy]) -> Lazy:
    if math.prod(shape) == 0:
        return LazyTensor(name, dtype, shape, ())
    if len(pieces) == 1:
        (only,) = pieces.values()
        if isinstance(only, StridedTensor) and only.shape == shape:
            return replace(only, name=name)
    if all(isinstance(piece, LazyTensor) for piece in pieces.values()):
        parts = [
            Part(part.path, part.offset, place)
            for place, piece in pieces.items()
            if isinstance(piece, LazyTensor)
            for part in piece.parts
        ]
        return LazyTensor(name, dtype, shape, tuple(parts))
    return Assembled(name, dtype, shape, tuple(pieces.items()))
