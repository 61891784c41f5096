"""From a path to a model that is ready to read: weights, architecture, tokenizer, precision. Any format, any layout.

    meta model ─ this process's pipeline stage ─ shared among tensor ranks ─ memory ─ its parts of a checkpoint of any layout
               ─ cast for reading

Builds no optimizer, and initialises nothing that is loaded anyway. Knows no decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from megalith.adapt.adapter import TUNING, Adapter, Base, check_base
from megalith.adapt.fingerprint import fingerprint
from megalith.adapt.lora import LoRA
from megalith.adapt.merge import merge, probe
from megalith.adapt.method import Method
from megalith.checkpoint import foreign as foreign_files
from megalith.checkpoint.foreign import find, open_foreign
from megalith.checkpoint.formats.foreign import Foreign
from megalith.checkpoint.lazy import Lazy
from megalith.checkpoint.manifest import TOKENIZER
from megalith.checkpoint.reading import load, read_state, read_tensors
from megalith.errors import CheckpointError, DataError, MegalithError
from megalith.generate.crew import Crew
from megalith.generate.manner import Manner, family_of, manner_of
from megalith.generate.prompting import Prompting
from megalith.generate.reading import prepare_for_reading
from megalith.hub.obtain import resolve as published
from megalith.models.config import ModelConfig
from megalith.models.family import ARCHITECTURE, FAMILIES, understand
from megalith.models.stack import LanguageModel
from megalith.parallel.cut import split
from megalith.parallel.tensor import share_tensors
from megalith.tokenizers.bpe import DefinedTokenizer
from megalith.tokenizers.load import load_tokenizer
from megalith.topology.hardware import resolve_precision
from megalith.topology.precision import precision as precision_of
from megalith.topology.topology import Topology, choose_device

LORA_NAMES = (".lora_a", ".lora_b")


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode with all that came with it; of a pipeline this process's stage of it."""

    model: LanguageModel
    tokenizer: DefinedTokenizer | None
    folder: Path
    state: Mapping[str, Any]
    crew: Crew = field(default_factory=Crew)
    notices: tuple[str, ...] = ()
    """What a person should know of a checkpoint that another program wrote."""
    bos: bool | None = None
    """Does a GPT's prompt begin with the tokenizer's [BOS]? None: as it was trained."""
    prompting: Prompting | None = None
    """Prompts of tasks that its rows may ask for: see `adapting.use`."""
    weights: Callable[[], Mapping[str, Lazy]] = dict
    """Its tensors, as they lie in their files."""

    @property
    def family(self) -> str:
        """gpt, bert, t5 or bart."""
        return family_of(self.state)

    @cached_property
    def manner(self) -> Manner:
        """What stands around its texts. Errors: as `manner_of`."""
        return manner_of(self.state, self.needs_tokenizer(), self.bos)

    @cached_property
    def base(self) -> Base:
        """What adapters belong to. Every process asks, and the main one reads."""

        def read() -> str:
            return fingerprint(self.family, self.model.config, self.weights())

        hashed = "" if self.tokenizer is None else self.tokenizer.hash()
        return Base(self.crew.lead(read), str(self.folder), hashed)

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


@dataclass(frozen=True)
class Source:
    """A checkpoint of any format as `load_model` needs it. `exact`: tensors are filled in the dtype that they are saved in only."""

    folder: Path
    state: Mapping[str, Any]
    dtype: torch.dtype
    exact: bool
    tokens: Path | None
    fill: Callable[[Mapping[str, torch.Tensor], Crew], object]
    weights: Callable[[], Mapping[str, Lazy]]
    notices: tuple[str, ...] = ()


def load_model(
    path: str | Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    tokenizer: str | None = None,
    config_file: str | Path | None = None,
    crew: Crew | None = None,
    families: Sequence[str] = tuple(FAMILIES),
    lora: Callable[[ModelConfig], Adapter | None] = lambda config: None,
) -> Loaded:
    """Loads a checkpoint for reading, whatever wrote it and whatever layout saved it.

    `path`: a published name (`megalith hub list`);
    a run folder (its newest checkpoint), a step folder, a folder of transformers, or what Megatron wrote (its root, an
    iteration, a rank's folder, a single file, torch_dist). `tokenizer` (a tokenizer.json, or a folder with one) replaces the
    checkpoint's own; `config_file` (JSON or YAML) says what Megatron's files do not. `crew`: the processes that read it
    together, each of which must call this, on its device; else this one alone does, on `device`. `families`: those that the
    caller can use. `lora`: of a model of this config what is merged into the weights.
    Errors: `CheckpointError` when it is not there, is damaged, or holds no model that this version knows; `DataError` for a
    tokenizer that has more tokens than the model; `ConfigError` for a model that cannot be shared by so many.
    """
    crew = crew or Crew(Topology.single(choose_device(device)))
    path = published(path)  # on every host, and before anyone waits for another: a download takes long
    found = crew.lead(lambda: find(path))  # a run may publish another one meanwhile
    if found.is_native:
        source = native(found.folder)
    else:
        source = of_others(open_foreign(found.folder, config_file=config_file, tokenizer=tokenizer))
    model_class, config = understand_one_of(families, source.state, where=str(source.folder))
    crew.check(config)
    spelling, notices = _spelling(source, tokenizer, config.vocab_size)
    if precision == "auto" and source.dtype == torch.float64 and not source.exact:
        precision = "64"
    numbers = precision_of(resolve_precision(precision, crew.topology.device).value)
    built = source.dtype if source.exact else numbers.parameters
    added = lora(config)
    if added is not None:  # its products may be called otherwise here
        check_base(added, family_of(source.state), Base())
    method = None if added is None else LoRA.understand(added.settings, where=added.path)
    model = own_part(model_class, config, crew.topology, built, method)
    allocate(model, crew.topology.device)
    source.fill(_saved(model), crew)
    if built != numbers.parameters:
        model.to(numbers.parameters)
    if added is not None and method is not None:
        method.fill([model], added.tensors)
        merge(model, probe(model))
    ready = prepare_for_reading(model, numbers.compute)
    notices = (*source.notices, *notices)
    return Loaded(ready, spelling, source.folder, source.state, crew, notices, weights=source.weights)


def _saved(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint has of a model, by its name there. Not for keeping: what replaces a weight would then lie beside it."""
    found = model.named_parameters()
    return {f"model.{name}": p.detach() for name, p in found if not name.endswith(LORA_NAMES)}


def understand_one_of(
    families: Sequence[str], state: Mapping[str, Any], *, where: str
) -> tuple[type[LanguageModel], ModelConfig]:
    """Class and config of a model that can be used here. Errors: `CheckpointError` that names another family."""
    model_class, config = understand(state, where=where)
    family = state[ARCHITECTURE]["family"]
    if family not in families:
        raise CheckpointError(
            f"this checkpoint is a {family.upper()}: generation and perplexity need a model that predicts the next token",
            where=where,
            fix=f"give a checkpoint of a {' or '.join(each.upper() for each in families)}",
        )
    return model_class, config


def native(folder: Path) -> Source:
    """A step folder of our own."""
    tokens = folder / TOKENIZER

    def fill(tensors: Mapping[str, torch.Tensor], crew: Crew) -> object:
        return load(folder, tensors, team=crew.team)

    def weights() -> Mapping[str, Lazy]:
        return {lazy.name.removeprefix("model."): lazy for lazy in read_tensors(folder)}

    own, state = tokens if tokens.is_dir() else None, read_state(folder)
    if state.get(TUNING, {}).get("method", "full") != "full":
        raise CheckpointError(
            "it holds what a tuning trains, not the model",
            where=str(folder),
            fix="give the model that was tuned, and the tuning run's folder as --prompts",
        )
    return Source(folder, state, saved_dtype(folder), True, own, fill, weights)


def of_others(foreign: Foreign) -> Source:
    """What another program wrote. Errors: `CheckpointError` where its tensors do not fit its configuration."""
    foreign.tensors  # noqa: B018  # before a model of that many layers is built

    def fill(tensors: Mapping[str, torch.Tensor], crew: Crew) -> object:
        return foreign_files.load(foreign, tensors, team=crew.team)

    return Source(
        foreign.path, foreign.described(), foreign.dtype, False, foreign.tokenizer, fill,
        lambda: foreign.tensors, foreign.notices,
    )  # fmt: skip


def _spelling(
    source: Source, named: str | None, vocabulary: int
) -> tuple[DefinedTokenizer | None, tuple[str, ...]]:
    """The tokenizer, and what to say where another program's own cannot be read: its weights can."""
    try:
        return open_tokenizer(source.tokens, named, vocabulary), ()
    except MegalithError as error:
        if named or source.exact:
            raise
        return None, (f"its tokenizer is left out: {error.problem.what} ({source.tokens})",)


def saved_dtype(folder: Path) -> torch.dtype:
    """What a checkpoint's weights are kept in: fp32, but where training was in float64."""
    return next((tensor.dtype for tensor in read_tensors(folder)), torch.float32)


def own_part(
    model_class: type[LanguageModel],
    config: ModelConfig,
    topology: Topology,
    dtype: torch.dtype,
    method: Method | None = None,
) -> LanguageModel:
    """What this process holds of a model: its tensor rank's share of its pipeline stage. On meta, without memory.

    `method`: what is put into the whole of it first.
    """
    with torch.device("meta"):
        whole = model_class(config)
        if method is not None:
            method.install(whole)
        whole.to(dtype)
    (stage,) = split(whole, topology)
    share_tensors(stage, topology)
    return cast(LanguageModel, stage)


def allocate(model: nn.Module, device: torch.device) -> None:
    """Memory with nothing in it for every parameter on meta, DTensors too."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            memory = torch.empty_like(parameter, device=device)
            setattr(module, name, nn.Parameter(memory, requires_grad=False))


def open_tokenizer(own: Path | None, named: str | None, vocabulary: int) -> DefinedTokenizer | None:
    """The tokenizer of that name, or the checkpoint's own; None when there is neither."""
    tokens = Path(named) if named else own
    if tokens is None:
        return None
    found = load_tokenizer(tokens)
    if found.vocab_size > vocabulary:
        raise DataError(
            f"it has {found.vocab_size} tokens, the model knows {vocabulary}",
            where=str(tokens),
            fix="give the tokenizer that the model was trained with",
        )
    return found
