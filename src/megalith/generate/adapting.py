"""A model that reads prompts of tasks, or with LoRA in its weights: at loading, and later, without the base model being read again.

    load_adapted(path, [a, b])     base model and adapters
    use(loaded, [c])               other prompts in place of those; LoRA, being in the weights, cannot be taken out

Knows adapters and loaded models. Knows no row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megalith.adapt.adapter import LORA, WITH_TAGS, Adapter, check_base, joined
from megalith.adapt.artefact import install, open_adapter
from megalith.checkpoint.team import Team
from megalith.errors import ConfigError, Problem
from megalith.generate.crew import Crew
from megalith.generate.kept import Kept
from megalith.generate.loading import Loaded, load_model
from megalith.generate.manner import TUNED
from megalith.generate.prompting import Prompting
from megalith.models.config import ModelConfig
from megalith.models.encdec import EncoderDecoder
from megalith.models.gpt import GPT

NO_CHANGE = 1e-6
"""Of the largest logit: what changes less changes nothing."""

Adapters = Sequence[str | Path | Adapter]


def load_adapted(
    path: str | Path, adapters: Adapters, *, force: bool = False, crew: Crew | None = None, **how: Any
) -> Loaded:
    """As `load_model`, with these adapters: paths, or adapters that are open. `force`: also where they were made for another model.

    Errors: those of `load_model`, `open_adapter`, `joined` and `check_base`.
    """
    opened: list[Adapter] = []
    team = Team() if crew is None else crew.team

    def lora(config: ModelConfig) -> Adapter | None:
        opened.append(_opened(adapters, config, team, force))
        return opened[0] if opened[0].method == LORA else None

    if not adapters:
        return load_model(path, crew=crew, **how)
    loaded = load_model(path, crew=crew, lora=lora, **how)
    said = opened[0].tasks.get("", {}) if opened[0].method == LORA else {}
    if "before" in said:  # the model with LoRA in it is asked as that was tuned
        loaded = replace(loaded, state={**loaded.state, TUNED: {"before": said["before"]}})
    return _used(loaded, opened[0], force)


def use(loaded: Loaded, adapters: Adapters, *, force: bool = False) -> Loaded:
    """The same model, in memory once, with these prompts in place of those that it had; with none, the model alone.

    Errors: as `load_adapted`; `ConfigError` for LoRA. The model is then as it was.
    """
    if loaded.prompting is not None and loaded.prompting.adapter.method not in WITH_TAGS:
        what = "LoRA is in the weights since the model was loaded, and stays there"
        raise ConfigError([Problem(loaded.prompting.adapter.path, what, "load the model without it")])
    if not adapters:
        install(loaded.model, None)
        return replace(loaded, prompting=None)
    adapter = _opened(adapters, loaded.model.config, loaded.crew.team, force)
    if adapter.method not in WITH_TAGS:
        what = "LoRA is merged into the weights when a model is loaded"
        raise ConfigError([Problem(adapter.path, what, "load the model with it")])
    return _used(loaded, adapter, force)


def _opened(adapters: Adapters, config: ModelConfig, team: Team, force: bool) -> Adapter:
    """All of them as one; the main process reads."""

    def read() -> Adapter:
        found = [each if isinstance(each, Adapter) else open_adapter(each, config) for each in adapters]
        return joined(found, force=force)

    return team.lead(read)


def _used(loaded: Loaded, adapter: Adapter, force: bool) -> Loaded:
    said = check_base(adapter, loaded.family, loaded.base, force=force)
    if adapter.method in WITH_TAGS:
        install(loaded.model, adapter)
    prompting = Prompting.of(adapter, loaded.model.config.vocab_size)
    found = replace(loaded, prompting=prompting, notices=(*loaded.notices, *said))
    idle = _idle(found)
    if not idle:
        return found
    names = ", ".join(idle)
    what = f"{adapter.path}: {names} changes no logit: it was never trained, or is made for another model"
    return replace(found, notices=(*found.notices, what))


@torch.inference_mode()
def _idle(loaded: Loaded) -> list[str]:
    """Tags whose prompt leaves the logits behind a short text as they are without it; of LoRA its name, where all of B is zero."""
    assert loaded.prompting is not None
    adapter, model = loaded.prompting.adapter, loaded.model
    if adapter.method == LORA:
        learnt = any(bool(t.any()) for name, t in adapter.tensors.items() if name.endswith(".lora_b"))
        return [] if learnt else [LORA]
    assert isinstance(model, GPT | EncoderDecoder)
    first, text = model.config.vocab_size, [0]
    rows = [text]
    for tag in adapter.tags:
        rows.append([*range(first, first + tag.length), *text])
        first += tag.length
    room = model.config.max_positions
    asked = [row for row in rows if room is None or len(row) < room]
    two_sides = isinstance(model, EncoderDecoder)
    begun, sources = ([text] * len(asked), asked) if two_sides else (asked, None)
    logits = Kept(model, begun, 0, sources, loaded.crew.relay).read(begun).double()
    change = (logits[1:] - logits[0]).abs().amax(-1) / logits[0].abs().max().clamp(min=1e-30)
    names = [tag.name for tag, row in zip(adapter.tags, rows[1:], strict=True) if row in asked]
    return [name for name, by in zip(names, change.tolist(), strict=True) if by < NO_CHANGE]
