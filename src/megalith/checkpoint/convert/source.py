"""What is to be converted, whoever saved it: architecture, tensors under our names, optimizer state, tokenizer, files.

Knows our step folders and `open_foreign`. Opening reads no tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megalith.checkpoint.foreign import NATIVE, find, open_foreign
from megalith.checkpoint.formats.foreign import Foreign
from megalith.checkpoint.formats.nemo_archive import Temporary
from megalith.checkpoint.lazy import Lazy
from megalith.checkpoint.manifest import MANIFEST, TOKENIZER, read_manifest
from megalith.checkpoint.reading import read_config, read_state, read_tensors
from megalith.errors import CheckpointError
from megalith.models.config import ModelConfig
from megalith.models.family import understand

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam keeps of each parameter."""
BESIDE = (
    "config.json", "generation_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json",
    ".metadata", "metadata.json", "common.pt",
)  # fmt: skip
"""Files that hold no tensor and say what the tensors are."""


@dataclass(frozen=True)
class Optimizer:
    """`masters`: fp32 weights where the model's own are kept rounded, else empty; `moments`: NAME.exp_avg and so on, our names."""

    masters: Mapping[str, Lazy]
    moments: Mapping[str, Lazy]
    updates: int
    scale: float | None = None


@dataclass(frozen=True)
class Source:
    """`tensors` by our names without "model."; `inputs`: every file that is read; `known`: SHA-256 that some should have."""

    kind: str
    folder: Path
    family: str
    config: ModelConfig
    tensors: Mapping[str, Lazy]
    inputs: tuple[Path, ...]
    known: Mapping[Path, str] = field(default_factory=dict)
    optimizer: Optimizer | None = None
    tokenizer: Path | None = None
    state: Mapping[str, Any] = field(default_factory=dict)
    config_yaml: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    anew: str = ""
    """Why its answers mean nothing: it was saved without the layers that make them."""

    @property
    def is_native(self) -> bool:
        """Is it one of our own step folders?"""
        return self.kind == NATIVE

    @property
    def dtype(self) -> torch.dtype:
        """What most of its numbers are kept in."""
        return max(self.tensors.values(), key=lambda lazy: lazy.nbytes).dtype

    def masters(self, *, fix: str) -> Mapping[str, Lazy]:
        """The optimizer's fp32 weights; empty where it keeps none. Reads them all.

        Errors: `CheckpointError`, with this `fix`, where they do not round to the model's own: they are numbered in another
        order than ours.
        """
        masters = {} if self.optimizer is None else self.optimizer.masters
        for name, master in masters.items():
            kept = self.tensors[name]
            if not torch.equal(master.read().to(kept.dtype), kept.read()):
                raise CheckpointError(
                    f"the fp32 weights of its optimizer are not those of {name}: they are numbered in an unknown order",
                    where=str(self.folder),
                    fix=fix,
                )
        return masters


def open_source(
    path: str | Path, *, config_file: str | Path | None = None, tokenizer: str | Path | None = None
) -> Source:
    """Opens a checkpoint of any format. Errors: `CheckpointError` for damage and for models that ours cannot be like."""
    found = find(path)
    if found.is_native:
        return open_native(found.folder, None if tokenizer is None else Path(tokenizer))
    return of_foreign(open_foreign(found.folder, config_file=config_file, tokenizer=tokenizer))


def open_native(folder: Path, tokenizer: Path | None = None) -> Source:
    """A step folder of our own; hashes are compared with its manifest's when the conversion has read it."""
    state = read_state(folder)
    family = (state.get("architecture") or {}).get("family", "")
    _, config = understand(state, where=str(folder))
    tensors = {lazy.name.removeprefix("model."): lazy for lazy in read_tensors(folder)}
    records = read_manifest(folder).files
    own = folder / TOKENIZER
    return Source(
        NATIVE,
        folder,
        family,
        config,
        tensors,
        inputs=(*(folder / name for name in sorted(records)), folder / MANIFEST),
        known={folder / name: record.sha256 for name, record in records.items()},
        optimizer=_own_optimizer(folder, state, set(tensors)),
        tokenizer=tokenizer or (own if own.is_dir() else None),
        state=state,
        config_yaml=read_config(folder),
        provenance={"format": NATIVE, "step": state.get("step")},
    )


def _own_optimizer(folder: Path, state: Mapping[str, Any], names: set[str]) -> Optimizer | None:
    moments = {lazy.name.removeprefix("optim."): lazy for lazy in read_tensors(folder, "optim.")}
    if moments.keys() != {f"{name}.{moment}" for name in names for moment in MOMENTS}:
        return None
    updates, scale = (state.get("updates") or {}).get("step"), (state.get("scaler") or {}).get("scale")
    return Optimizer({}, moments, int(updates if updates is not None else state.get("step", 0)), scale)


def of_foreign(foreign: Foreign) -> Source:
    """What another program saved."""
    if not foreign.tensors:
        raise CheckpointError("it holds no tensors", where=str(foreign.path))
    used = {path for parts in foreign.parts.values() for lazy in parts for path in files_of(lazy)}
    if any(isinstance(path, Temporary) for path in used):
        used = {foreign.path}
    if foreign.path.is_dir():
        used |= {foreign.path / name for name in BESIDE if (foreign.path / name).is_file()}
    return Source(
        foreign.kind,
        foreign.path,
        foreign.family,
        foreign.config,
        foreign.tensors,
        inputs=tuple(sorted(used)),
        tokenizer=foreign.tokenizer,
        state=foreign.state,
        provenance=foreign.provenance,
        notices=foreign.notices,
        anew=f"{', '.join(sorted({name.partition('.')[0] for name in foreign.drawn}))} begin anew"
        if foreign.drawn
        else "",
    )


def files_of(lazy: Any) -> Iterator[Path]:
    """The files that a lazy tensor lies in, however it is put together."""
    if isinstance(lazy, Path):
        yield lazy
    elif isinstance(lazy, tuple | list):
        for each in lazy:
            yield from files_of(each)
    elif dataclasses.is_dataclass(lazy):
        for each in dataclasses.fields(lazy):
            yield from files_of(getattr(lazy, each.name))
