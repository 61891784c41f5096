"""Reads a step folder: verified first, then straight into live tensors, or lazily, tensor by tensor.

    any number of files, whoever wrote them ─ slices that this process needs ─▶ its part of each live tensor

Knows the files of a step folder and tensors by name. Never touches a tensor before everything that will be read is known to
be right, on every process, and never changes the disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megalith.checkpoint.header import Entry, Header, read_header
from megalith.checkpoint.local import held
from megalith.checkpoint.manifest import (
    CONFIG,
    STATE,
    THREADS,
    Manifest,
    ManifestError,
    TensorRecord,
    entry_name,
    read_manifest,
    verify,
)
from megalith.checkpoint.slices import shape_of
from megalith.checkpoint.team import Team
from megalith.checkpoint.tensor_files import DTYPES, LazyTensor, Part, describe
from megalith.errors import CheckpointError

ANOTHER = "load another step of the run (give the run folder, and the newest whole one is taken)"


def load(
    folder: Path, tensors: Mapping[str, torch.Tensor], *, verified: bool = False, team: Team | None = None
) -> dict[str, Any]:
    """Fills `tensors` in place from a step folder, whatever layout saved it, and returns its state.

    Of a DTensor, what this process holds is filled; processes that hold different tensors give the `team` that they load
    with, and call this together. The kinds present in `tensors` (`model.…`, `optim.…`) must be all that the folder holds of
    those kinds: give the model's alone to take the weights and leave the optimizer. The files that will be read are verified
    first (`verified=True` says that `newest_verified` just did), by each process a share, and every name, dtype and shape is
    compared; where anything differs, `CheckpointError` lists it, on every process, and no tensor was touched.
    """
    folder, team = Path(folder), team or Team()
    here = _merged(team.together(lambda: {name: describe(tensor) for name, tensor in tensors.items()}))
    kinds = {_kind(name) for name in here}

    def check() -> list[str]:
        files = _files(_manifest(folder).tensors, kinds) | {STATE, CONFIG}
        threads = max(1, THREADS // team.size)
        return [] if verified else verify(folder, only=files, share=(team.rank, team.size), threads=threads)

    _refuse_damage(folder, [problem for found in team.together(check) for problem in found])
    manifest = _manifest(folder)
    _refuse_differences(folder, {n: r for n, r in manifest.tensors.items() if _kind(n) in kinds}, here)
    sources: dict[str, LazyTensor] = {}
    state: dict[str, Any] = {}

    def prepare() -> None:
        state.update(read_state(folder))
        sources.update(_sources(folder, manifest, tensors))

    def fill() -> None:
        for name, mine in held(tensors).items():
            sources[name].fill(mine)

    team.together(prepare)
    team.together(fill)
    return state


def _kind(name: str) -> str:
    return name.partition(".")[0]


Described = tuple[str, tuple[int, ...]]
"""dtype as safetensors names it, shape."""


def _merged(everyone: Iterable[Mapping[str, Described]]) -> dict[str, Described]:
    """What all processes hold together."""
    merged: dict[str, Described] = {}
    for found in everyone:
        for name, described in found.items():
            if merged.setdefault(name, described) != described:
                raise ValueError(f"{name} is {described} on one process, {merged[name]} on another")
    return merged


def _files(tensors: Mapping[str, TensorRecord], kinds: set[str]) -> set[str]:
    return set().union(*(record.files for name, record in tensors.items() if _kind(name) in kinds))


def _refuse_damage(folder: Path, problems: list[str]) -> None:
    if problems:
        lines = list(dict.fromkeys(problems))  # what several processes saw is said once
        raise CheckpointError(
            "\n    ".join(["the checkpoint is damaged; nothing was loaded", *lines]),
            where=str(folder),
            fix=ANOTHER,
        )


def _refuse_differences(
    folder: Path, saved: Mapping[str, TensorRecord], here: Mapping[str, Described]
) -> None:
    lines = [
        _difference(name, saved.get(name), here.get(name)) for name in sorted(saved.keys() | here.keys())
    ]
    lines = [line for line in lines if line]
    if not lines:
        return
    without = {_kind(name) for name in here} - {_kind(name) for name in saved}
    fix = "load it with the configuration it was saved with (config.yaml in its folder)"
    if without == {"optim"}:
        fix = "it holds no optimizer state (never saved, or dropped to save disk): take the weights alone with model.init_from"
    count = f"{len(lines)} tensor{'s do' if len(lines) > 1 else ' does'} not fit this model"
    raise CheckpointError("\n    ".join([f"{count}; nothing was loaded", *lines]), where=str(folder), fix=fix)


def _difference(name: str, record: TensorRecord | None, here: Described | None) -> str:
    if record is None:
        return f"{name}: not in the checkpoint"
    if here is None:
        return f"{name}: in the checkpoint only"
    saved, wanted = _words(record.dtype, record.shape), _words(*here)
    return "" if saved == wanted else f"{name}: {saved} in the checkpoint, {wanted} here"


def _words(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{str(DTYPES[dtype]).removeprefix('torch.')} {list(shape)}"


def _manifest(folder: Path) -> Manifest:
    try:
        return read_manifest(folder)
    except ManifestError as error:
        raise CheckpointError(
            str(error),
            where=str(folder),
            fix="give a run folder, its checkpoints folder or a complete step folder",
        ) from error


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a step folder: step, consumed samples and tokens, and whatever else the run saved."""
    try:
        content = json.loads(_text(Path(folder), STATE))
    except ValueError as error:
        raise CheckpointError(f"{STATE} is not JSON ({error})", where=str(folder), fix=ANOTHER) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{STATE} is not an object", where=str(folder), fix=ANOTHER)
    return content


def read_config(folder: Path) -> str:
    """`config.yaml` of a step folder, as text."""
    return _text(Path(folder), CONFIG).decode()


def _text(folder: Path, name: str) -> bytes:
    """A small file of a step folder, checked against the manifest's hash."""
    record = _manifest(folder).files[name]
    try:
        content = (folder / name).read_bytes()
    except OSError as error:
        what = f"{name} cannot be read ({error.strerror or error})"
        raise CheckpointError(what, where=str(folder), fix=ANOTHER) from error
    if hashlib.sha256(content).hexdigest() != record.sha256:
        what = f"{name} is damaged: its content changed since it was saved"
        raise CheckpointError(what, where=str(folder), fix=ANOTHER)
    return content


def read_tensors(folder: Path, prefix: str = "model.") -> Iterator[LazyTensor]:
    """The tensors of a step folder whose names start with `prefix`, by name, each read only when asked (`.read()`, `.rows(…)`).

    Hashes are not checked: call `verify` first where that matters. Raises `CheckpointError` for a malformed file.
    """
    folder = Path(folder)
    manifest = _manifest(folder)
    chosen = sorted(name for name in manifest.tensors if name.startswith(prefix))
    yield from _sources(folder, manifest, chosen).values()


def _sources(folder: Path, manifest: Manifest, names: Iterable[str]) -> dict[str, LazyTensor]:
    """Where tensors lie: each of their slices, looked up in the head of its file. Raises `CheckpointError`."""
    headers: dict[str, Header] = {}
    found: dict[str, LazyTensor] = {}
    for name in names:
        record, parts = manifest.tensors[name], []
        for place, file in record.slices.items():
            if file not in headers:
                headers[file] = _header(folder, file)
            entry = headers[file].entries.get(entry_name(name, place, record.shape))
            if entry is None or not _same(entry, record, shape_of(place)):
                raise CheckpointError(f"{file} does not hold {name} as saved", where=str(folder), fix=ANOTHER)
            parts.append(Part(folder / file, headers[file].data + entry.start, place))
        found[name] = LazyTensor(name, DTYPES[record.dtype], record.shape, tuple(parts))
    return found


def _same(entry: Entry, record: TensorRecord, shape: tuple[int, ...]) -> bool:
    return (entry.dtype, entry.shape) == (record.dtype, shape)


def _header(folder: Path, file: str) -> Header:
    try:
        return read_header(folder / file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}", where=str(folder), fix=ANOTHER) from error
