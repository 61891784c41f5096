"""How many processes read a model, on which devices and in which precision: the `trainer` and `model` keys of the commands.

    trainer.devices=4 model.tensor_model_parallel_size=2     two copies of the model, each shared by two processes
    model.tensor_model_parallel_size=2 model.pipeline_model_parallel_size=2     one copy, shared by four

Reads keys and options; starts nothing. Which checkpoint is read, and what its model can be divided by, comes later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from megalith.config.compose import Gathered, settle
from megalith.config.interpolate import interpolate
from megalith.config.layers import merge
from megalith.config.overrides import parse_overrides
from megalith.config.schema import ForeignKey, Section, error, ignored, renamed, setting
from megalith.errors import ConfigError, Problem
from megalith.topology.precision import ALIASES
from megalith.topology.sizes import KEYS, Sizes

WHOLE = "use model.tensor_model_parallel_size: a checkpoint of any layout loads at any other"
ONE_STAGE = "leave it out: a checkpoint of any layout loads at any other"
SHARING = ("tensor", "pipeline")
"""The axes along which processes share one copy of the model."""


class ReadingTrainer(Section):
    """Hardware: the keys of pretraining's `trainer` that mean something to a model that only reads."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda"] = setting(
        "auto", "Where to compute: auto takes a GPU when there is one; gpu and cuda mean the same."
    )
    devices: int | Literal["auto"] | list[int] = setting(
        "auto",
        "How many devices on this machine, or a list of GPU numbers. auto: as many as share the model.",
    )
    num_nodes: int = setting(1, "Machines; torchrun or srun starts the processes where it is above 1.", ge=1)
    precision: Literal["auto", "32", "bf16-mixed", "16-mixed", "64"] = setting(
        "auto", "What matrices are multiplied in. auto: bf16-mixed where the hardware has it, else 32."
    )
    process_timeout: int = setting(
        1800, "A process that waits so long for another gives up, and all of them end.", unit="seconds", ge=1
    )

    @field_validator("devices", mode="before")
    @classmethod
    def _devices(cls, value: Any) -> Any:
        if isinstance(value, str) and value.replace(",", "").isdecimal():
            numbers = [int(part) for part in value.split(",") if part]
            value = numbers if "," in value else numbers[0]
        if value in (-1, "-1"):
            return "auto"
        if value in (0, []) or (isinstance(value, int) and value < 0):
            raise ValueError(f"{value} devices cannot read a model\nfix: trainer.devices=1")
        return value

    @field_validator("precision", mode="before")
    @classmethod
    def _precision(cls, value: Any) -> Any:
        return ALIASES.get(str(value), str(value)) if isinstance(value, int | str) else value

    def problems(self) -> Iterable[Problem]:
        if self.accelerator == "cpu" and isinstance(self.devices, list):
            yield error("devices", "a list of GPU numbers, but accelerator is cpu", "trainer.devices=1")


class ReadingModel(Section):
    """How the model is shared. Axes that reading does without are known, so that their names are refused with a reason."""

    foreign_keys: ClassVar[Mapping[str, ForeignKey]] = {
        "sequence_parallel": ignored("a token at a time has no sequence to share", silent=True),
        "zero_stage": ignored("there is no optimizer", silent=True),
        "precision": renamed("trainer.precision"),
    }

    tensor_model_parallel_size: int = setting(1, "Processes that share every layer.", unit="processes", ge=1)
    pipeline_model_parallel_size: int = setting(
        1, "Processes that share the layers, one after the other.", unit="processes", ge=1
    )
    pipeline_model_parallel_split_rank: int | None = setting(
        None,
        "The pipeline stage at which a decoder that has an encoder begins; null, 0 or -1: in proportion to the layers.",
        ge=-1,
    )
    pipeline_layers: list[int] | None = setting(
        None, "Number of layers of each pipeline stage, first to last; null: as even as they can be."
    )
    virtual_pipeline_model_parallel_size: int | None = setting(
        None, "Must be 1: a process reads with one stage.", ge=1
    )
    context_parallel_size: int = setting(1, "Must be 1.", ge=1)
    expert_model_parallel_size: int = setting(1, "Must be 1.", ge=1)

    @property
    def sizes(self) -> Sizes:
        """The processes of one copy of the model."""
        split = max(self.pipeline_model_parallel_split_rank or 0, 0)
        return Sizes(
            tensor=self.tensor_model_parallel_size,
            pipeline=self.pipeline_model_parallel_size,
            layers=tuple(self.pipeline_layers) if self.pipeline_layers else None,
            pipeline_split=split if split and self.pipeline_model_parallel_size > 1 else None,
        )

    def problems(self) -> Iterable[Problem]:
        for problem in self.sizes.problems():
            yield error(problem.where, problem.what, problem.fix)
        virtual = self.virtual_pipeline_model_parallel_size or 1
        if virtual > 1:
            what = f"{virtual}: a process reads with one pipeline stage"
            yield error("virtual_pipeline_model_parallel_size", what, ONE_STAGE)
        for name in ("context_parallel_size", "expert_model_parallel_size"):
            if getattr(self, name) > 1:
                yield error(name, f"{getattr(self, name)}: a model is read without this axis", WHOLE)


class ReadingConfig(Section):
    """The root: keys as pretraining spells them. NeMo's inference files write the sizes without a section."""

    foreign_keys: ClassVar[Mapping[str, ForeignKey]] = {
        name: renamed(f"model.{name}")
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "pipeline_model_parallel_split_rank",
        )
    }

    trainer: ReadingTrainer = setting(ReadingTrainer, "Hardware.")
    model: ReadingModel = setting(ReadingModel, "How the model is shared.")


@dataclass(frozen=True)
class Layout:
    """What the keys and options ask for. `copy`: the processes that share one copy of the model; `devices`: a number for this
    machine, GPU numbers, or None where nobody said."""

    copy: Sizes = field(default_factory=Sizes)
    devices: int | tuple[int, ...] | None = None
    nodes: int = 1
    accelerator: str = "auto"
    precision: str = "auto"
    timeout: int = 1800
    notices: tuple[str, ...] = ()

    @property
    def wanted(self) -> int:
        """Processes on this machine."""
        if self.devices is None:
            return self.copy.world
        return self.devices if isinstance(self.devices, int) else len(self.devices)

    def device(self, local_rank: int) -> str:
        """The device of the process with this number on its machine; "auto" and "cuda" leave the number to `start`."""
        if isinstance(self.devices, tuple):
            return f"cuda:{self.devices[local_rank % len(self.devices)]}"
        return "cuda" if self.accelerator == "gpu" else self.accelerator

    def sizes(self, world: int) -> Sizes:
        """The axes of `world` started processes. Errors: `ConfigError` when the keys ask for another number."""
        asked = self.wanted * self.nodes
        if self.devices is not None and asked != world:
            what = f"{asked} asked for, but the launcher started {world} processes"
            raise ConfigError([Problem("trainer.devices", what, "leave it out, or start as many")])
        if world % self.copy.world:
            raise ConfigError([self._uneven(world)])
        return self.copy.fit(world)

    def needs_one_copy(self, world: int, what: str) -> None:
        """Errors: `ConfigError` when `world` processes would hold the model more than once: `what` is not shared out."""
        one = self.copy.world
        if world > one:
            problem = f"{world} processes, but {what} is the work of {one} ({' × '.join(self._shared_by)})"
            more = f"model.tensor_model_parallel_size={world // self.copy.pipeline}"
            fix = f"trainer.devices={one}, or {more}"
            raise ConfigError([Problem("trainer.devices", problem, fix)])

    def to_spawn(self, gpus: int) -> int:
        """Processes that this command starts where no launcher did, on a machine with so many GPUs; 0: none but itself.

        Errors: `ConfigError` for GPUs that are not there, other machines, or a number that cannot share the model.
        """
        problems = list(self._local_problems(gpus))
        if problems:
            raise ConfigError(problems)
        return self.wanted if self.wanted > 1 else 0

    def _local_problems(self, gpus: int) -> Iterable[Problem]:
        if self.nodes > 1:
            what = f"{self.nodes} machines, but this command can start processes on its own one only"
            yield Problem("trainer.num_nodes", what, "start it with torchrun or srun on each of them")
        if self.wanted % self.copy.world:
            yield self._uneven(self.wanted)
        on_gpu = self.accelerator in ("gpu", "cuda") or isinstance(self.devices, tuple)
        need = max(self.devices) + 1 if isinstance(self.devices, tuple) else self.wanted
        if (on_gpu or (self.accelerator == "auto" and gpus and self.wanted > 1)) and need > gpus:
            many = f"at most {gpus} of them, or " if gpus else ""
            what = (
                f"GPU {need - 1} asked for"
                if isinstance(self.devices, tuple)
                else f"{need} GPU{'s' * (need > 1)} asked for"
            )
            where = "--device, trainer.accelerator"
            if self.devices is not None:
                where = "--device, trainer.devices" if self.wanted == 1 else "trainer.devices"
            elif self.copy.world > 1:
                where = " × ".join(f"model.{key}" for key in self._shared_by)
            fix = f"{many}trainer.accelerator=cpu (or --device cpu)"
            yield Problem(where, f"{what}, this machine has {gpus}", fix)

    def _uneven(self, world: int) -> Problem:
        n, keys = self.copy.world, " × ".join(self._shared_by)
        what = f"{world} process{'es' if world > 1 else ''}, but the model is shared by {n} ({keys})"
        return Problem("trainer.devices", what, f"trainer.devices ∈ {{{n}, {2 * n}, {3 * n}, …}}")

    @property
    def _shared_by(self) -> list[str]:
        """The keys that say by how many processes a copy is shared."""
        return [KEYS[axis] for axis in SHARING if getattr(self.copy, axis) > 1] or [KEYS["tensor"]]


def read_layout(keys: Sequence[str] = (), *, device: str = "auto", precision: str = "auto") -> Layout:
    """The layout of trailing keys beside the options --device and --precision.

    Errors: one `ConfigError` with every key that is unknown or cannot be, and options that contradict keys.
    """
    parsed, problems = parse_overrides(keys)
    merged = merge(ReadingConfig, [], parsed)
    merged.problems[:0] = [_unquoted(problem) for problem in problems]
    interpolate(ReadingConfig, merged)
    composed = settle(ReadingConfig, Gathered(merged, Path("command line"), list(keys)))
    trainer, model = composed.config.trainer, composed.config.model
    contradictions = list(_contradictions(trainer, device, ALIASES.get(precision, precision)))
    if contradictions:
        raise ConfigError(contradictions)
    listed = tuple(trainer.devices) if isinstance(trainer.devices, list) else None
    number = trainer.devices if isinstance(trainer.devices, int) else None
    if device.startswith("cuda:") and device[5:].isdecimal():
        listed = (int(device[5:]),)
    return Layout(
        copy=model.sizes,
        devices=listed or number,
        nodes=trainer.num_nodes,
        accelerator=trainer.accelerator if device == "auto" else "cuda" if listed else device,
        precision=trainer.precision if precision == "auto" else precision,
        timeout=trainer.process_timeout,
        notices=tuple(composed.notices),
    )


def _unquoted(problem: Problem) -> Problem:
    """A word that is no key is most likely the second one of a prompt."""
    if problem.what != "is not key=value":
        return problem
    return replace(problem, fix="quote a text of several words; keys are trainer.devices=2 and the like")


def _contradictions(trainer: ReadingTrainer, device: str, precision: str) -> Iterable[Problem]:
    """What the options say against the keys."""
    kind, _, number = device.partition(":")
    asked = "cuda" if trainer.accelerator == "gpu" else trainer.accelerator
    if device != "auto" and asked not in ("auto", kind):
        yield Problem("--device, trainer.accelerator", f"{device} and {trainer.accelerator}", "keep one")
    if device == "cpu" and isinstance(trainer.devices, list):
        yield Problem("--device, trainer.devices", f"cpu and the GPUs {trainer.devices}", "keep one")
    if number and trainer.devices not in ("auto", 1, [int(number) if number.isdecimal() else -1]):
        yield Problem("--device, trainer.devices", f"{device} and {trainer.devices}", "keep one")
    if "auto" not in (precision, trainer.precision) and precision != trainer.precision:
        yield Problem("--precision, trainer.precision", f"{precision} and {trainer.precision}", "keep one")
