"""How many processes each parallel axis has, and every rule that these numbers must obey.

Knows the arithmetic of layouts. Refuses to know devices, process groups and models: of a model it sees six numbers
(`Divisible`). All problems come back together, each with the values that would be legal, so that nobody mends a layout
one error at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import gcd

from megalith.errors import Problem, TopologyError, UnsupportedError

AXES = ("pipeline", "replicate", "shard", "context", "tensor")
"""Mesh axes, outer to inner: tensor ranks are neighbours. Experts are a second view of the data ranks."""

KEYS = {
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "virtual_pipeline": "virtual_pipeline_model_parallel_size",
    "context": "context_parallel_size",
    "expert": "expert_model_parallel_size",
    "replicate": "data-parallel replicas",
    "shard": "data-parallel shards",
}
"""What the user calls each size."""


@dataclass(frozen=True)
class Divisible:
    """The numbers of a model and its batch that parallel sizes must divide; None: not known, not checked."""

    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    ffn: int | None = None
    experts: int | None = None
    length: int | None = None
    micro_batch: int | None = None
    global_batch: int | None = None


@dataclass(frozen=True)
class Sizes:
    """Sizes of all axes; 1 means that the axis is not there. Only a tuple of numbers: `check` says whether they are legal.

    `replicate` × `shard` is the data-parallel size; `zero_stage` 0 keeps everything whole, 1–3 share optimizer state,
    gradients and weights among the `shard` ranks.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    expert: int = 1
    replicate: int = 1
    shard: int = 1
    sequence_parallel: bool = False
    zero_stage: int = 0

    @property
    def data(self) -> int:
        """Data-parallel size: how many different batches are computed at the same time."""
        return self.replicate * self.shard

    @property
    def world(self) -> int:
        """Number of processes that this layout needs."""
        return self.pipeline * self.data * self.context * self.tensor

    def problems(self, numbers: Divisible | None = None, *, world: int | None = None) -> list[Problem]:
        """Everything that is wrong, in reading order; empty when the layout is legal and built."""
        numbers = numbers or Divisible()
        found = list(self._size_problems())
        if not found:  # products of illegal sizes would only add noise
            found += [
                *self._world_problems(world),
                *self._model_problems(numbers),
                *self._batch_problems(numbers),
            ]
        return found

    def check(self, numbers: Divisible | None = None, *, world: int | None = None) -> None:
        """Raise `TopologyError` with every problem, or `UnsupportedError` for a legal layout that is not built yet."""
        found = self.problems(numbers, world=world)
        if found:
            count = f"{len(found)} problem{'s' if len(found) > 1 else ''} with the parallel sizes"
            raise TopologyError("\n  ".join([count, *map(str, found)]))
        if unbuilt := self.unbuilt():
            raise UnsupportedError("\n  ".join(map(str, unbuilt)))

    def unbuilt(self) -> list[Problem]:
        """Sizes that are legal but that this version cannot run."""
        fix = "use 1; this version runs one process"
        return [
            Problem(key, f"{key} {getattr(self, name)} is not built yet", fix)
            for name, key in KEYS.items()
            if getattr(self, name) > 1
        ]

    # -- the rules, one family each ------------------------------------------------------------------------------

    def _size_problems(self) -> Iterator[Problem]:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in KEYS and value < 1:
                yield Problem(KEYS[field.name], f"{value} is not a size", "a whole number from 1 up")
        if self.zero_stage not in (0, 1, 2, 3):
            yield Problem("zero_stage", f"{self.zero_stage} does not exist", "zero_stage ∈ {0, 1, 2, 3}")

    def _world_problems(self, world: int | None) -> Iterator[Problem]:
        model = self.pipeline * self.context * self.tensor
        if world is not None and world != self.world:
            fix = (
                f"data-parallel size {world // model}"
                if world % model == 0
                else f"a number of processes ∈ {{{model}, {2 * model}, {3 * model}, …}}"
            )
            yield Problem(
                "devices × num_nodes", f"{world} processes, but this layout needs {self.world} ({self})", fix
            )
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            yield Problem(
                KEYS["virtual_pipeline"],
                "interleaving needs a pipeline",
                f"{KEYS['pipeline']} ≥ 2, or 1 here",
            )

    def _model_problems(self, numbers: Divisible) -> Iterator[Problem]:
        heads = gcd(numbers.heads or 0, numbers.kv_heads or numbers.heads or 0)
        names = "heads" if numbers.kv_heads in (None, numbers.heads) else "heads and kv_heads, common divisor"
        yield from self._divides("tensor", heads, names)
        yield from self._divides("tensor", numbers.ffn, "ffn_hidden_size")
        yield from self._divides("expert", numbers.experts, "experts")
        yield from self._divides("expert", self.data, "data-parallel size")
        if self.sequence_parallel:
            yield from self._divides("tensor", numbers.length, "sequence length (sequence_parallel)")
        if (
            self.context > 1
        ):  # every rank takes an early and a late part of the sequence, so that causal work is even
            yield from self._divides("context", (numbers.length or 0) // 2, "half the sequence length")
        stages = self.pipeline * self.virtual_pipeline
        if numbers.layers is not None and stages > numbers.layers:
            where = f"{KEYS['pipeline']} × {KEYS['virtual_pipeline']}"
            yield Problem(where, f"{stages} stages for {numbers.layers} layers", f"at most {numbers.layers}")

    def _divides(self, axis: str, number: int | None, meaning: str) -> Iterator[Problem]:
        size = getattr(self, axis)
        if number and number % size:
            yield Problem(
                KEYS[axis], f"{size} does not divide {meaning} {number}", f"{axis} ∈ {legal(number)}"
            )

    def _batch_problems(self, numbers: Divisible) -> Iterator[Problem]:
        micro, whole = numbers.micro_batch, numbers.global_batch
        if not micro or not whole or whole % (micro * self.data) == 0:
            return
        what = f"{whole} is not a multiple of micro_batch_size {micro} × data-parallel size {self.data}"
        if whole % self.data == 0:
            fix = f"micro_batch_size ∈ {legal(whole // self.data)}"
        else:
            fix = f"a multiple of {self.data}"
        unit = micro * self.data
        below = [whole // unit * unit] if whole > unit else []
        near = " or ".join(map(str, [*below, (whole // unit + 1) * unit]))
        yield Problem("global_batch_size", what, f"{fix}; or global_batch_size {near}")

    def __str__(self) -> str:
        """The axes that exist: 'pipeline 2 × tensor 4'; 'one process' when there are none."""
        parts = [f"{axis} {getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1]
        return " × ".join(parts) or "one process"


def legal(number: int) -> str:
    """Divisors of a number, as a set in words: '{1, 2, 4, 7, 14, 28}'; long lists are shortened in the middle."""
    divisors = [str(d) for d in range(1, number + 1) if number % d == 0]
    if len(divisors) > 12:
        divisors = [*divisors[:8], "…", *divisors[-2:]]
    return "{" + ", ".join(divisors) + "}"
