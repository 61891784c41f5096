"""FLOPs of a step, the pipeline's idle time, bytes against bandwidths, and how long a step takes.

Two kinds of FLOPs, both by name: *model* FLOPs are what the mathematics needs, *hardware* FLOPs what is computed,
recomputation included. Knows formulas and what was published; measures nothing.

    seconds a step = hardware FLOPs ÷ (devices × peak × efficiency) × (1 + bubble)
"""

from __future__ import annotations

from dataclasses import dataclass

from megalith.engine.flops import flops_per_token, matrix_parameters
from megalith.models.config import ModelConfig
from megalith.parallel.memory import Recompute
from megalith.tools.plan.devices import Device
from megalith.tools.plan.published import RUNS, calibrate
from megalith.topology.sizes import AXES, Sizes
from megalith.topology.traffic import Sent

STEP_TIME = "hardware FLOPs ÷ (devices × peak × efficiency) × (1 + bubble)"


@dataclass(frozen=True)
class Flops:
    """Of one token, forward and backward."""

    model: float
    hardware: float


def flops(model: ModelConfig, length: int, recompute: Recompute | None, sizes: Sizes) -> Flops:
    """`model`: `FORMULA`. `hardware`: and the forward of what is computed again: 2 × a layer's matrix parameters +
    4 × attention width × length, or the latter alone when only attention is.

    With full recomputation, plain attention and ffn = 4 × width that is Megatron-LM's
    96·B·s·L·h²·(1 + s/(6h) + V/(16Lh)) a step (Narayanan et al. 2021).
    """
    width, matrices = model.num_attention_heads * model.head_dim, matrix_parameters(model)
    needed = flops_per_token(
        matrix_parameters=matrices, layers=model.num_layers, attention_width=width, length=length
    )
    if recompute is None:
        return Flops(needed, needed)
    attention = 4.0 * width * length
    if recompute.granularity == "selective":
        return Flops(needed, needed + model.num_layers * attention)
    layer = 2.0 * (matrices - model.vocab_size * model.hidden_size) / model.num_layers + attention
    return Flops(needed, needed + recomputed_layers(model.num_layers, recompute, sizes) * layer)


def recomputed_layers(layers: int, recompute: Recompute, sizes: Sizes) -> int:
    """Layers whose forward runs twice."""
    if recompute.method == "uniform":
        return layers
    return sum(min(recompute.layers, len(own)) for own in sizes.layers_of(layers))


def bubble(sizes: Sizes, micro_batches: int) -> float:
    """Idle time of a pipeline ÷ its working time.

    1f1b and interleaved: (p − 1) ÷ (v · m) (Narayanan et al. 2021); zero_bubble: a third of that, since of forward, backward
    by inputs and backward by weights, which take about the same time, the last fills gaps (Qi et al. 2023, ZB-H1).
    """
    if sizes.pipeline == 1:
        return 0.0
    share = (sizes.pipeline - 1) / (sizes.virtual_pipeline * micro_batches)
    return share / 3 if sizes.schedule == "zero_bubble" else share


@dataclass(frozen=True)
class Efficiency:
    """The share of its peak at which a device computes while it is not idle; how far published runs lie from it, and which."""

    value: float
    source: str
    slowest: float | None = None
    fastest: float | None = None


def efficiency_of(device: Device, given: float | None = None) -> Efficiency:
    """What is given; else what runs on such devices, or on H100s where there are none, reached."""
    if given is not None:
        return Efficiency(given, "--efficiency")
    family = next((name for name in RUNS if device.name.startswith(name)), None)
    found = calibrate(family or "H100")
    source = f"{len(RUNS[found.family])} published {found.family} runs"
    if family is None:
        return Efficiency(found.efficiency, f"{source}; none on {device.name}, so no spread is known")
    return Efficiency(found.efficiency, source, found.slowest, found.fastest)


@dataclass(frozen=True)
class Exchange:
    """What a device sends along one axis in a step: bytes, and seconds at full bandwidth, if nothing else ran meanwhile."""

    axis: str
    size: int
    seconds: float | None
    over: str


def exchange(sent: Sent, sizes: Sizes, device: Device | None) -> list[Exchange]:
    """By axis. Neighbours share a machine: the tensor axis is the innermost."""
    found = []
    for axis in reversed(AXES):
        size = sum(count for (name, _), count in sent.items() if name == axis)
        if not size:
            continue
        inner = AXES[AXES.index(axis) :]
        reach = 1
        for name in inner:
            reach *= getattr(sizes, name)
        outside = device is not None and reach > device.per_node
        rate = None if device is None else device.network if outside else device.link
        over = "" if rate is None else f"{'network' if outside else 'link'}, {rate / 1e9:g} GB/s"
        found.append(Exchange(axis, size, size / rate if rate else None, over))
    return found
