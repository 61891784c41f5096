"""Reads a step folder: verified first, then straight into live tensors, or lazily, tensor by tensor.

Knows the files of a step folder and tensors by name. Never touches a tensor before everything that will be read is known to
be right, and never changes the disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megalith.checkpoint.manifest import (
    CONFIG,
    STATE,
    Manifest,
    ManifestError,
    TensorRecord,
    read_manifest,
    verify,
)
from megalith.checkpoint.tensor_files import DTYPES, LazyTensor, open_tensors
from megalith.errors import CheckpointError

ANOTHER = "load another step of the run (give the run folder, and the newest whole one is taken)"


def load(folder: Path, tensors: Mapping[str, torch.Tensor], *, verified: bool = False) -> dict[str, Any]:
    """Fills `tensors` in place from a step folder, and returns its state.

    The kinds present in `tensors` (`model.…`, `optim.…`) must be all that the folder holds of those kinds: give the model's
    alone to take the weights and leave the optimizer. The files that will be read are verified first (`verified=True` says that
    `newest_verified` just did) and every name, dtype and shape is compared; where anything differs, `CheckpointError` lists it
    and no tensor was touched.
    """
    folder = Path(folder)
    manifest = _manifest(folder)
    kinds = {_kind(name) for name in tensors}
    wanted = {name: record for name, record in manifest.tensors.items() if _kind(name) in kinds}
    files = {record.file for record in wanted.values()}
    if not verified:
        _require_verified(folder, files)
    _refuse_differences(folder, wanted, tensors)
    state = read_state(folder)
    sources = {source.name: source for file in sorted(files) for source in _open(folder, file)}
    for name, tensor in tensors.items():
        sources[name].read_into(tensor)
    return state


def _kind(name: str) -> str:
    return name.partition(".")[0]


def _require_verified(folder: Path, files: set[str]) -> None:
    problems = verify(folder, only=files | {STATE, CONFIG})
    if problems:
        raise CheckpointError(
            "\n    ".join(["the checkpoint is damaged; nothing was loaded", *problems]),
            where=str(folder),
            fix=ANOTHER,
        )


def _refuse_differences(
    folder: Path, saved: Mapping[str, TensorRecord], tensors: Mapping[str, torch.Tensor]
) -> None:
    lines = [
        _difference(name, saved.get(name), tensors.get(name))
        for name in sorted(saved.keys() | tensors.keys())
    ]
    lines = [line for line in lines if line]
    if not lines:
        return
    without = {_kind(name) for name in tensors} - {_kind(name) for name in saved}
    fix = "load it with the configuration it was saved with (config.yaml in its folder)"
    if without == {"optim"}:
        fix = "it holds no optimizer state (never saved, or dropped to save disk): take the weights alone with model.init_from"
    count = f"{len(lines)} tensor{'s do' if len(lines) > 1 else ' does'} not fit this model"
    raise CheckpointError("\n    ".join([f"{count}; nothing was loaded", *lines]), where=str(folder), fix=fix)


def _difference(name: str, record: TensorRecord | None, tensor: torch.Tensor | None) -> str:
    if record is None:
        return f"{name}: not in the checkpoint"
    if tensor is None:
        return f"{name}: in the checkpoint only"
    saved, here = _words(DTYPES[record.dtype], record.shape), _words(tensor.dtype, tuple(tensor.shape))
    return "" if saved == here else f"{name}: {saved} in the checkpoint, {here} here"


def _words(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


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
    chosen = {
        name: record.file for name, record in _manifest(folder).tensors.items() if name.startswith(prefix)
    }
    found = {source.name: source for file in sorted(set(chosen.values())) for source in _open(folder, file)}
    for name in sorted(chosen):
        if name not in found:
            raise CheckpointError(f"{chosen[name]} holds no {name}", where=str(folder), fix=ANOTHER)
        yield found[name]


def _open(folder: Path, file: str) -> list[LazyTensor]:
    try:
        return list(open_tensors(folder / file))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}", where=str(folder), fix=ANOTHER) from error
