"""An adapter in another program's files, or ours: checked against the base model that it belongs to, and there as a whole or not.

    native    one folder, the tags of all that was given in one table
    peft      soft prompts: a folder for each tag; LoRA: one folder
    nemo      the whole base model with the soft prompts in it

Knows who writes what. Computes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megalith.adapt.adapter import WITH_TAGS, Adapter, Base, check_base
from megalith.adapt.artefact import save
from megalith.adapt.fingerprint import fingerprint
from megalith.adapt.nemo import write_nemo
from megalith.adapt.peft import write_peft
from megalith.adapt.peft_lora import write_peft_lora
from megalith.checkpoint.convert.source import Source, open_source
from megalith.checkpoint.convert.target import publishing
from megalith.errors import CheckpointError

FORMATS = ("native", "peft", "nemo")
POSITIONS = ("position_embedding.weight", "encoder.position_embedding.weight")
"""Our names of the learned positions of the text that a model reads first."""
_ODD = re.compile(r"[^\w.-]+")


def export(
    adapter: Adapter,
    target: str | Path,
    to: str,
    base: str | Path,
    *,
    ranks: int = 1,
    force: bool = False,
    opening: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Writes it to `target`, which must not exist (native: may be an adapter, which is replaced). → what can be used.

    `base`: the model that it was tuned on, `opening`: what `open_source` needs to be told of it; `ranks`: of an archive; `force`:
    also of another model. Errors: `CheckpointError` for another base, and for what the format has no place for.
    """
    if to not in FORMATS:
        raise CheckpointError(
            f"{to!r} is no form of an adapter", where="--to", fix=f"one of {', '.join(FORMATS)}"
        )
    source = open_source(base, **(opening or {}))
    here = Base(fingerprint(source.family, source.config, source.tensors), str(source.folder))
    check_base(adapter, source.family, here, force=force)
    known = adapter.base if adapter.base.fingerprint else replace(here, tokenizer=adapter.base.tokenizer)
    named = replace(adapter, family=source.family, base=known)
    place = Path(target).expanduser().absolute()
    if to == "native":
        return [save(named, place)]
    if to == "nemo":
        return [write_nemo(named, base, place, ranks=ranks)]
    return _peft(named, place, source)


def _peft(adapter: Adapter, target: Path, source: Source) -> list[Path]:
    size = sum(tensor.nbytes for tensor in adapter.tensors.values())
    said = replace(adapter, base=replace(adapter.base, name=str(source.folder)))
    with publishing(target, size) as folder:
        if adapter.method not in WITH_TAGS:
            write_peft_lora(said, folder, source.config)
            return [target]
        names = _names(adapter)
        for number, name in enumerate(names):
            (folder / name).mkdir()
            write_peft(said, number, folder / name, source.config, _positions(adapter, source))
    return [target / name for name in names]


def _names(adapter: Adapter) -> list[str]:
    """A folder's name for each tag."""
    names = [_ODD.sub("_", name).strip(".") or "_" for name in adapter.names]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CheckpointError(
            f"several tags would be called {', '.join(twice)} on the disk",
            where=adapter.path,
            fix="export them apart",
        )
    return names


def _positions(adapter: Adapter, source: Source) -> torch.Tensor | None:
    """The model's rows for the longest prompt; None where it learns no positions."""
    lazy = next((source.tensors[name] for name in POSITIONS if name in source.tensors), None)
    return None if lazy is None else lazy.rows(0, max(tag.length for tag in adapter.tags))
