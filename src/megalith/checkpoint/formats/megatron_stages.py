"""Which tensors a pipeline stage of Megatron's files holds: layers are numbered anew in each stage, and in each of its chunks.

    join    stages' chunks, numbered from 0 each ─▶ one model
    divide  one model ─▶ stages of equally many layers

Knows names, not what they hold.
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
    A name that several stages have (a tied table) is the first one's.
    """
    found: dict[str, T] = {}
    first = 0
    for chunk in range(max(len(stage) for stage in stages)):
        for stage in stages:
            if chunk < len(stage):
                found = {**_renumbered(stage[chunk], first), **found}
                first += num_layers(stage[chunk])
    return found


def num_layers(names: Iterable[str]) -> int:
    """Layers that the names speak of, which are numbered from 0."""
    return 1 + max((int(match[1]) for name in names if (match := _LAYER.search(name))), default=-1)


def _renumbered(tensors: Mapping[str, T], by: int) -> dict[str, T]:
    return {_moved(name, by): tensor for name, tensor in tensors.items()}


def _moved(name: str, by: int) -> str:
    return _LAYER.sub(lambda match: f"layers.{int(match[1]) + by}.", name)


def divide(table: Table, names: Sequence[str], stages: int) -> list[dict[str, str]]:
    """For each stage the names in its files → the whole model's names. What a tied head needs is copied to the last stage.

    Errors: `CheckpointError` for layers that do not divide.
    """
    layers = num_layers(names)
    if layers % stages:
        raise CheckpointError(
            f"{layers} layers do not divide into {stages} pipeline stages",
            fix=f"--pipeline-model-parallel-size ∈ {{{', '.join(str(n) for n in range(1, layers + 1) if layers % n == 0)}}}",
        )
    each = layers // stages
    found: list[dict[str, str]] = [{} for _ in range(stages)]
    for name in names:
        match = _LAYER.search(name)
        stage = int(match[1]) // each if match else 0 if "embedding" in name else stages - 1
        found[stage][_moved(name, -stage * each) if match else name] = name
    if stages > 1:
        for rule in table.rules:
            free = [copy for copy in rule.copies if copy not in names]
            if rule.foreign[0] in names:
                found[-1].update(dict.fromkeys(free, rule.foreign[0]))
    return found
