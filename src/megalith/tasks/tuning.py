"""`megalith tune` and `megalith finetune`: the parts of a run that begins from a model and trains a little beside it, or all of it.

    configuration ─ model to begin from ─ tokenizer ─ samples ─ method ─ engine ─▶ TuneParts ─ tasks.pretrain.run ─▶ artefact, .nemo

The loop, its folder, checkpoints, signals and exit codes are those of pretraining. A checkpoint holds what trains alone; the
model that stays as it is comes from where it came from at first, each time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megalith.adapt.adapter import TUNING, Adapter
from megalith.adapt.artefact import RUN, save
from megalith.adapt.lora import LoRA
from megalith.adapt.method import Method
from megalith.adapt.nemo import write_nemo
from megalith.adapt.p_tuning import PTuning
from megalith.adapt.prompts import NewPrompt
from megalith.adapt.soft_prompt import SoftPrompts
from megalith.checkpoint.convert.certificate import Failed
from megalith.checkpoint.convert.convert import Plan, convert
from megalith.checkpoint.convert.to_megatron import Sizes
from megalith.checkpoint.formats.nemo_archive import SUFFIX
from megalith.checkpoint.native import newest_verified, read_state
from megalith.config.compose import Composed
from megalith.engine.flops import ModelFlops, Sample, model_flops
from megalith.errors import CheckpointError, ConfigError, MegalithError, Problem
from megalith.models.config import ModelConfig
from megalith.models.family import class_of
from megalith.tasks.alike import same_configuration, same_data, seen_by_all
from megalith.tasks.pretrain_parts import (
    Parts,
    check_same_model,
    make_engine,
    make_machine,
    settle_process,
)
from megalith.tasks.processes import agreed, make_topology
from megalith.tasks.tuning_base import Base, open_base, tokenizer_of
from megalith.tasks.tuning_config import TuneConfig
from megalith.tasks.tuning_data import TuningData, open_tuning_data, rules_of
from megalith.tokenizers.base import Tokenizer
from megalith.training.experiment import Experiment, choose_folder
from megalith.training.saving import Saver
from megalith.training.starting import Start, choose_start

Notice = Callable[[str], None]
_NO_WEIGHT_GRADIENTS = 2 / 3
"""Of a training step's work: forward, and backward to the activations; the frozen matrices get no gradient."""


@dataclass(frozen=True)
class TuneParts(Parts):
    """Everything of a tuning run before its loop. `method` None: all of the model is tuned."""

    base: Base
    method: Method | None
    trained: int
    """Parameters that are trained, of the whole model."""

    @property
    def tune(self) -> TuneConfig:
        """The configuration."""
        config = self.config
        assert isinstance(config, TuneConfig)
        return config

    @property
    def sample(self) -> Sample:
        """The longest that there is."""
        assert isinstance(self.data, TuningData)
        return Sample(*self.data.longest)

    @property
    def flops(self) -> ModelFlops:
        """What the model needs for a token."""
        return flops_of(self.architecture, self.sample, self.method)

    @property
    def said(self) -> list[str]:
        """What is tuned."""
        earlier = ", ".join(tag.name for tag in getattr(self.method, "earlier", ()))
        kept = f"; as they are: {earlier}" if earlier else ""
        return [f"tuned      {_what(self.tune, self.method)}: {self.trained:,} parameters{kept}"]

    @property
    def kept(self) -> dict[str, Any]:
        """What the run tunes, for another one is not to go on with it; and what its texts begin with."""
        before = rules_of(self.tune, self.base, self.tokenizer).before
        return {TUNING: {**signature(self.tune, self.method), "before": list(before)}}

    def fill(self, saver: Saver) -> None:
        """The model's weights, earlier prompts, and how new ones begin."""
        begins = self.start.kind != "resume"
        if self.method is None:
            if begins:
                saver.load_weights(self.base.folder)
            return
        saver.load_weights(self.base.folder, but=self.method.brings)
        if self.base.adapter is not None and self.method.tags:
            self.method.fill(self.engine.stages, self.base.adapter.tensors)
        if begins:
            self.method.begin(self.engine.stages, self.machine.topology)

    def end(self, saver: Saver, tell: Notice) -> None:
        """The artefact in the run's folder, and the archive where one is asked for."""
        topology = self.machine.topology
        adapter = self.adapter()
        if adapter is not None:
            place = self.experiment.folder / RUN
            agreed(topology, lambda: save(adapter, place))
            tell(f"tuned: {place} ({_size(place)})")
        if self.tune.exp_manager.checkpoint_callback_params.save_nemo_on_train_end:
            agreed(topology, lambda: self._archive(adapter, tell))

    def adapter(self) -> Adapter | None:
        """What was tuned, with what was tuned before it. Every process calls it; the main one has all of it."""
        method = self.method
        if method is None:
            return None
        tensors = method.tensors(self.engine.stages, self.machine.topology)
        return Adapter(
            method.name, self.tune.model.family, tensors, method.tags, method.describe(),
            self.base.fingerprint(self.tokenizer), str(self.experiment.folder), self._tasks(),
        )  # fmt: skip

    def _tasks(self) -> dict[str, Mapping[str, Any]]:
        """How the samples of each new tag were made; LoRA's have none."""
        before = dict(self.base.adapter.tasks) if self.base.adapter else {}
        rules = rules_of(self.tune, self.base, self.tokenizer)
        around: dict[str, Any] = {"before": list(rules.before), "behind": list(rules.behind)}
        if rules.start is not None:
            around["start"] = list(rules.start)
        templates = {template.taskname: template for template in self.tune.model.task_templates or ()}
        for tag in self.tune.model.new_tags if self.tune.model.with_prompts else ("",):
            before[tag] = around
            if template := templates.get(tag):
                before[tag] = {
                    **around,
                    "prompt_template": template.prompt_template,
                    "virtual_token_splits": template.splits,
                    "answer_field": template.answer_field or "",
                }
        return before

    def _archive(self, adapter: Adapter | None, tell: Notice) -> None:
        """NAME.nemo beside the checkpoints; where NeMo has nothing like it, that is said, and the artefact is what there is."""
        target = self.experiment.checkpoints / f"{self.experiment.name}{SUFFIX}"
        new = target.with_name(f"{target.stem}-new{SUFFIX}")
        new.unlink(missing_ok=True)
        ranks = self.machine.topology.sizes.tensor
        try:
            if adapter is not None:
                write_nemo(adapter, self.base.folder, new, ranks=ranks)
            else:
                step, _ = newest_verified(self.experiment.checkpoints)
                assert step is not None
                convert(step, new, Plan("nemo", Sizes(ranks=ranks), untrained=True, optimizer=False))
            os.replace(new, target)
        except (MegalithError, Failed) as error:
            tell(f"no {target.name}: {error}")
            return
        tell(f"archive: {target}")


def prepare_tuning(composed: Composed[TuneConfig], notice: Notice) -> TuneParts:
    """Everything that can go wrong before the first step; nothing is written."""
    config = composed.config
    settle_process(config)
    same_configuration(composed.yaml())
    base = open_base(config.restore_from_path, config.exp_manager.exp_dir)
    check_tags(config, base)
    tokenizer = tokenizer_of(config, base)
    architecture = config.model.architecture(tokenizer.vocab_size)
    method = make_method(config, base, tokenizer)
    topology = make_topology(config, architecture)
    experiment, start = agreed(topology, lambda: choose(config, base, method))
    for text in (*base.notices, *_left_behind(config, base), *start.notices):
        notice(text)
    state = start.state
    if start.folder is not None:
        seen_by_all(start.folder, "exp_manager.explicit_log_dir, .exp_dir")
        check_same_model(start.folder, config, architecture, tokenizer)
    data = open_tuning_data(config, base, tokenizer, topology, stored=state.get("data_plan"), notice=notice)
    same_data(data.streams.state(), tokenizer.hash())
    sample = Sample(*data.longest)
    machine, meter = make_machine(config, architecture, topology, sample)
    meter = replace(meter, flops_per_token=flops_of(architecture, sample, method).per_token)
    engine = make_engine(config, as_trained(config, architecture, method), machine, method)
    if start.kind == "resume":  # the tensors follow when the loop starts; the counters are needed before
        engine.load_state_dict(state)
    trained = trained_parameters(architecture, method)
    return TuneParts(
        composed,
        tokenizer,
        architecture,
        experiment,
        start,
        machine,
        meter,
        data,
        engine,
        base,
        method,
        trained,
    )


def as_trained(config: TuneConfig, architecture: ModelConfig, method: Method | None) -> ModelConfig:
    """The model that is built: one that stays as it is computes without dropout, unless NeMo's way is asked for."""
    if method is None or config.model.compat.frozen_dropout:
        return architecture
    return architecture.model_copy(update={"hidden_dropout": 0.0, "attention_dropout": 0.0})


def trained_parameters(architecture: ModelConfig, method: Method | None) -> int:
    """Counted on a model without memory."""
    with torch.device("meta"):
        model = class_of(architecture)(architecture)
    if method is not None:
        method.install(model)
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if method is None or any(re.search(pattern, name) for pattern in method.trains)
    )


def flops_of(architecture: ModelConfig, sample: Sample, method: Method | None) -> ModelFlops:
    """What the model needs for a token: less where its matrices get no gradient."""
    found = model_flops(architecture, sample)
    if method is None:
        return found
    return ModelFlops(
        found.per_token * _NO_WEIGHT_GRADIENTS, f"2/3 of {found.formula}; frozen weights get no gradient"
    )


def make_method(config: TuneConfig, base: Base, tokenizer: Tokenizer) -> Method | None:
    """The way of tuning. Errors: `ConfigError` for an initial text that is no token."""
    model = config.model
    if model.tuning_method == "full":
        return None
    if model.tuning_method == "lora":
        lora = model.lora
        return LoRA(lora.rank, lora.alpha, lora.dropout, tuple(lora.targets))
    earlier = base.adapter.tags if base.adapter else ()
    templates = {template.taskname: template.total_virtual_tokens for template in model.task_templates or ()}
    new = []
    for tag, text in model.init_texts.items():
        if text is None and model.tuning_method == "p-tuning":
            text = tag  # as NeMo's
        ids = tuple(tokenizer.encode(text)) if text else ()
        if text and not ids:
            raise ConfigError([Problem("model.new_prompt_init_text", f"{text!r} is no token", "other words")])
        new.append(NewPrompt(tag, templates.get(tag, model.num_prompt_tokens), ids))
    if model.tuning_method == "soft-prompt":
        return SoftPrompts(new, earlier)
    network = model.p_tuning
    return PTuning(
        new, earlier, dropout=network.dropout, kind=network.encoder_type, layers=network.num_layers
    )


def check_tags(config: TuneConfig, base: Base) -> None:
    """Errors: `ConfigError` where the tags of the model that the run begins from are not those that it is told of."""
    model, problems = config.model, list[Problem]()
    if not model.with_prompts:
        return
    tags = base.adapter.tags if base.adapter else ()
    names, place = [tag.name for tag in tags], config.restore_from_path
    held = f"it has {', '.join(names)}" if names else "it has no prompts"
    for tag in model.existing_tags:
        if tag not in names:
            what = f"{tag} is not in {place}: {held}"
            problems.append(
                Problem("model.existing_prompt_tags", what, "the tags that it has; or leave the key out")
            )
    for tag in model.new_tags:
        if tag in names:
            what = f"{tag} is tuned already, and stays as it is: {place} has it"
            problems.append(Problem("model.new_prompt_tags", what, "another name for the new prompt"))
    lengths = sorted({tag.length for tag in tags})
    other = lengths and model.num_prompt_tokens not in lengths
    if other and model.tuning_method == "soft-prompt" and not model.task_templates:
        what = f"{model.num_prompt_tokens}, and the prompts of {', '.join(names)} have {', '.join(map(str, lengths))}"
        problems.append(Problem("model.num_prompt_tokens", what, f"model.num_prompt_tokens={lengths[-1]}"))
    totals = {template.taskname: template.total_virtual_tokens for template in model.task_templates or ()}
    for tag in tags:
        if totals.get(tag.name, tag.length) != tag.length:
            what = f"{tag.name}: total_virtual_tokens is {totals[tag.name]}, and its prompt in {place} has {tag.length}"
            problems.append(Problem("model.task_templates", what, f"total_virtual_tokens: {tag.length}"))
    if problems:
        raise ConfigError(problems)


def signature(config: TuneConfig, method: Method | None) -> dict[str, Any]:
    """What a run tunes. Two starts with different ones are not one run."""
    return {
        "method": config.model.tuning_method,
        "new": [[p.name, p.length] for p in getattr(method, "new", ())],
        "earlier": [[tag.name, tag.length] for tag in getattr(method, "earlier", ())],
        **({"lora": method.describe()} if isinstance(method, LoRA) else {}),
    }


def choose(config: TuneConfig, base: Base, method: Method | None) -> tuple[Experiment, Start]:
    """The run's folder, and what it starts from. Only one process looks at the disk.

    Errors: `CheckpointError` for a folder in which something else was tuned: NeMo would go on with that, and say nothing.
    """
    experiment = choose_folder(config.exp_manager)
    resumes = config.exp_manager.resume_if_exists
    own, _ = newest_verified(experiment.checkpoints) if resumes else (None, [])
    if own is not None:
        _refuse_other_run(own, read_state(own).get(TUNING), signature(config, method))
    start = choose_start(
        experiment.checkpoints,
        resume_if_exists=resumes,
        ignore_no_checkpoint=config.exp_manager.resume_ignore_no_checkpoint,
        resume_from=config.model.resume_from_checkpoint,
        init_from=None if config.model.resume_from_checkpoint else str(base.folder),
        key="restore_from_path",
    )
    return experiment, start


def _refuse_other_run(step: Path, before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    fix = "another exp_manager.name for another task"
    if before is None:
        what = "this is the folder of a pretraining run"
        raise CheckpointError(what, where=str(step.parent), fix=fix)
    differ = [key for key in now if before.get(key) != now[key]]
    if differ:
        lines = [f"{_word(key)}: {_shown(before.get(key))} there, {_shown(now[key])} here" for key in differ]
        raise CheckpointError(
            "\n    ".join(
                ["in this folder something else was tuned, which this run would go on with", *lines]
            ),
            where=str(step.parent),
            fix=fix,
        )


def _left_behind(config: TuneConfig, base: Base) -> list[str]:
    """Prompts of a model that is to change: what comes out has none."""
    if base.adapter is None or config.model.with_prompts:
        return []
    names = ", ".join(base.adapter.names)
    return [
        f"restore_from_path: the prompts in {base.adapter.path} ({names}) are left out: they are for the model as it is"
    ]


def _word(key: str) -> str:
    return {"new": "new tags", "earlier": "earlier tags", "lora": "model.lora"}.get(key, key)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"{name} ({length})" for name, length in value) or "none"
    return str(value)


def _what(config: TuneConfig, method: Method | None) -> str:
    if method is None:
        return "all of the model"
    new = getattr(method, "new", ())
    if not new:
        return f"LoRA of rank {config.model.lora.rank} beside {', '.join(config.model.lora.targets)}"
    prompts = ", ".join(f"{prompt.name} ({prompt.length} virtual tokens)" for prompt in new)
    return f"{method.name} of {prompts}"


def _size(folder: Path) -> str:
    total = sum(path.stat().st_size for path in folder.iterdir())
    return f"{total / 1000:,.0f} kB"
