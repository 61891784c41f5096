"""Soft prompts inside a `.nemo`, beside the whole model, as NeMo 1.6 to 1.8 keep them: read, and written.

Knows tags and tables. What they are called in an archive is `checkpoint.formats.nemo_prompts`'s business.
"""

from __future__ import annotations

from pathlib import Path

from megalith.adapt.adapter import SOFT_PROMPT, WITH_TAGS, Adapter, Base, checked, settings_of
from megalith.adapt.fingerprint import fingerprint_of
from megalith.adapt.method import Tag
from megalith.checkpoint.convert.convert import Plan, convert
from megalith.checkpoint.convert.to_megatron import Sizes
from megalith.checkpoint.formats.nemo_prompts import SoftPrompts, prompts_of
from megalith.errors import CheckpointError


def read_nemo(path: Path) -> Adapter:
    """The prompts of an archive, or of an unpacked one; its model is their base. Errors: `CheckpointError`, also where it has none."""
    found = prompts_of(path)
    if not found:
        raise CheckpointError(
            "there are no soft prompts in this archive",
            where=str(path),
            fix="give it as the model; prompts are in those that NeMo's prompt tuning saved",
        )
    tags, tensors = [], {}
    for number, (tag, (tokens, positions)) in enumerate(found.tables.items()):
        tags.append(Tag(tag, len(tokens), positions is not None))
        tensors[f"prompts.{number}.tokens"] = tokens
        if positions is not None:
            tensors[f"prompts.{number}.positions"] = positions
    base = Base(fingerprint_of(path), str(path))
    return checked(Adapter(SOFT_PROMPT, "gpt", tensors, tuple(tags), settings_of(tags), base, str(path)))


def write_nemo(adapter: Adapter, base: str | Path, target: str | Path, *, ranks: int = 1) -> Path:
    """An archive of the model `base` (of any format) with these prompts, cut for so many tensor ranks.

    Tables without positions of their own get the model's. Errors: those of `convert`, and `CheckpointError` for what NeMo's
    archives have no place for.
    """
    if adapter.method not in WITH_TAGS:
        raise CheckpointError(
            "LoRA has no place in NeMo's archives",
            where=adapter.path,
            fix="keep it as an artefact beside the model",
        )
    if any(task.get("prompt_template") for task in adapter.tasks.values()):
        raise CheckpointError(
            "in NeMo's archives virtual tokens stand before the text, and these tasks have templates",
            where=adapter.path,
            fix="keep it as an artefact beside the model",
        )
    prompts = SoftPrompts({tag.name: adapter.table(number) for number, tag in enumerate(adapter.tags)})
    plan = Plan("nemo", Sizes(ranks=ranks), untrained=True, prompts=prompts)
    return convert(base, target, plan).folder
