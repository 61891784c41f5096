"""NeMo's archives of models, as models of ours: tar, gzip, unpacked; one process's, tensor-parallel, pipeline-parallel.

    nemo_archive ─ members ─▶ nemo_read ─ tensors by Megatron's names ─┐
    model_config.yaml ─ nemo_config ─ Megatron's arguments ────────────┴─▶ megatron.understand_files ─▶ Foreign

From NeMo 1.0 to 1.20, whose models are Megatron-LM's or megatron-core's. Knows which member is what.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megalith.checkpoint.formats.foreign import Foreign
from megalith.checkpoint.formats.megatron import understand_files
from megalith.checkpoint.formats.megatron_read import Read, tree_of
from megalith.checkpoint.formats.megatron_told import Told
from megalith.checkpoint.formats.nemo_archive import WEIGHTS, Archive, is_archive, open_archive
from megalith.checkpoint.formats.nemo_config import CONFIG, arguments, family_of, read_model_config
from megalith.checkpoint.formats.nemo_read import (
    CURRENT,
    Weights,
    in_grid,
    left_behind,
    open_member,
    places_of,
    weights_of,
)
from megalith.checkpoint.formats.nemo_tokenizer import find_own
from megalith.errors import CheckpointError

KIND = "nemo"
VERSION = "megatron_checkpoint_version.json"
"""checkpoint_version of the encoder, in archives of NeMo 1.0 to 1.4."""
ENCODER = "_encoder_config.json"
"""Sizes of the encoder, in the same archives; the name of the pretrained model stands before it."""


def locate(path: Path) -> Path | None:
    """The archive or the unpacked folder that a path means; None for anything else."""
    if path.is_file():
        if is_archive(path):
            return path.resolve()
        path = path.parent.parent if path.name == WEIGHTS and path.parent.name != "" else path.parent
        path = path if (path / CONFIG).is_file() else path.parent
    folder = path if (path / CONFIG).is_file() else path.parent
    inside = path.is_dir() and (folder / CONFIG).is_file() and any(folder.rglob(WEIGHTS))
    return folder.resolve() if inside else None


def open_nemo(path: Path, told: Told) -> Foreign:
    """The model of an archive; no tensor is read.

    Errors: `CheckpointError` for damage, for missing ranks, and by name for what our models cannot be like.
    """
    archive = open_archive(path)
    keys = read_model_config(archive.read(CONFIG), where=archive.where(CONFIG))
    weights = _weights(archive)
    args = arguments(keys | _encoder(archive), where=archive.where(CONFIG))
    tokenizer, said = find_own(archive, keys.get("tokenizer"))
    read = Read(
        weights.tensors,
        {"args": args, "checkpoint_version": _version(archive, keys)},
        tree_of(weights.tensors),
        weights.sizes,
        CONFIG,
        tokenizer,
    )
    foreign = understand_files(path, read, told)
    about = {"format": KIND, "target": keys.get("target"), "nemo_version": keys.get("nemo_version")}
    return replace(
        foreign,
        kind=KIND,
        family=_family(foreign.family, keys, where=archive.where(CONFIG)),
        provenance={**foreign.provenance, **about},
        notices=(*foreign.notices, *said, *left_behind(weights)),
    )


def _family(seen: str, keys: Mapping[str, Any], *, where: str) -> str:
    """What the target says, where the tensors agree: a BART's are named as a T5's."""
    said = family_of(keys.get("target"))
    if said in (None, seen) or (said, seen) == ("bart", "t5"):
        return said or seen
    raise CheckpointError(
        f"it is a {seen.upper()} by its tensors, {keys.get('target')} by its target", where=where
    )


def _weights(archive: Archive) -> Weights:
    places = places_of(archive)
    if not places:
        apart = any(name.startswith("model_weights/") for name in archive.members)
        raise CheckpointError(
            "its weights are in the distributed format (model_weights/)"
            if apart
            else f"there is no {WEIGHTS} in it",
            where=str(archive.path),
            fix="unpack it, and give its folder model_weights"
            if apart
            else "give an archive of a NeMo model of 1.0 to 1.20",
        )
    names = in_grid(places, where=str(archive.path))
    states = [[open_member(archive, name) for name in stage] for stage in names]
    return weights_of(states, [[archive.where(name) for name in stage] for stage in names])


def _version(archive: Archive, keys: Mapping[str, Any]) -> Any:
    if VERSION in archive.members:
        return _json(archive, VERSION).get("checkpoint_version", 0)
    return 0 if keys.get("megatron_legacy") else CURRENT


def _encoder(archive: Archive) -> dict[str, Any]:
    """What an older archive says of the encoder, and how NeMo of its time computed it: without fused GELU."""
    name = next((name for name in archive.members if name.endswith(ENCODER)), None)
    if name is None:
        return {}
    said = {str(key).replace("-", "_"): value for key, value in _json(archive, name).items()}
    return {"bias_gelu_fusion": False, **said}


def _json(archive: Archive, name: str) -> dict[str, Any]:
    try:
        content = json.loads(archive.read(name))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not JSON ({error})", where=archive.where(name)) from None
    if not isinstance(content, dict):
        raise CheckpointError("is not a JSON object", where=archive.where(name))
    return content
