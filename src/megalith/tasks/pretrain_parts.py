"""Everything of a pretraining run before its loop: machine, tokenizer, folder, start, data, model, engine.

    config ─ tokenizer ─ folder, start ─ data plan ─ model, engine
                          └ state of the checkpoint ┘

Writes nothing but the data's index cache. Knows the configuration; knows no loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalith.adapt.adapter import TUNING
from megalith.adapt.method import Method
from megalith.checkpoint.foreign import find
from megalith.checkpoint.native import read_state
from megalith.config.compose import Composed
from megalith.engine.engine import Engine
from megalith.engine.flops import ModelFlops, Sample, model_flops
from megalith.engine.metrics import device_name, peak
from megalith.engine.objective import objective_of
from megalith.errors import CheckpointError
from megalith.models.config import ModelConfig, effective, num_parameters
from megalith.models.family import ARCHITECTURE, class_of, understand
from megalith.optim.scaler import make_scaler
from megalith.parallel.apply import build
from megalith.parallel.memory import Recompute
from megalith.tasks.alike import same_configuration, same_data, seen_by_all
from megalith.tasks.pretrain_config import PretrainConfig
from megalith.tasks.pretrain_data import Data, open_data
from megalith.tasks.processes import agreed, in_turn, make_topology
from megalith.tokenizers.base import Tokenizer
from megalith.tokenizers.load import load_tokenizer
from megalith.topology.determinism import make_deterministic, seed_process
from megalith.topology.hardware import Decision, resolve_compile, resolve_precision
from megalith.topology.memory_allocator import resolve_allocator
from megalith.topology.topology import Topology
from megalith.training.experiment import Experiment, choose_folder
from megalith.training.metrics import Meter
from megalith.training.saving import Saver
from megalith.training.starting import Start, choose_start, weights_of_others

FREE_TO_CHANGE = {
    "attention_core", "attention_dropout", "hidden_dropout", "init_method_std", "use_scaled_init_method",
    "make_vocab_size_divisible_by", "max_position_embeddings",
}  # fmt: skip
"""Fields that a loaded model need not share with its checkpoint; where they change a tensor's shape, loading says so."""


@dataclass(frozen=True)
class Machine:
    """Where and in what numbers the run computes."""

    topology: Topology
    precision: Decision
    compile: Decision
    allocator: Decision


@dataclass(frozen=True)
class Parts:
    """Everything of a run before its loop."""

    composed: Composed[PretrainConfig]
    tokenizer: Tokenizer
    architecture: ModelConfig
    experiment: Experiment
    start: Start
    machine: Machine
    meter: Meter
    data: Data
    engine: Engine

    @property
    def parameters(self) -> int:
        """Of the whole model, however many processes hold it."""
        return num_parameters(self.architecture)

    @property
    def sample(self) -> Sample:
        """How much a sample holds."""
        return self.config.model.sample

    @property
    def flops(self) -> ModelFlops:
        """What the model needs for a token."""
        return model_flops(self.architecture, self.sample)

    @property
    def config(self) -> PretrainConfig:
        return self.composed.config

    # -- what a run that tunes a model does otherwise --------------------------------------------------------------

    @property
    def said(self) -> list[str]:
        """Further lines of the summary."""
        return []

    @property
    def kept(self) -> dict[str, Any]:
        """Further sections of a checkpoint's state."""
        return {}

    def fill(self, saver: Saver) -> None:
        """The weights that the run begins with, where they are another's. What a run goes on with, its loop loads."""
        if self.start.kind == "weights" and self.start.folder:
            saver.load_weights(self.start.folder)

    def end(self, saver: Saver, tell: Callable[[str], None]) -> None:
        """What is left to do when the run is complete, or its time is over. Every process calls it."""


def prepare(composed: Composed[PretrainConfig], notice: Callable[[str], None]) -> Parts:
    """Everything that can go wrong before the first step, and nothing written yet but the data's index cache."""
    config = composed.config
    settle_process(config)
    same_configuration(composed.yaml())
    tokenizer = load_tokenizer(config.model.tokenizer)
    architecture = config.model.architecture(tokenizer.vocab_size)
    topology = make_topology(config, architecture)
    experiment, start = agreed(topology, lambda: _choose(config))
    for text in start.notices:
        notice(text)
    state = start.state
    if start.folder is not None:
        seen_by_all(start.folder, "exp_manager.explicit_log_dir, .exp_dir")
        check_same_model(start.folder, config, architecture, tokenizer)
    consumed = int(state.get("consumed_samples", 0))
    data = in_turn(
        topology,
        lambda: open_data(
            config, tokenizer, topology, vocab_size=architecture.vocab_size, stored=state.get("data_plan"),
            step=int(state.get("step", 0)), consumed=consumed, notice=notice,
        ),
    )  # fmt: skip
    same_data(data.streams.state(), tokenizer.hash())
    machine, meter = make_machine(config, architecture, topology)
    engine = make_engine(config, architecture, machine)
    if start.kind == "resume":  # the tensors follow when the loop starts; the counters are needed before
        engine.load_state_dict(state)
    return Parts(composed, tokenizer, architecture, experiment, start, machine, meter, data, engine)


def _choose(config: PretrainConfig) -> tuple[Experiment, Start]:
    """The run's folder, and what it starts from. Only one process looks at the disk."""
    experiment = choose_folder(config.exp_manager)
    start = choose_start(
        experiment.checkpoints,
        resume_if_exists=config.exp_manager.resume_if_exists,
        ignore_no_checkpoint=config.exp_manager.resume_ignore_no_checkpoint,
        resume_from=config.model.resume_from_checkpoint,
        init_from=config.init_from,
    )
    _refuse_tuned(start)
    return experiment, start


def _refuse_tuned(start: Start) -> None:
    """A tuning goes on by its own command, and what trains beside a model is no model to begin from."""
    if start.folder is None or not find(start.folder).is_native:
        return
    tuned = read_state(start.folder).get(TUNING)
    if start.kind == "resume" and tuned is not None:
        raise CheckpointError(
            "this is the folder of a tuning run",
            where=str(start.folder.parent),
            fix="another exp_manager.name; megalith tune, or finetune, goes on with it",
        )
    if tuned is not None and tuned["method"] != "full":
        raise CheckpointError(
            "it holds what a tuning trains, not the model",
            where=str(start.folder),
            fix="give the model that was tuned",
        )


def settle_process(config: PretrainConfig) -> None:
    trainer = config.trainer
    seed_process(config.model.seed)
    if trainer.deterministic == "warn":
        torch.use_deterministic_algorithms(True, warn_only=True)
    elif trainer.deterministic:
        make_deterministic()
    if trainer.benchmark is not None:
        torch.backends.cudnn.benchmark = trainer.benchmark


def check_same_model(
    folder: Path, config: PretrainConfig, architecture: ModelConfig, tokenizer: Tokenizer | None
) -> None:
    """The weights of a checkpoint mean something only in the model and the vocabulary that they were trained in."""
    theirs = weights_of_others(folder, architecture)
    state = read_state(folder) if theirs is None else theirs.described()
    saved = effective(understand(state, where=str(folder))[1])
    if (family := state[ARCHITECTURE]["family"]) != config.model.family:
        raise CheckpointError(
            f"it holds a model of the family {family}, not {config.model.family}",
            where=str(folder),
            fix=f"megalith pretrain {family} goes on with it; or begin a run without it",
        )
    now = effective(architecture)
    lines = [
        f"model.{key}: {saved[key]} in the checkpoint, {now[key]} here"
        for key in now
        if key in saved and key not in FREE_TO_CHANGE and saved[key] != now[key]
    ]
    known = state.get("tokenizer", {}).get("hash")
    if known and tokenizer is not None and known != tokenizer.hash():
        lines.append(
            f"model.tokenizer: another one ({known[:12]} in the checkpoint, {tokenizer.hash()[:12]} here)"
        )
    if lines:
        raise CheckpointError(
            "\n    ".join(["it holds another model", *lines]),
            where=str(folder),
            fix="set these keys to the checkpoint's values (its config.yaml), or begin a run without it",
        )


def make_machine(
    config: PretrainConfig, architecture: ModelConfig, topology: Topology, sample: Sample | None = None
) -> tuple[Machine, Meter]:
    """`sample`: how much one holds, where the configuration does not say."""
    model, steps, sample = config.model, config.trainer.max_steps, sample or config.model.sample
    precision = resolve_precision(config.trainer.precision, topology.device)
    per_token = model_flops(architecture, sample).per_token
    planned = per_token * sample.tokens * model.batch_schedule.consumed_at(steps)
    compiled = resolve_compile(model.compile, topology.device, planned_flops=planned / topology.sizes.world)
    if topology.sizes.schedule == "zero_bubble" and str(model.compile).lower() == "auto":
        compiled = Decision(
            "off", "a zero-bubble pipeline splits the backward, which a compiled block cannot"
        )
    known = peak(device_name(topology.device), precision.value, given=config.trainer.peak_tflops)
    meter = Meter(per_token, known, topology.sizes.world)
    allocator = resolve_allocator(config.trainer.tune_allocator, topology.device)
    return Machine(topology, precision, compiled, allocator), meter


def make_engine(
    config: PretrainConfig, architecture: ModelConfig, machine: Machine, method: Method | None = None
) -> Engine:
    """The model on its layout, with its optimizer. `method`: what is put into it, and alone is trained and kept."""
    model = config.model
    recompute = Recompute.from_keys(
        model.activations_checkpoint_granularity,
        model.activations_checkpoint_method,
        model.activations_checkpoint_num_layers,
    )
    precision = machine.precision.value
    stages = build(
        class_of(architecture), architecture, machine.topology,
        seed=model.seed, precision=precision, compile=machine.compile.on, recompute=recompute,
        adapt=method.install if method else None,
    )  # fmt: skip
    if model.compat.padded_logits == "trained":
        for stage in stages:
            stage.train_padding()
    scaler = make_scaler(
        precision,
        constant=model.loss_scale,
        initial=model.initial_loss_scale,
        growth_interval=model.loss_scale_growth_interval,
        hysteresis=model.hysteresis,
        minimum=model.min_loss_scale,
    )
    return Engine(
        stages, machine.topology,
        optim=model.optim, schedule=config.schedule, seed=model.seed, micro_batch_size=model.micro_batch_size,
        precision=precision, clip=config.trainer.gradient_clip_val or 0.0, max_skipped=model.max_skipped,
        loss_average=model.compat.loss_average, scaler=scaler, objective=objective_of(architecture),
        frozen=method.frozen if method else (), keep="trainable" if method else "all",
    )  # fmt: skip
