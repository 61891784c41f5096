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
from megalith.checkpoint.local import held
from megalith.checkpoint.manifest import MANIFEST
from megalith.checkpoint.open import resolve
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
        if (given / MANIFEST).exists():
            return None
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


def load(foreign: Foreign, tensors: Mapping[str, torch.Tensor], *, team: Team | None = None) -> None:
    """Fills `tensors` (`model.…`, any dtype; of a DTensor what this process holds) with a foreign model's weights.

    Names and shapes are compared first, on every process; where anything differs, `CheckpointError` lists it and no tensor was
    touched. Processes that hold different tensors give the `team` that they load with, and call this together.
    """
    team = team or Team()
    here = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in here.items()}
    everywhere: dict[str, tuple[int, ...]] = {}
    for found in team.together(lambda: shapes):
        everywhere.update(found)
    team.together(lambda: _refuse_differences(foreign, everywhere))

    def fill() -> None:
        for name, mine in held(here).items():
            foreign.tensors[name].fill(mine)

    team.together(fill)


def _refuse_differences(foreign: Foreign, here: Mapping[str, tuple[int, ...]]) -> None:
    saved = {name: mapped.shape for name, mapped in foreign.tensors.items()}
    lines = [
        f"{name}: {_words(saved.get(name))} in the checkpoint, {_words(here.get(name))} here"
        for name in sorted(saved.keys() | here.keys())
        if saved.get(name) != here.get(name)
    ]
    if lines:
        raise CheckpointError(
            "\n    ".join(["its tensors do not fit this model; nothing was loaded", *lines]),
            where=str(foreign.path),
            fix="set the model's keys to what the checkpoint holds",
        )


def _words(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else str(list(shape))
