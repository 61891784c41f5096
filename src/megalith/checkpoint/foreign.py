"""What other programs saved, known by its content: one way in for every format.

    path ─ find ─▶ a step folder of our own, or a folder or file of another format
    open_foreign ─▶ Foreign: config and lazy tensors under our names ─ load ─▶ what this process holds of a live model

Knows which formats there are; each knows its own files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalith.checkpoint.formats import huggingface, megatron, megatron_files, nemo, nemo_lightning
from megalith.checkpoint.formats.foreign import Foreign
from megalith.checkpoint.formats.megatron_told import Told
from megalith.checkpoint.layout import step_folders
from megalith.checkpoint.local import held
from megalith.checkpoint.manifest import MANIFEST
from megalith.checkpoint.open import CHECKPOINTS, resolve
from megalith.checkpoint.team import Team
from megalith.errors import CheckpointError
from megalith.hub.obtain import resolve as published
from megalith.hub.store import published_config

NATIVE = "native"


@dataclass(frozen=True)
class Found:
    """`kind` says which format, `folder` where: a step folder, a Megatron iteration, a folder of transformers, or a file."""

    kind: str
    folder: Path

    @property
    def is_native(self) -> bool:
        """Is it one of our own step folders?"""
        return self.kind == NATIVE


_FORMATS: tuple[tuple[str, Callable[[Path], Path | None]], ...] = (
    ("huggingface", huggingface.locate),
    (nemo.KIND, nemo.locate),
    (nemo_lightning.KIND, nemo_lightning.locate),
    ("megatron", megatron_files.locate),
)


def find(path: str | Path) -> Found:
    """What a path that somebody typed leads to; of a Megatron root, the iteration that its tracker names. A published name
    (`megalith hub list`) where nothing lies stands for that model, which is fetched if need be.

    Errors: `CheckpointError` with near names, or with what is there instead and what could be.
    """
    path = published(path)
    return _look(path) or Found(NATIVE, resolve(path))


def recognise(path: str | Path) -> str | None:
    """The format of another program that a file or folder is in, by its content; None for our own and for anything else."""
    found = _look(path)
    return None if found is None else found.kind


def _look(path: str | Path) -> Found | None:
    given = Path(path).expanduser()
    if "\0" in str(given):
        raise CheckpointError("is no path", where=repr(str(path)))
    try:
        if (given / MANIFEST).exists() or any(step_folders(each) for each in (given, given / CHECKPOINTS)):
            return None  # a run that another program began and that went on here is ours
        for kind, locate in _FORMATS:
            if (folder := locate(given)) is not None:
                return Found(kind, folder)
    except OSError as error:
        what = f"cannot be looked into ({error.strerror or error})"
        raise CheckpointError(what, where=str(given), fix="see that you may read it") from None
    return None


def open_foreign(
    path: str | Path,
    *,
    config_file: str | Path | Mapping[str, Any] | None = None,
    vocab_size: int | None = None,
    tokenizer: str | Path | None = None,
) -> Foreign:
    """Opens what another program saved; no tensor is read.

    What the files do not say, `config_file` does: JSON or YAML with Megatron's names (hyphens as on its command line), or the
    values themselves; of a published model, the catalogue.
    `vocab_size`, or the `tokenizer`'s, is the true vocabulary of a padded table.
    Errors: `CheckpointError` for damage, for what is missing, and by name for what our models cannot be like.
    """
    found = find(path)
    if found.kind == "huggingface":
        return huggingface.open_folder(found.folder)
    if found.kind in (nemo.KIND, nemo_lightning.KIND):
        opener = nemo.open_nemo if found.kind == nemo.KIND else nemo_lightning.open_lightning
        return opener(found.folder, Told.of(config_file, vocab_size, tokenizer))
    if found.kind == "megatron":
        facts = published_config(found.folder) if config_file is None else config_file
        return megatron.open_files(found.folder, Told.of(facts, vocab_size, tokenizer))
    raise CheckpointError("is a checkpoint of Megalith's own", where=str(path))


def load(
    foreign: Foreign, tensors: Mapping[str, torch.Tensor], *, team: Team | None = None, strict: bool = True
) -> list[str]:
    """Fills `tensors` (`model.…`, any dtype; of a DTensor what this process holds) with a foreign model's weights: see `fill`."""
    team, sources = team or Team(), {}
    team.together(lambda: sources.update({f"model.{name}": one for name, one in foreign.tensors.items()}))
    return fill(sources, tensors, where=str(foreign.path), team=team, strict=strict)


def fill(
    sources: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    where: str,
    team: Team | None = None,
    strict: bool = True,
) -> list[str]:
    """Fills live `tensors` from `sources` of the same names, each of which has a `shape` and fills what it is given.

    Names and shapes are compared first, on every process; where anything differs, `CheckpointError` lists it and no tensor was
    touched. Not `strict`: names that only one side has are left alone, and told. Processes that hold different tensors give the
    `team` that they load with, and call this together.
    """
    team = team or Team()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    here: dict[str, tuple[int, ...]] = {}
    for found in team.together(lambda: shapes):
        here.update(found)
    saved = {name: tuple(source.shape) for name, source in sources.items()}
    left = [] if strict else sorted(saved.keys() ^ here.keys())
    lines = [
        f"{name.removeprefix('model.')}: {_words(saved.get(name))} in the checkpoint, {_words(here.get(name))} here"
        for name in sorted(saved.keys() | here.keys())
        if saved.get(name) != here.get(name) and name not in left
    ]
    if lines:
        raise CheckpointError(
            "\n    ".join(["its tensors do not fit this model; nothing was loaded", *lines]),
            where=where,
            fix="set the model's keys to what the checkpoint holds",
        )

    def read() -> None:
        for name, mine in held({name: t for name, t in tensors.items() if name not in left}).items():
            sources[name].fill(mine)

    team.together(read)
    return [f"{name}: {'begins anew' if name in here else 'left out'}" for name in left]


def _words(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else str(list(shape))
