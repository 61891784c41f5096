"""A real training step, and what it held and sent, measured by means of its own: torch's profiler and a count at the dispatcher."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from megalith.engine.engine import Engine
from megalith.engine.objective import objective_of
from megalith.models.family import class_of
from megalith.optim.schedule import make_schedule
from megalith.parallel.apply import build
from megalith.tools.plan.rehearsal import Case
from megalith.topology.sizes import AXES
from megalith.topology.topology import Topology


@dataclass(frozen=True)
class Facts:
    """Of one rank. Bytes: what is there after a step, the most during it, and what it sends, by axis."""

    coordinates: dict[str, int]
    weights: int
    gradients: int
    optimizer: int
    peak: int
    sent: dict[str, float]

    @property
    def is_first(self) -> bool:
        """On every axis but the pipeline's."""
        return not any(place for axis, place in self.coordinates.items() if axis != "pipeline")


class Counted(TorchDispatchMode):
    """Bytes that ring algorithms send for what this process gives to collectives, by group."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("c10d.").split(".")[0]
        share = {
            "allreduce_": lambda n: 2 * (n - 1) / n,
            "_allgather_base_": lambda n: n - 1,
            "_reduce_scatter_base_": lambda n: (n - 1) / n,
            "send": lambda n: 1,
        }.get(name)
        if str(func).startswith("c10d.") and share:
            given = args[1] if "base" in name else args[0]
            given = [given] if isinstance(given, torch.Tensor) else given
            group = next(found for found in args if type(found) is torch.ScriptObject and "ProcessGroup" in str(found._type()))  # fmt: skip
            group = dist.ProcessGroup.unbox(group)
            self.bytes[group.group_name] += sum(t.nbytes for t in given) * share(group.size())
        return func(*args, **(kwargs or {}))


def make_engine(case: Case) -> Engine:
    topology = Topology.of(case.sizes, "cpu")
    stages = build(
        class_of(case.model), case.model, topology, seed=1, precision=case.precision, recompute=case.recompute
    )
    schedule = make_schedule(case.optim, max_steps=10, global_batch=case.micro_batch * case.micro_batches)
    return Engine(
        stages, topology, optim=case.optim, schedule=schedule, seed=1, micro_batch_size=case.micro_batch,
        precision=case.precision, objective=objective_of(case.model),
    )  # fmt: skip


def batch(case: Case) -> dict[str, torch.Tensor]:
    """Full rows; of the tokens that an encoder reads as many are predicted in each as the case says."""
    samples = case.micro_batch * case.micro_batches
    tokens = torch.randint(0, case.model.vocab_size, (samples, (case.decoder_length or case.length) + 1))
    found = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:].clone(), "sample": torch.arange(samples)}
    if case.decoder_length:
        found["encoder_tokens"] = torch.randint(0, case.model.vocab_size, (samples, case.length))
    if case.targets:
        found["targets"][:, int(case.targets) :] = -1
        found |= {"types": torch.zeros_like(found["tokens"]), "order": torch.zeros(samples, dtype=torch.long)}
    return found


def size(tensors) -> int:
    """Bytes of the storages below, each once."""
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in local}.values())


def measure_peak(engine: Engine, data: dict[str, torch.Tensor]) -> int:
    """Bytes of weights and optimizer, and the most that a forward and backward has besides."""
    held = size(engine.parameters.values()) + size(_state(engine))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        engine.forward_backward(data)
    return held + highest(profiler)


def measure(case: Case) -> Facts:
    """Two steps of a case on this rank: memory of the first, which makes what is made once, and bytes sent in the second."""
    engine, data = make_engine(case), batch(case)
    peak = measure_peak(engine, data)
    engine.optimizer_step()
    topology = engine.topology
    with Counted() as counted:
        engine.train_step(data)
    names = {}
    if topology.weights is not None:
        names = {topology.weights[axis].get_group().group_name: axis for axis in ("replicate", "shard")}
    names |= {topology.group(axis).group_name: axis for axis in AXES if topology.size(axis) > 1}
    return Facts(
        {axis: topology.rank(axis) for axis in AXES},
        size(engine.parameters.values()),
        size(p.grad for p in engine.parameters.values()),
        size(_state(engine)),
        peak,
        {names[group]: count for group, count in counted.bytes.items() if group in names},
    )


def _state(engine: Engine) -> list[torch.Tensor]:
    return [tensor for state in engine.optimizer.state.values() for tensor in state.values()]


def highest(profiler: profile) -> int:
    """The largest sum of what was allocated and not yet freed since the profiler began."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def left(profiler: profile) -> int:
    """Bytes that were allocated and not freed until the profiler ended."""
    return sum(e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
