"""NeMo's list of published models, from the hub's catalogue. Fetches nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megalith.errors import CheckpointError
from megalith.hub import catalogue
from megalith.hub.catalogue import Entry, entry_of, near


@dataclass(frozen=True)
class PretrainedModelInfo:
    """As NeMo describes a published model."""

    pretrained_model_name: str
    description: str
    location: str
    class_: Any = None
    aliases: tuple[str, ...] = ()


def available(model_class: Any) -> list[PretrainedModelInfo]:
    """The published models of a class."""
    return [
        PretrainedModelInfo(entry.name, entry.about, entry.files[0].url, model_class, entry.aliases)
        for entry in catalogue.ENTRIES
        if entry.kind == "model" and family_of(entry) == model_class.family
    ]


def family_of(entry: Entry) -> str:
    """gpt or bert: what its description says."""
    return "gpt" if "GPT" in entry.about else "bert"


def known(name: str, family: str) -> str:
    """The name. Errors: `CheckpointError` for one that is not published, with near ones."""
    entry = entry_of(name)
    if entry is not None and entry.kind == "model" and family_of(entry) == family:
        return name
    found = [each for each in near(name, "model") if (e := entry_of(each)) and family_of(e) == family]
    names = found or [e.name for e in catalogue.ENTRIES if e.kind == "model" and family_of(e) == family]
    raise CheckpointError(
        f"no {family.upper()} of this name is published",
        where=name,
        fix=f"did you mean {' or '.join(names[:4])}?" if names else "give restore_from a path",
    )
