"""FLOPs of a step, the pipeline's idle time, bytes against bandwidths, and how long a step takes.

Two kinds of FLOPs, both by name: *model* FLOPs are what the mathematics needs, *hardware* FLOPs what is computed,
recomputation included. Knows formulas and what was published; measures nothing.

    seconds a step = hardware FLOPs ÷ (devices × peak × efficiency) × (1 + bubble)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

from megalith.engine.flops import Sample, model_flops
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


def flops(model: ModelConfig, sample: Sample, recompute: Recompute | None, sizes: Sizes) -> Flops:
    """`model`: `model_flops`. `hardware`: and the forward of what is computed again, a third of what a layer needs, or of
    what its scores and probabilities need when only attention is.

    With full recomputation, plain attention and ffn = 4 × width that is Megatron-LM's
    96·B·s·L·h²·(1 + s/(6h) + V/(16Lh)) a step (Narayanan et al. 2021).
    """
    needed = model_flops(model, sample).per_token
    if recompute is None:
        return Flops(needed, needed)
    if recompute.granularity == "selective":
        width = model.num_attention_heads * model.head_dim
        return Flops(needed, needed + 4.0 * width * scores(model, sample) / sample.tokens)
    again = recomputed_layers(model.depths, recompute, sizes)
    forwards = [(deeper(model, tower, sample) - needed) / 3 for tower in range(len(model.depths))]
    return Flops(needed, needed + sum(map(mul, again, forwards)))


def deeper(model: ModelConfig, tower: int, sample: Sample) -> float:
    """FLOPs a token where a tower has one layer more: forward and backward, so a third of the difference is a forward."""
    names = ("encoder_num_layers", "decoder_num_layers") if len(model.depths) > 1 else ("num_layers",)
    more = model.model_copy(update={names[tower]: model.depths[tower] + 1})
    return model_flops(more, sample).per_token


def scores(model: ModelConfig, sample: Sample) -> float:
    """Pairs of a query and a key in all layers, of one sample; a decoder's are its own and the encoder's."""
    read, written = sample.length, sample.decoder_length
    each = (read * read,) if len(model.depths) == 1 else (read * read, written * (written + read))
    return sum(map(mul, model.depths, each))


def recomputed_layers(towers: Sequence[int], recompute: Recompute, sizes: Sizes) -> list[int]:
    """Layers of each tower whose forward runs twice."""
    if recompute.method == "uniform":
        return list(towers)
    found, begin = [], 0
    for depth in towers:
        tower = set(range(begin, begin + depth))
        here = [len(tower.intersection(own)) for own in sizes.layers_of(*towers)]
        found.append(sum(min(recompute.layers, count) for count in here))
        begin += depth
    return found


def bubble(sizes: Sizes, micro_batches: int, *, undivided: bool = False) -> float:
    """Idle time of a pipeline ÷ its working time.

    1f1b and interleaved: (p − 1) ÷ (v · m) (Narayanan et al. 2021); zero_bubble: a third of that, since of forward, backward
    by inputs and backward by weights, which take about the same time, the last fills gaps (Qi et al. 2023, ZB-H1), but where
    backwards are `undivided`, as with a relative bias.
    """
    if sizes.pipeline == 1:
        return 0.0
    share = (sizes.pipeline - 1) / (sizes.virtual_pipeline * micro_batches)
    return share / 3 if sizes.schedule == "zero_bubble" and not undivided else share


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
