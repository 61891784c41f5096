"""The plan of a configuration: layout, memory, exchange, FLOPs, time. Nothing is trained, opened or asked of a network.

    configuration ─ Case ─ estimate, for the first, a middle and the last pipeline rank ─▶ Plan
                         └ flops, bubble, efficiency

Knows configurations. How it looks is `show`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megalith.errors import ConfigError, Problem
from megalith.models import presets
from megalith.models.config import ModelConfig, num_parameters
from megalith.parallel.memory import Recompute
from megalith.tasks.derived import vocabulary
from megalith.tasks.pretrain_config import PretrainConfig
from megalith.tasks.processes import legal_layout
from megalith.tools.machine import look
from megalith.tools.plan.devices import Device
from megalith.tools.plan.estimate import Estimate, estimate, in_flight
from megalith.tools.plan.rehearsal import GRADIENTS, OPTIMIZER, WEIGHTS, Case
from megalith.tools.plan.speed import Efficiency, Exchange, Flops, bubble, efficiency_of, exchange, flops
from megalith.topology.hardware import resolve_precision
from megalith.topology.sizes import Sizes
from megalith.topology.topology import choose_device

TIGHT = 0.9
"""Share of the device above which a plan is called tight: driver, NCCL and fragmentation need memory of their own."""


@dataclass(frozen=True)
class Batch:
    """Of one step and of the run; `tokens` and `samples` of all processes."""

    samples: int
    tokens: int
    micro_batches: int
    steps: int
    run_tokens: int


@dataclass(frozen=True)
class Plan:
    """Everything that is known before a run."""

    case: Case
    vocabulary: str
    """Where its size comes from."""
    device: Device
    estimates: tuple[Estimate, ...]
    batch: Batch
    flops: Flops
    bubble: float
    efficiency: Efficiency
    measured: float | None = None
    """Seconds a step, where somebody has measured."""

    @property
    def model(self) -> ModelConfig:
        return self.case.model

    @property
    def sizes(self) -> Sizes:
        return self.case.sizes

    @property
    def parameters(self) -> int:
        """Of the whole model; rows that pad the vocabulary are not counted."""
        return num_parameters(self.model, padded=False)

    @property
    def worst(self) -> Estimate:
        """The pipeline rank that needs most."""
        return max(self.estimates, key=lambda found: on_device(found, self.sizes))

    @property
    def need(self) -> int:
        """Bytes on the device of that rank."""
        return on_device(self.worst, self.sizes)

    @property
    def verdict(self) -> str:
        """fits, tight or does not fit."""
        if self.need > self.device.memory:
            return "does not fit"
        return "tight" if self.need > TIGHT * self.device.memory else "fits"

    @property
    def exchange(self) -> list[Exchange]:
        """Of the worst rank."""
        return exchange(self.worst.sent, self.sizes, self.device)

    @property
    def peak(self) -> float | None:
        """FLOP/s of a device in the plan's precision."""
        found = self.device.peak(self.case.precision)
        return found.tflops * 1e12 if found else None

    @property
    def seconds(self) -> float | None:
        """Predicted, of a step."""
        if self.peak is None:
            return None
        whole = self.flops.hardware * self.batch.tokens
        return whole / (self.sizes.world * self.peak * self.efficiency.value) * (1 + self.bubble)

    def achieved(self, seconds: float) -> Flops:
        """FLOP/s of one device where a step takes so long."""
        share = self.batch.tokens / (seconds * self.sizes.world)
        return Flops(self.flops.model * share, self.flops.hardware * share)

    def run_seconds(self, step: float) -> float:
        """Of the whole run; smaller batches at its beginning take as much less."""
        return step * self.batch.run_tokens / self.batch.tokens


def on_device(found: Estimate, sizes: Sizes) -> int:
    """Bytes that are not in the host's memory."""
    if not sizes.offload:
        return found.total
    return found.total - sum(
        min(found.peak[part], found.rest[part]) for part in (WEIGHTS, GRADIENTS, OPTIMIZER)
    )


def make_plan(
    config: PretrainConfig,
    device: Device | None = None,
    *,
    efficiency: float | None = None,
    step_time: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Plan:
    """The plan; `device` None: this machine's. `say` is told what is being rehearsed.

    Errors: `ConfigError` with everything that does not fit together, or without a vocabulary.
    """
    model, source = architecture(config)
    sizes = layout(config, device, model)
    here = device or this_machine(sizes)
    case = make_case(config, model, sizes, here)
    estimates = []
    for stage in stages_to_look_at(case):
        say(f"pipeline rank {stage}" if sizes.pipeline > 1 else "one step")
        estimates.append(estimate(case, stage))
    samples, steps = config.model.global_batch_size, config.trainer.max_steps
    length = case.sample.tokens
    batch = Batch(
        samples, samples * length, case.micro_batches, steps, config.model.batch_schedule.consumed_at(steps) * length
    )  # fmt: skip
    return Plan(
        case, source, here, tuple(estimates), batch,
        flops(model, case.sample, case.recompute, sizes),
        bubble(sizes, case.micro_batches, undivided=model.position_embedding_type == "relative"),
        efficiency_of(here, efficiency), step_time,
    )  # fmt: skip


def architecture(config: PretrainConfig) -> tuple[ModelConfig, str]:
    """The model, and where its vocabulary comes from: a key, the tokenizer, or the preset's publication."""
    size, source = vocabulary(config)
    if size is None and config.model.preset is not None:
        size, source = presets.get(config.model.preset).vocab_size, f"as {config.model.preset} was published"
    if size is None:
        fix = "--vocab-size N says how many tokens there are, without a tokenizer; or model.tokenizer.file=…"
        raise ConfigError([Problem("model.vocab_size", f"the vocabulary is not known ({source})", fix)])
    return config.model.architecture(size), source


def layout(config: PretrainConfig, device: Device | None, model: ModelConfig) -> Sizes:
    """The layout of `trainer.devices` × `trainer.num_nodes` processes; without them, the smallest that the sizes need."""
    trainer = config.trainer
    each = trainer.num_devices or (device.per_node if device and trainer.num_nodes > 1 else None)
    world = each * trainer.num_nodes if each else config.model.sizes.world
    return legal_layout(config, model, world)


def this_machine(sizes: Sizes) -> Device:
    """The GPU of this machine; where it has none, a process's share of the host's memory."""
    here = choose_device("auto")
    if here.type == "cuda":
        found = torch.cuda.get_device_properties(here)
        count = torch.cuda.device_count()
        return Device(found.name, found.name, found.total_memory, 0.0, None, None, count, "this machine")
    memory = (look().memory or 0) // sizes.world
    name = "this machine" if sizes.world == 1 else f"a process's share ({sizes.world}) of this machine"
    return Device(name, "CPU", memory, 0.0, None, None, sizes.world, "this machine")


def make_case(config: PretrainConfig, model: ModelConfig, sizes: Sizes, device: Device) -> Case:
    """What is to be rehearsed."""
    keys = config.model
    precision = resolve_precision(config.trainer.precision, torch.device("cpu")).value
    if str(config.trainer.precision) == "auto" and device.is_gpu:
        precision = "bf16-mixed" if device.peak("bf16-mixed") else "32"
    return Case(
        model, sizes,
        micro_batch=keys.micro_batch_size,
        micro_batches=keys.global_batch_size // (keys.micro_batch_size * sizes.data),
        length=keys.sample.length,
        decoder_length=keys.sample.decoder_length,
        targets=keys.sample.targets,
        precision=precision,
        recompute=Recompute.from_keys(
            keys.activations_checkpoint_granularity,
            keys.activations_checkpoint_method,
            keys.activations_checkpoint_num_layers,
        ),
        optim=keys.optim,
        on_gpu=device.is_gpu,
    )  # fmt: skip


def stages_to_look_at(case: Case) -> list[int]:
    """The first, the last, that where a decoder begins, and of those between the one with most to keep."""
    ranks = case.sizes.pipeline
    if ranks <= 2:
        return list(range(ranks))
    layers = case.sizes.layers_of(*case.model.depths)
    begin = case.sizes.stages_of(*case.model.depths)[0] % ranks  # of a decoder, where there is one

    def kept(rank: int) -> int:
        return sum(map(len, layers[rank::ranks])) * (1 + in_flight(case.sizes, rank, case.micro_batches))

    return sorted({0, begin, max(range(1, ranks - 1), key=kept), ranks - 1})
