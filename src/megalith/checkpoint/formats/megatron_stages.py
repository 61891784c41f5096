"""Which tensors a pipeline stage of Megatron's files holds: layers are numbered anew in each stage, and in each of its chunks.

    join    stages' chunks, numbered from 0 each ─▶ one model
    divide  one model ─▶ stages of equally many layers; an encoder-decoder's encoder on the first, its decoder on the others

A tower is what stands before `layers.` in a name: `language_model.encoder.`. Knows names, not what they hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from megalith.checkpoint.mapping import Table
from megalith.errors import CheckpointError

T = TypeVar("T")
_LAYER = re.compile(r"(?:^|(?<=\.))layers\.(\d+)\.")


def join(stages: Sequence[Sequence[Mapping[str, T]]]) -> dict[str, T]:
    """`stages[p][v]`: chunk v of stage p, by its own layer numbers → all of it by the whole model's.

    Chunk 0 of all stages comes first, then chunk 1: stage p of an interleaved pipeline holds layers from all over the model.
    Towers are counted apart. A name that several stages have (a tied table) is the first one's.
    """
    found: dict[str, T] = {}
    first: dict[str, int] = {}
    for chunk in range(max(len(stage) for stage in stages)):
        for stage in stages:
            if chunk < len(stage):
                found = {**{_moved(name, first): tensor for name, tensor in stage[chunk].items()}, **found}
                for tower, layers in towers(stage[chunk]).items():
                    first[tower] = first.get(tower, 0) + layers
    return found


def towers(names: Iterable[str]) -> dict[str, int]:
    """Tower → its layers that the names speak of, which are numbered from 0."""
    found: dict[str, int] = {}
    for name in names:
        if match := _LAYER.search(name):
            tower = name[: match.start()]
            found[tower] = max(found.get(tower, 0), 1 + int(match[1]))
    return found


def _moved(name: str, by: Mapping[str, int]) -> str:
    return _LAYER.sub(lambda match: f"layers.{int(match[1]) + by.get(name[: match.start()], 0)}.", name)


def divide(table: Table, names: Sequence[str], stages: int, split: int | None = None) -> list[dict[str, str]]:
    """For each stage the names in its files → the whole model's names. What a tied head needs is copied to the last stage.

    `split`: the first stage of an encoder-decoder's decoder, which has copies of the embedding; None: as `split_of` has it.
    Errors: `CheckpointError` for layers that do not divide.
    """
    counts = towers(names)
    ranges = _ranges(counts, stages, split)
    each = {tower: _each(counts[tower], len(ranges[tower])) for tower in counts}
    found: list[dict[str, str]] = [{} for _ in range(stages)]
    for name in names:
        tower = next((tower for tower in counts if name.startswith(tower)), "")
        if match := _LAYER.search(name):
            step = int(match[1]) // each[tower]
            found[ranges[tower].start + step][_moved(name, {tower: -step * each[tower]})] = name
        elif "embedding" in name:
            for stage in sorted({places.start for places in ranges.values()}):
                found[stage][name] = name
        else:
            found[ranges[tower].stop - 1 if tower else stages - 1][name] = name
    for rule in table.rules if stages > 1 else ():
        if rule.foreign[0] in names and rule.foreign[0] not in found[-1]:
            found[-1].update({copy: rule.foreign[0] for copy in rule.copies if copy not in names})
    return found


def split_of(encoder: int, decoder: int, stages: int) -> int:
    """The first stage of the decoder: the half of the stages, or the nearest one at which so many layers divide."""
    middle = stages // 2
    nearest = sorted(range(1, stages), key=lambda at: abs(at - middle))
    return next((at for at in nearest if not encoder % at and not decoder % (stages - at)), middle)


def _ranges(counts: Mapping[str, int], stages: int, split: int | None) -> dict[str, range]:
    """Tower → its stages."""
    if len(counts) < 2 or stages == 1:
        return dict.fromkeys(counts, range(stages))
    encoder, decoder = sorted(counts, key=lambda tower: "decoder" in tower)
    middle = split_of(counts[encoder], counts[decoder], stages) if split is None else split
    if not 0 < middle < stages:
        raise CheckpointError(f"the decoder cannot begin on stage {middle} of {stages}")
    return {encoder: range(middle), decoder: range(middle, stages)}


def _each(layers: int, stages: int) -> int:
    if layers % stages:
        raise CheckpointError(
            f"{layers} layers do not divide into {stages} pipeline stages",
            fix=f"--pipeline-model-parallel-size ∈ {{{', '.join(str(n) for n in range(1, layers + 1) if layers % n == 0)}}}",
        )
    return layers // stages
