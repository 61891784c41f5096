"""From a path to a model that is ready to read: weights, architecture, tokenizer, precision.

    meta model ─ shared among tensor ranks ─ memory ─ this process's parts of a checkpoint of any layout ─ cast for reading

Builds no optimizer, and initialises nothing that is loaded anyway. Knows no decoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megalith.checkpoint.manifest import TOKENIZER
from megalith.checkpoint.open import resolve
from megalith.checkpoint.reading import load, read_state, read_tensors
from megalith.errors import CheckpointError, DataError
from megalith.generate.crew import Crew
from megalith.generate.reading import prepare_for_reading
from megalith.models.family import understand
from megalith.models.gpt import GPT
from megalith.parallel.tensor import share_tensors
from megalith.tokenizers.bpe import DefinedTokenizer
from megalith.tokenizers.load import load_tokenizer
from megalith.topology.hardware import resolve_precision
from megalith.topology.precision import precision as precision_of
from megalith.topology.topology import Topology, choose_device


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode with all that came with it."""

    model: GPT
    tokenizer: DefinedTokenizer | None
    folder: Path
    state: Mapping[str, Any]
    crew: Crew = field(default_factory=Crew)

    @property
    def step(self) -> int:
        """Optimizer steps that made it."""
        return int(self.state.get("step", 0))

    @property
    def trained_length(self) -> int:
        """Tokens of the samples that it was trained on: rows of its position table behind them never were."""
        plan = (self.state.get("data_plan") or {}).get("train", {})
        return int(plan.get("seq_length") or self.model.config.max_position_embeddings)

    def needs_tokenizer(self) -> DefinedTokenizer:
        """The tokenizer. Errors: `CheckpointError` when the checkpoint was saved without one."""
        if self.tokenizer is None:
            raise CheckpointError(
                "it holds no tokenizer",
                where=str(self.folder),
                fix="give --tokenizer FILE (a tokenizer.json)",
            )
        return self.tokenizer


def load_model(
    path: str | Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    tokenizer: str | None = None,
    crew: Crew | None = None,
) -> Loaded:
    """Loads a run folder's newest checkpoint, or a step folder, for reading, whatever layout saved it.

    `tokenizer` (a tokenizer.json, or a folder with one) replaces the checkpoint's own. `crew`: the processes that read it
    together, each of which must call this, on its device; else this one alone does, on `device`.
    Errors: `CheckpointError` when it is not there, is damaged, or holds no model that this version knows; `DataError` for a
    tokenizer that has more tokens than the model; `ConfigError` for a model that cannot be shared by so many.
    """
    crew = crew or Crew(Topology.single(choose_device(device)))
    folder = crew.lead(lambda: resolve(path))  # a run may publish another one meanwhile
    state = read_state(folder)
    model_class, config = understand(state, where=str(folder))
    crew.check(config)
    spelling = open_tokenizer(folder, tokenizer, config.vocab_size)
    numbers = precision_of(resolve_precision(precision, crew.topology.device).value)
    saved = saved_dtype(folder)
    with torch.device("meta"):
        model = model_class(config).to(saved)
    share_tensors(model, crew.topology)
    allocate(model, crew.topology.device)
    load(folder, {f"model.{name}": p.detach() for name, p in model.named_parameters()}, team=crew.team)
    if saved != numbers.parameters:
        model.to(numbers.parameters)
    return Loaded(prepare_for_reading(model, numbers.compute), spelling, folder, state, crew)


def saved_dtype(folder: Path) -> torch.dtype:
    """What a checkpoint's weights are kept in: fp32, but where training was in float64."""
    return next((tensor.dtype for tensor in read_tensors(folder)), torch.float32)


def allocate(model: nn.Module, device: torch.device) -> None:
    """Memory with nothing in it for every parameter on meta, DTensors too."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            memory = torch.empty_like(parameter, device=device)
            setattr(module, name, nn.Parameter(memory, requires_grad=False))


def open_tokenizer(folder: Path, named: str | None, vocabulary: int) -> DefinedTokenizer | None:
    """The tokenizer of that name, or the checkpoint's own; None when there is neither."""
    tokens = Path(named) if named else folder / TOKENIZER
    if not named and not tokens.is_dir():
        return None
    found = load_tokenizer(tokens)
    if found.vocab_size > vocabulary:
        raise DataError(
            f"it has {found.vocab_size} tokens, the model knows {vocabulary}",
            where=str(tokens),
            fix="give the tokenizer that the model was trained with",
        )
    return found
