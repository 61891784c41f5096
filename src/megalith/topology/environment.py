"""What the environment says about how this process was started: torchrun, `torch.distributed.launch`, SLURM, or alone.

    RANK, WORLD_SIZE, …  set by torchrun and the like, and by `spawn`; they win
    SLURM_STEP_ID, …     set by srun for each task; a batch script itself is one process

Reads variables; changes nothing, and imports no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from megalith.errors import TopologyError


@dataclass(frozen=True)
class Launched:
    """One of `world` started processes: its numbers, and where rank 0 listens."""

    rank: int
    world: int
    local_rank: int
    """Among the processes of this host: which GPU is ours."""
    host: str
    port: int
    launcher: str
    """"torchrun" (or anything that sets its variables) or "slurm"."""


def environment(variables: Mapping[str, str] | None = None) -> Launched | None:
    """How this process was started; None: alone. Errors: `TopologyError` naming variables that do not fit each other."""
    found = Environment(os.environ if variables is None else variables)
    if "RANK" in found.variables or "LOCAL_RANK" in found.variables:
        return _torchrun(found)
    return _slurm(found) if found.is_slurm_task else None


def _torchrun(found: Environment) -> Launched:
    world, rank = found.number("WORLD_SIZE", least=1), found.number("RANK")
    alone = world == 1
    launched = Launched(
        rank=rank,
        world=world,
        local_rank=found.number("LOCAL_RANK", rank),
        host=found.text("MASTER_ADDR", "127.0.0.1" if alone else None),
        port=found.number("MASTER_PORT", 29500 if alone else None, least=1),
        launcher="torchrun",
    )
    found.below("RANK", rank, "WORLD_SIZE", world)
    if "LOCAL_WORLD_SIZE" in found.variables:
        local = found.number("LOCAL_WORLD_SIZE", least=1)
        found.below("LOCAL_RANK", launched.local_rank, "LOCAL_WORLD_SIZE", local)
    return launched


def _slurm(found: Environment) -> Launched:
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in found.variables else "SLURM_NTASKS"
    nodes = "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in found.variables else "SLURM_JOB_NODELIST"
    world, rank = found.number(tasks, least=1), found.number("SLURM_PROCID")
    found.below("SLURM_PROCID", rank, tasks, world)
    host = found.text("MASTER_ADDR", "") or hosts(found.text(nodes, None), where=nodes)[0]
    # Below the ports that the system gives out; two steps of a job get two of them.
    job, step = found.number("SLURM_JOB_ID", 0), found.number("SLURM_STEP_ID", 0)
    return Launched(
        rank=rank,
        world=world,
        local_rank=found.number("SLURM_LOCALID"),
        host=host,
        port=found.number("MASTER_PORT", 12000 + (job * 10 + step) % 20000, least=1),
        launcher="slurm",
    )


@dataclass(frozen=True)
class Environment:
    """Variables, read with errors that name them."""

    variables: Mapping[str, str]

    @property
    def is_slurm_task(self) -> bool:
        """Did srun start us? sbatch gives its script a SLURM_PROCID too, but no step."""
        task = "SLURM_PROCID" in self.variables
        return task and ("SLURM_STEP_ID" in self.variables or "SLURM_JOB_ID" not in self.variables)

    def text(self, name: str, default: str | None) -> str:
        """A variable; without a default it must be there."""
        value = self.variables.get(name) or default
        if value is None:
            missing = f"{name} is not set, but {', '.join(self._related())} {'is' if len(self._related()) == 1 else 'are'}"
            fix = "start with torchrun or srun, which set all of them, or unset all for one process"
            raise TopologyError(missing, where="environment", fix=fix)
        return value

    def number(self, name: str, default: int | None = None, *, least: int = 0) -> int:
        """A whole number from `least` up."""
        text = self.text(name, None if default is None else str(default))
        if not text.isdecimal() or int(text) < least:
            raise TopologyError(
                f"{text!r} is not a whole number from {least} up", where=f"environment, {name}"
            )
        return int(text)

    def below(self, name: str, value: int, limit_name: str, limit: int) -> None:
        """`value` < `limit`, or an error that names both."""
        if value >= limit:
            what = f"{name}={value} does not fit {limit_name}={limit}"
            raise TopologyError(what, where="environment", fix=f"numbers from 0 to {limit - 1}")

    def _related(self) -> list[str]:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_ID")
        return [name for name in names if name in self.variables]


def hosts(nodelist: str, *, where: str = "SLURM_JOB_NODELIST") -> list[str]:
    """The hosts of SLURM's shorthand: "gpu[01-03,07],cpu5" → gpu01 gpu02 gpu03 gpu07 cpu5. Errors: `TopologyError`."""
    items = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", nodelist)
    if not items or ",".join(items) != nodelist.strip():
        raise TopologyError(f"{nodelist!r} is not a list of hosts", where=f"environment, {where}")
    return [host for item in items for host in _expand(item.strip(), where)]


def _expand(item: str, where: str) -> list[str]:
    """Every bracket of one item, the first varying slowest."""
    before, bracket, rest = item.partition("[")
    if not bracket:
        return [item]
    inside, _, after = rest.partition("]")
    found = []
    for part in inside.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise TopologyError(f"[{inside}] is not a list of numbers", where=f"environment, {where}")
        numbers = range(int(first), int(last or first) + 1)
        found += [f"{before}{number:0{len(first)}d}" for number in numbers]
    return [host + end for host in found for end in _expand(after, where)]
