"""A checkpoint of any format as `restore_from` needs it: architecture, the keys of its own configuration, its tokenizer.

    path or published name ─ find ─▶ .nemo, .ckpt, a folder of ours, of Megatron's or of transformers' ─▶ Archive

Opens files; reads no tensor. Which keys mean something here, `configuration` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megalith.checkpoint.foreign import find, open_foreign
from megalith.checkpoint.formats import nemo
from megalith.checkpoint.formats.foreign import Foreign
from megalith.checkpoint.formats.nemo_archive import open_archive
from megalith.checkpoint.formats.nemo_config import CONFIG, read_model_config
from megalith.checkpoint.manifest import TOKENIZER
from megalith.checkpoint.reading import read_config, read_state
from megalith.hub.obtain import resolve as published
from megalith.models.config import ModelConfig
from megalith.models.family import ARCHITECTURE, understand


@dataclass(frozen=True)
class Archive:
    """`keys`: the section `model` of its own configuration, in whoever's words; `tokens`: what `load_tokenizer` opens."""

    folder: Path
    family: str
    architecture: ModelConfig
    keys: Mapping[str, Any]
    tokens: Path | None
    notices: tuple[str, ...] = ()
    opened: Foreign | None = None
    """Keeps the temporary files of a `.nemo` as long as this is there."""


def open_any(path: str | Path) -> Archive:
    """Errors: `CheckpointError` for what is not there, is damaged, or holds no model that this version knows."""
    found = find(published(path))
    if not found.is_native:
        foreign = open_foreign(found.folder)
        keys = _nemo_keys(found.folder) if found.kind == nemo.KIND else {}
        return Archive(
            found.folder, foreign.family, foreign.config, keys, foreign.tokenizer, foreign.notices, foreign
        )
    state = read_state(found.folder)
    _, architecture = understand(state, where=str(found.folder))
    tokens = found.folder / TOKENIZER
    content = yaml.safe_load(read_config(found.folder)) or {}
    return Archive(
        found.folder,
        state[ARCHITECTURE]["family"],
        architecture,
        content.get("model") or {},
        tokens if tokens.is_dir() else None,
    )


def _nemo_keys(path: Path) -> dict[str, Any]:
    archive = open_archive(path)
    return read_model_config(archive.read(CONFIG), where=archive.where(CONFIG))
