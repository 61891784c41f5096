"""Opens files that torch.save wrote, of every version, without running them and without loading a tensor.

    zip (torch ≥ 1.6): data.pkl ─▶ machine ─▶ content, tensors point at data/0, data/1, … in the same file
    legacy: four pickles, the list of storages, then each one's bytes ─▶ the same
    any other pickle: content without tensors

Knows the layouts of these files. Every error is a `CheckpointError` that names the file and what to do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalith.checkpoint.files import regular_size
from megalith.checkpoint.pickles.archive import MAGIC, Archive
from megalith.checkpoint.pickles.machine import Machine
from megalith.checkpoint.pickles.source import (
    PickleError,
    Refused,
    Stream,
    Unreadable,
    Window,
    printable,
    shown,
)
from megalith.checkpoint.pickles.tensors import Storage
from megalith.checkpoint.pickles.world import Reading, Reference, measure
from megalith.errors import CheckpointError

MAX_PICKLE = 1 << 30
"""Bytes of the pickle of a zip file, tensors not included."""
LEGACY = 0x1950A86A20F9469CFC6C
"""The first value of a file of torch < 1.6."""
DAMAGED = "get the file again: a copy that was cut short or changed on the way cannot be mended"
UNSAFE = "`megalith checkpoint scan` lists every name in it; take the weights from somebody you trust, as safetensors"
UNPACK = "unpack it, and give the file or folder that is in it"
ENDIAN = "save it again on a little-endian machine (x86, ARM)"


@dataclass(frozen=True)
class Pickled:
    """`content` as saved, tensors as lazy ones; `globals`, every name that the pickle mentions; the file."""

    content: Any
    globals: tuple[str, ...]
    path: Path


def open_pickle(path: Path, *, offset: int = 0, length: int | None = None) -> Pickled:
    """The content of a torch file (or of one that lies at `offset` in a larger file), tensors left where they are.

    Raises `CheckpointError` for a damaged file, and for one that names anything that could run code.
    """
    path = path if isinstance(path, Path) else Path(path)

    def work(window: Window) -> Pickled:
        world, content = _content(window, path)
        measure(content)
        return Pickled(content, tuple(sorted(world.names)), path)

    return guarded(path, work, offset=offset, length=length)


def guarded(path: Path, work: Callable[[Window], Any], *, offset: int = 0, length: int | None = None) -> Any:
    """What `work` makes of a part of a file. Everything that can be wrong with bytes becomes a `CheckpointError`."""
    try:
        size = regular_size(path)
        length = size - offset if length is None else length
        if min(offset, length) < 0 or offset + length > size:
            raise PickleError(f"it is truncated: bytes {offset} to {offset + length} of {size}")
        with open(path, "rb", buffering=0) as file:
            return work(Window(file.fileno(), offset, length))
    except Refused as error:
        raise CheckpointError(f"refused: {error}", where=str(path), fix=UNSAFE) from None
    except Unreadable as error:
        raise CheckpointError(str(error), where=str(path), fix=error.fix) from None
    except OSError as error:
        raise CheckpointError(
            f"it cannot be read ({error.strerror or error})", where=str(path), fix="give a file"
        ) from None
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        what = (
            str(error)
            if isinstance(error, PickleError)
            else f"its pickle is malformed ({printable(str(error))})"
        )
        raise CheckpointError(what, where=str(path), fix=DAMAGED) from None


def _content(window: Window, path: Path) -> tuple[Reading, Any]:
    head = window.read(0, min(512, window.length))
    if head.startswith(MAGIC):
        return _zipped(window, path)
    if head[257:262] == b"ustar":
        raise Unreadable(
            "it is a tar archive (as torch wrote its files before 0.1.10, and NeMo its .nemo)", UNPACK
        )
    if head.startswith(b"\x1f\x8b"):
        raise Unreadable("it is compressed with gzip", UNPACK)
    stream = Stream(window)
    world = Reading(_no_storage)
    first = Machine(stream, world).run()
    if type(first) is int and first == LEGACY:
        return _legacy(window, path)
    if stream.left:
        raise PickleError(f"{stream.left} bytes follow its pickle")
    return world, first


def _no_storage(reference: Reference) -> Storage:
    raise PickleError(f"it refers to storage {shown(reference.key)}, which a plain pickle does not hold")


def _zipped(window: Window, path: Path) -> tuple[Reading, Any]:
    archive = Archive(window)
    roots = [name.removesuffix("data.pkl") for name in archive.members if name.endswith("/data.pkl")]
    if len(roots) != 1 or roots[0].count("/") != 1:
        raise Unreadable("it is a zip file, but not one of torch.save (no single data.pkl)", UNPACK)
    root = roots[0]
    if f"{root}constants.pkl" in archive.members:
        raise Unreadable(
            "it is a TorchScript program, not a checkpoint", "save its state_dict() with torch.save"
        )
    if f"{root}byteorder" in archive.members and archive.read(f"{root}byteorder", 16) != b"little":
        raise Unreadable("its numbers are in big-endian byte order", ENDIAN)

    def storage(reference: Reference) -> Storage:
        first, size = archive.place(f"{root}data/{reference.key}")
        if not 0 <= size - reference.nbytes < reference.dtype.itemsize:
            what = f"{size} bytes where its pickle says {reference.numel} {reference.dtype}"
            raise PickleError(f"storage {shown(reference.key)} has {what}")
        place = window.start + first
        return _viewed(Storage(path, f"data/{reference.key}", reference.dtype, place, size), reference)

    first, size = archive.place(f"{root}data.pkl")
    if size > MAX_PICKLE:
        raise PickleError(f"its pickle has {size} bytes, {MAX_PICKLE} are read at most")
    archive.verify(f"{root}data.pkl")
    world = Reading(storage)
    stream = Stream(window, first, first + size)
    content = Machine(stream, world).run()
    if stream.left:
        raise PickleError(f"{stream.left} bytes follow its pickle")
    return world, content


def _viewed(storage: Storage, reference: Reference) -> Storage:
    """The part of a storage that a view is."""
    if reference.view is None:
        return storage
    first, count = (number * reference.dtype.itemsize for number in reference.view)
    return Storage(storage.path, storage.name, storage.dtype, storage.offset + first, count)


def _legacy(window: Window, path: Path) -> tuple[Reading, Any]:
    """Reads the pickle twice: where its storages lie is only known after it."""
    stream = Stream(window)
    references: dict[str, Reference] = {}

    def note(reference: Reference) -> Storage:
        references[reference.key] = reference
        return _viewed(Storage(path, reference.key, reference.dtype, 0, reference.nbytes), reference)

    _, _, system = (Machine(stream, Reading(_no_storage)).run() for _ in range(3))
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Unreadable("its numbers are in big-endian byte order", ENDIAN)
    begin = stream.position
    Machine(stream, Reading(note)).run()
    places = _places(stream, Machine(stream, Reading(_no_storage)).run(), references)

    def storage(reference: Reference) -> Storage:
        place = window.start + places[reference.key]
        return _viewed(Storage(path, reference.key, reference.dtype, place, reference.nbytes), reference)

    world = Reading(storage)
    return world, Machine(Stream(window, begin), world).run()


def _places(stream: Stream, keys: Any, references: dict[str, Reference]) -> dict[str, int]:
    """Storage → its first byte: they follow one another, each after its number of elements. Nothing may follow them."""
    if not isinstance(keys, list) or sorted(keys) != sorted(references):
        raise PickleError("its list of storages is not that of its tensors")
    places: dict[str, int] = {}
    for key in keys:
        count = int.from_bytes(stream.take(8), "little", signed=True)
        if count != references[key].numel:
            raise PickleError(
                f"storage {shown(key)} has {count} elements where its pickle says {references[key].numel}"
            )
        places[key] = stream.position
        stream.skip(references[key].nbytes)
    if stream.left:
        raise PickleError(f"{stream.left} bytes follow its last storage")
    return places
