"""From rehearsals in small to what a rank of the real layout holds and sends.

    many layers a stage     two rehearsals with few, and a straight line through both, phase by phase
    a long pipeline         three ranks stand for the first, those between, and the last
    many micro-batches      those in flight at the same time each keep what one keeps; all are in the batch, or wait to be sent

An encoder-decoder's pipeline is not shortened, for its ranks differ more; on one rank both its towers are rehearsed whole.
Layers of a stage are alike, so the line is exact (tests compare it with whole rehearsals). Knows layouts. Runs nothing itself.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from megalith.tools.plan.ledger import BATCH, P2P
from megalith.tools.plan.rehearsal import ACTIVATIONS, Case, Rehearsal, rehearse
from megalith.topology.sizes import Sizes
from megalith.topology.traffic import Sent

DEEP = 8
"""Layers of a rank above which a line is drawn."""
RANKS = 3
"""Pipeline ranks of a rehearsal: one that is first, one between, one that is last."""


@dataclass(frozen=True)
class Estimate:
    """What the processes of one pipeline rank hold and send. Bytes; see `Rehearsal`.

    `phase`: when the peak is; `in_flight`: micro-batches (of one of its stages each) whose activations are there at once.
    """

    stage: int
    rest: Counter[str]
    peak: Counter[str]
    phase: str
    kept: int
    in_flight: int
    sent: Sent

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.peak.values())

    @property
    def resting(self) -> int:
        """Bytes from step to step."""
        return sum(self.rest.values())


def estimate(case: Case, stage: int = 0) -> Estimate:
    """What the ranks at place `stage` of the pipeline hold and send."""
    sizes = case.sizes
    counts = [len(layers) for layers in sizes.layers_of(*case.model.depths)[stage :: sizes.pipeline]]
    both = len(case.model.depths) > 1 and sizes.pipeline == 1
    lengths = None if both else rehearsed_layers(case, max(counts))
    if lengths is None:
        found = rehearse(*_small(case, stage, counts))
    else:
        short, long = (rehearse(*_small(case, stage, [length] * len(counts))) for length in lengths)
        position = (sum(counts) / len(counts) - lengths[0]) / (lengths[1] - lengths[0])
        found = extrapolate(short, long, position)
    return _whole(case, stage, found)


def rehearsed_layers(case: Case, layers: int) -> tuple[int, int] | None:
    """Two depths that say everything about a depth of `layers`; None where all of them must be rehearsed."""
    how = case.recompute
    group = how.layers if how is not None and how.granularity == "full" and how.method == "uniform" else 1
    if how is not None and how.granularity == "full" and how.method == "block":
        return None
    first = group * -(-3 // group)
    second = first + group * -(-2 // group)
    return None if layers <= max(DEEP, second) or layers % group else (first, second)


def _small(case: Case, stage: int, counts: list[int]) -> tuple[Case, int]:
    """The same rank in a pipeline of at most three, whose ranks have this one's numbers of layers. → (case, its place)"""
    sizes, towers = case.sizes, case.model.depths
    if sizes.pipeline == 1 and len(towers) > 1:
        return case, stage
    whole = len(towers) > 1 or sizes.schedule == "zero_bubble"  # its order is its own
    ranks = sizes.pipeline if whole else min(sizes.pipeline, RANKS)
    layers = tuple(count for count in counts for _ in range(ranks))
    place = (
        stage
        if ranks == sizes.pipeline
        else 0
        if stage == 0
        else ranks - 1
        if stage == sizes.pipeline - 1
        else 1
    )
    small = replace(sizes, pipeline=ranks, layers=layers if ranks > 1 else None)
    update = {"num_layers": sum(layers)}
    if len(towers) > 1:
        split = sizes.stages_of(*towers)[0]
        first = sum(layers[:split])
        update = {"encoder_num_layers": first, "decoder_num_layers": sum(layers) - first}
        small = replace(small, pipeline_split=split)
    model = case.model.model_copy(update=update)
    return replace(case, sizes=small, model=model, micro_batches=_rounds(case, small)), place


def _rounds(case: Case, small: Sizes) -> int:
    """As many micro-batches as the case has, where a shorter pipeline allows it: interleaved ones work in whole rounds."""
    if small.schedule == "1f1b" or small.pipeline == 1:
        return case.micro_batches
    return max(case.micro_batches // small.pipeline, 1) * small.pipeline


def extrapolate(short: Rehearsal, long: Rehearsal, position: float) -> Rehearsal:
    """The point of the line through both; 0 is the first, 1 the second."""

    def line(a: Counter, b: Counter) -> Counter:
        return Counter({key: round(a[key] + (b[key] - a[key]) * position) for key in {*a, *b}})

    return Rehearsal(
        rest=line(short.rest, long.rest),
        peaks={phase: line(short.peaks[phase], long.peaks[phase]) for phase in short.peaks},
        kept=round(short.kept + (long.kept - short.kept) * position),
        sent=line(short.sent, long.sent),
        count=short.count,
    )


def _whole(case: Case, stage: int, found: Rehearsal) -> Estimate:
    """With the micro-batches that are in flight, and of all of them the batch, and what a schedule keeps that it sent."""
    sizes, count = case.sizes, case.micro_batches
    small, place = _small(case, stage, [1] * sizes.virtual_pipeline)
    flying = in_flight(sizes, stage, count)
    more = flying - in_flight(small.sizes, place, found.count)
    sent = found.sent
    if small.micro_batches != count:
        sent = Counter({key: size * count // small.micro_batches for key, size in sent.items()})
    peaks = {}
    for phase, parts in found.peaks.items():
        peaks[phase] = parts.copy()
        if sizes.pipeline > 1:
            peaks[phase][ACTIVATIONS] += more * found.kept
            for part in (P2P, BATCH):
                peaks[phase][part] = round(parts[part] * count / found.count)
    phase = max(peaks, key=lambda name: sum(peaks[name].values()))
    return Estimate(stage, found.rest, peaks[phase], phase, found.kept, flying, sent)


def in_flight(sizes: Sizes, stage: int, count: int) -> int:
    """Micro-batches, of one of its stages each, that a rank keeps activations of at the same time.

    1f1b: as many as there are ranks from here on (Narayanan et al. 2019). Interleaved: the warm-up of Narayanan et al. 2021,
    2·(ranks behind) + (stages − 1)·ranks, and one.
    """
    if sizes.pipeline == 1:
        return 1
    behind = sizes.pipeline - 1 - stage
    if sizes.schedule == "1f1b":
        return min(behind + 1, count)
    warm = 2 * behind + (sizes.virtual_pipeline - 1) * sizes.pipeline
    return min(warm + 1, count * sizes.virtual_pipeline)
