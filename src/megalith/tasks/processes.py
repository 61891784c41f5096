"""How many processes a configuration asks for, and how they agree.

    one command ─ to_spawn ─▶ launch.spawn: the same command in each ─▶ joined ─ make_topology ─▶ …
    torchrun, srun ────────────────────────────────────────────────▶ joined ─ make_topology ─▶ …

What only one process may decide or write (which folder, which checkpoint), the main one does, and the others get its answer
or its error. Knows the configuration's sections by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch

from megalith.errors import ConfigError, MegalithError, Problem, TopologyError
from megalith.models.config import ModelConfig
from megalith.tasks.pretrain_config import PretrainConfig
from megalith.tasks.pretrain_model import PretrainModelConfig
from megalith.topology.launch import Launched, Member, environment, own_device, start
from megalith.topology.sizes import Divisible, Sizes
from megalith.topology.topology import Topology, started
from megalith.training.config import TrainerConfig

Answer = TypeVar("Answer")


def is_main() -> bool:
    """Is this the process that speaks?"""
    return started()[0] == 0


def processes_wanted(trainer: TrainerConfig, sizes: Sizes) -> int:
    """Processes that one command starts by itself. `trainer.devices` auto: every GPU, or on a CPU what the layout needs.

    Errors: `TopologyError` for several machines, which only a launcher can reach.
    """
    if trainer.num_nodes > 1:
        raise TopologyError(
            f"{trainer.num_nodes} machines, but this command can start processes on its own one only",
            where="trainer.num_nodes",
            fix="start it with torchrun or srun on each of them",
        )
    if trainer.num_devices is not None:
        return trainer.num_devices
    on_gpu = trainer.accelerator != "cpu" and torch.cuda.is_available()
    return max(torch.cuda.device_count(), 1) if on_gpu else sizes.world


def to_spawn(trainer: TrainerConfig, sizes: Sizes) -> int:
    """How many processes this command starts, each to run it again; 0 when it is one of them or needs no other."""
    wanted = processes_wanted(trainer, sizes) if environment() is None else 1
    return wanted if wanted > 1 else 0


@contextmanager
def joined(trainer: TrainerConfig) -> Iterator[Member]:
    """Within, this process is one of its run: device, process group, watchdog."""
    launched = environment()
    with start(device_of(trainer, launched), timeout=trainer.process_timeout, launched=launched) as member:
        yield member


def device_of(trainer: TrainerConfig, launched: Launched | None) -> torch.device:
    """The device of this process: of the listed GPUs, or of those that it sees, the one of its number on its machine."""
    listed = trainer.devices if isinstance(trainer.devices, list) else None
    if listed and trainer.accelerator != "cpu":
        name = f"cuda:{listed[(launched.local_rank if launched else 0) % len(listed)]}"
    else:
        name = "cuda" if trainer.accelerator == "gpu" else trainer.accelerator
    return own_device(name, launched)


def make_topology(config: PretrainConfig, architecture: ModelConfig, device: str | None = None) -> Topology:
    """The topology of this process among the started ones. Errors: `ConfigError` with everything that does not fit."""
    sizes = legal_layout(config, architecture, started()[1])
    return Topology.of(sizes, device or device_of(config.trainer, environment()))


def legal_layout(config: PretrainConfig, architecture: ModelConfig, world: int) -> Sizes:
    """The layout of `world` processes. Errors: `ConfigError` with everything that does not fit."""
    sizes = config.model.layout(world)
    numbers = config.model.numbers(architecture.padded_vocab_size, batch=True)
    compiled = str(config.model.compile).lower() == "true"
    problems = sizes.problems(numbers, world=world, compiled=compiled) or _ramp_problems(
        config, numbers, sizes
    )
    if problems:
        raise ConfigError([located(problem, type(config.model)) for problem in problems])
    return sizes


def _ramp_problems(config: PretrainConfig, numbers: Divisible, sizes: Sizes) -> list[Problem]:
    """Batches of the ramp that do not fit the layout: found now, not days into the run."""
    reached = sorted({stage.size for stage in config.model.batch_schedule.stages})
    found = {size: sizes.problems(replace(numbers, global_batch=size)) for size in reached}
    bad = [size for size in reached if found[size]]
    if not bad:
        return []
    shown = ", ".join(map(str, bad[:4])) + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")
    return [
        Problem("rampup_batch_size", f"it reaches {shown}: {found[bad[0]][0].what}", found[bad[0]][0].fix)
    ]


def located(problem: Problem, section: type[PretrainModelConfig]) -> Problem:
    """With the key as the user types it."""
    known = problem.where in section.model_fields
    where = {"devices × num_nodes": "trainer.devices"}.get(problem.where, problem.where)
    return replace(problem, where=f"model.{where}" if known else where)


def agreed(topology: Topology, decide: Callable[[], Answer]) -> Answer:
    """The main process's answer, on every process.

    Errors: what `decide` raises there; on the others a `MegalithError` with the same words and exit code.
    """
    if topology.is_main:
        try:
            answer = decide()
        except MegalithError as error:
            topology.agree((None, (str(error), error.exit_code)))
            raise
        return topology.agree((answer, None))[0]
    answer, failure = topology.agree((None, None))
    if failure is not None:
        error = MegalithError(failure[0])
        error.exit_code = failure[1]
        raise error
    return answer


def in_turn(topology: Topology, work: Callable[[], Answer]) -> Answer:
    """`work` on every process, the main one first: what it leaves in a shared cache, the others find there."""
    if topology.is_main:
        answer = work()
    topology.barrier()
    return answer if topology.is_main else work()
