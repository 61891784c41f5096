"""How many processes each parallel axis has, and every rule that these numbers must obey.

Knows the arithmetic of layouts. Refuses to know devices, process groups and models: of a model it sees six numbers
(`Divisible`). All problems come back together, each with the values that would be legal, so that nobody mends a layout
one error at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from math import gcd, lcm
from typing import Literal

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
SPLIT = "pipeline_model_parallel_split_rank"
"""What the user calls `Sizes.pipeline_split`."""

PipelineSchedule = Literal["1f1b", "interleaved", "zero_bubble"]
POLICIES = ("replicate", "shard_optimizer", "shard_grads", "shard_all")
"""What data-parallel ranks share, by `zero_stage`."""


@dataclass(frozen=True)
class Divisible:
    """The numbers of a model and its batch that parallel sizes must divide; None: not known, not checked.

    Of an encoder-decoder `layers` and `length` are pairs, the encoder's first.
    """

    layers: int | tuple[int, ...] | None = None
    heads: int | None = None
    kv_heads: int | None = None
    ffn: int | None = None
    vocab: int | None = None
    """Rows of the padded token table."""
    experts: int | None = None
    length: int | tuple[int, ...] | None = None
    micro_batch: int | None = None
    global_batch: int | None = None

    @property
    def towers(self) -> tuple[int, ...]:
        """Layers of each tower; none when they are not known."""
        return _each(self.layers)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the sequences that a sample has."""
        return _each(self.length)


@dataclass(frozen=True)
class Sizes:
    """Sizes of all axes; 1 means that the axis is not there. Only a tuple of numbers: `check` says whether they are legal.

    `replicate` × `shard` is the data-parallel size; `zero_stage` 0 keeps everything whole, 1–3 share optimizer state,
    gradients and weights among the `shard` ranks and their context ranks, which hold the same weights. `layers` are the
    numbers of layers of each stage, first to last (None: as even as they can be). `overlap` starts reducing gradients while backward still runs.

    An encoder-decoder has two towers, and no stage holds layers of both: the first `pipeline_split` stages hold the encoder's,
    the others the decoder's (None: in proportion to their layers).
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
    schedule: PipelineSchedule = "1f1b"
    layers: tuple[int, ...] | None = None
    pipeline_split: int | None = None
    overlap: bool = True
    offload: bool = False
    """Keep what data-parallel ranks share in the host's memory."""

    def fit(self, world: int, *, shard: int | None = None) -> Sizes:
        """These sizes with the data-parallel ranks that `world` processes leave; `shard` of them share (None: all).

        With `zero_stage` 0 nothing is shared. Where they do not fit, `problems(world=…)` says so.
        """
        data = max(world // (self.pipeline * self.context * self.tensor), 1)
        among = (shard or data) if self.zero_stage else 1
        return replace(self, replicate=max(data // among, 1), shard=among)

    @property
    def policy(self) -> str:
        """The name of `zero_stage`."""
        return POLICIES[self.zero_stage]

    @property
    def stages(self) -> int:
        """Number of pipeline stages, over all ranks."""
        return self.pipeline * self.virtual_pipeline

    def stages_of(self, *towers: int) -> tuple[int, ...]:
        """How many stages hold each of the towers with so many layers. One stage holds all there is."""
        if self.stages == 1 or len(towers) == 1:
            return (self.stages,)
        first, second = towers
        if self.pipeline_split is not None:
            split = self.pipeline_split
        elif self.layers is not None:
            split = sum(end <= first for end in accumulate(self.layers))
        else:  # a half goes to the decoder, whose layers are the heavier ones
            split = -((first + second - 2 * self.stages * first) // (2 * (first + second)))
            split = min(max(split, 1, self.stages - second), self.stages - 1, first)
        return split, self.stages - split

    def layers_of(self, *towers: int) -> list[range]:
        """Which layers each stage has, of one tower or two with so many layers, which are counted through."""
        depths = towers if self.stages > 1 else (sum(towers),)
        counts = self.layers or [
            depth * (i + 1) // stages - depth * i // stages
            for depth, stages in zip(depths, self.stages_of(*depths), strict=True)
            for i in range(stages)
        ]
        return [range(end - count, end) for end, count in zip(accumulate(counts), counts, strict=True)]

    @property
    def data(self) -> int:
        """Data-parallel size: how many different batches are computed at the same time."""
        return self.replicate * self.shard

    @property
    def copies(self) -> int:
        """Over how many processes a gradient is summed: those with other samples, or another part of the same ones."""
        return self.data * self.context

    @property
    def sharing(self) -> int:
        """How many of these processes share what `zero_stage` names."""
        return self.shard * self.context if self.zero_stage or self.shard > 1 else 1

    @property
    def world(self) -> int:
        """Number of processes that this layout needs."""
        return self.pipeline * self.data * self.context * self.tensor

    def problems(
        self, numbers: Divisible | None = None, *, world: int | None = None, compiled: bool = False
    ) -> list[Problem]:
        """Everything that is wrong, in reading order; empty when the layout is legal and built."""
        numbers = numbers or Divisible()
        found = list(self._size_problems())
        if not found:  # products of illegal sizes would only add noise
            found += [
                *self._world_problems(world),
                *self._model_problems(numbers),
                *self._stage_problems(numbers),
                *self._schedule_problems(compiled),
                *self._batch_problems(numbers),
            ]
        return found

    def check(
        self, numbers: Divisible | None = None, *, world: int | None = None, compiled: bool = False
    ) -> None:
        """Raise `TopologyError` with every problem, or `UnsupportedError` for a legal layout that is not built yet."""
        found = self.problems(numbers, world=world, compiled=compiled)
        if found:
            count = f"{len(found)} problem{'s' if len(found) > 1 else ''} with the parallel sizes"
            raise TopologyError("\n  ".join([count, *map(str, found)]))
        if unbuilt := self.unbuilt():
            raise UnsupportedError("\n  ".join(map(str, unbuilt)))

    def unbuilt(self) -> list[Problem]:
        """Sizes that are legal but that this version cannot run."""
        return [
            Problem(KEYS[name], f"{KEYS[name]} {getattr(self, name)} is not built yet", "use 1")
            for name in ("expert",)
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

    def _stage_problems(self, numbers: Divisible) -> Iterator[Problem]:
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            yield Problem(
                KEYS["virtual_pipeline"],
                "interleaving needs a pipeline",
                f"{KEYS['pipeline']} ≥ 2, or 1 here",
            )
        if self.layers is None:
            yield from self._even_stage_problems(numbers.towers)
            return
        given, whole = ", ".join(map(str, self.layers)), sum(numbers.towers)
        if len(self.layers) != self.stages:
            what = f"{len(self.layers)} numbers of layers ({given}) for {self.stages} stages"
            yield Problem("pipeline_layers", what, f"{self.stages} numbers")
        if min(self.layers, default=1) < 1:
            yield Problem("pipeline_layers", f"a stage without layers ({given})", "numbers from 1 up")
        if numbers.towers and sum(self.layers) != whole:
            what = f"{given} make {sum(self.layers)} layers, the model has {whole}"
            yield Problem("pipeline_layers", what, f"numbers that add up to {whole}")
        elif len(numbers.towers) == 2 and self.stages > 1:
            yield from self._split_problems(numbers.towers, self.layers)

    def _even_stage_problems(self, towers: tuple[int, ...]) -> Iterator[Problem]:
        where = f"{KEYS['pipeline']} × {KEYS['virtual_pipeline']}"
        if towers and self.stages > sum(towers):
            what = f"{self.stages} stages for {' + '.join(map(str, towers))} layers"
            yield Problem(where, what, f"at most {sum(towers)}")
        elif len(towers) == 2 and self.stages > 1 and self.pipeline_split is not None:
            first, second = towers
            low, high = max(1, self.stages - second), min(first, self.stages - 1)
            if not low <= self.pipeline_split <= high:
                what = f"{self.pipeline_split} of {self.stages} stages for the encoder's {first} layers, the rest for the decoder's {second}"
                yield Problem(SPLIT, what, f"{low}" if low == high else f"{low} to {high}")

    def _split_problems(self, towers: tuple[int, ...], layers: tuple[int, ...]) -> Iterator[Problem]:
        """A stage works on one sequence: it has layers of the encoder, or of the decoder."""
        first, second = towers
        ends, given = list(accumulate(layers)), ", ".join(map(str, layers))
        if first not in ends:
            what = f"with {given} a stage has layers of the encoder, which has {first}, and of the decoder"
            fix = f"numbers of which the first few add up to {first} and the others to {second}"
            yield Problem("pipeline_layers", what, fix)
        elif self.pipeline_split not in (None, split := ends.index(first) + 1):
            what = f"{self.pipeline_split}, but with pipeline_layers {given} the encoder has {split} stages"
            yield Problem(SPLIT, what, f"{split} or null")

    def _schedule_problems(self, compiled: bool) -> Iterator[Problem]:
        """Which schedules exist for which stages, and what torch 2.13 cannot do (the weight half of a split backward
        finds neither resharded weights nor the inside of a compiled graph)."""
        if self.zero_stage == 3 and self.sharing > 1 and not self.overlap:
            what = "false gathers all weights at once, which zero_stage 3 is there to avoid"
            yield Problem("overlap_grad_reduce", what, "overlap_grad_reduce true, or zero_stage ≤ 2")
        if self.pipeline == 1:
            return
        if self.schedule == "1f1b" and self.virtual_pipeline > 1:
            fix = "pipeline_schedule interleaved or zero_bubble, or one stage a rank"
            yield Problem("pipeline_schedule", "1f1b runs one stage a rank", fix)
        if self.schedule == "interleaved" and self.virtual_pipeline == 1:
            fix = f"{KEYS['virtual_pipeline']} ≥ 2, or pipeline_schedule 1f1b"
            yield Problem("pipeline_schedule", "nothing to interleave: one stage a rank", fix)
        if self.schedule == "zero_bubble" and self.zero_stage == 3 and self.sharing > 1:
            what = "zero_bubble loses weight gradients where weights are shared (zero_stage 3)"
            yield Problem(
                "pipeline_schedule", what, "zero_stage ≤ 2, or pipeline_schedule interleaved or 1f1b"
            )
        if self.schedule == "zero_bubble" and compiled:
            what = "zero_bubble splits the backward, which a compiled block cannot"
            yield Problem(
                "pipeline_schedule", what, "compile=false, or pipeline_schedule interleaved or 1f1b"
            )

    def _model_problems(self, numbers: Divisible) -> Iterator[Problem]:
        heads = gcd(numbers.heads or 0, numbers.kv_heads or numbers.heads or 0)
        names = "heads" if numbers.kv_heads in (None, numbers.heads) else "heads and kv_heads, common divisor"
        yield from self._divides("tensor", heads, names)
        yield from self._divides("tensor", numbers.ffn, "ffn_hidden_size")
        yield from self._divides("tensor", numbers.vocab, "the padded vocabulary")
        yield from self._divides("expert", numbers.experts, "experts")
        yield from self._divides("expert", self.data, "data-parallel size")
        if self.context > 1:
            for length in numbers.lengths:
                yield from self._context_problems(length)
        elif self.sequence_parallel:
            for length in numbers.lengths:
                yield from self._divides("tensor", length, "sequence length (sequence_parallel)")

    def _context_problems(self, length: int) -> Iterator[Problem]:
        """Every rank takes an early and a late chunk, so that causal work is even; tensor ranks cut both together."""
        pieces = lcm(2, self.tensor if self.sequence_parallel else 1)
        if length % (pieces * self.context) == 0:
            return
        why = f"sequence length {length} cannot be cut into {pieces} equal parts on each of {self.context} ranks"
        if length % pieces == 0:
            fix = f"context ∈ {legal(length // pieces)}"
        else:
            fix = f"a length that is a multiple of {pieces * self.context}"
        yield Problem(KEYS["context"], why, fix)

    def _divides(self, axis: str, number: int | None, meaning: str) -> Iterator[Problem]:
        size = getattr(self, axis)
        if number and number % size:
            yield Problem(
                KEYS[axis], f"{size} does not divide {meaning} {number}", f"{axis} ∈ {legal(number)}"
            )

    def _batch_problems(self, numbers: Divisible) -> Iterator[Problem]:
        micro, whole = numbers.micro_batch, numbers.global_batch
        if not micro or not whole:
            return
        if whole % (micro * self.data) == 0:
            yield from self._micro_batch_problems(whole // (micro * self.data), micro)
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

    def _micro_batch_problems(self, count: int, micro: int) -> Iterator[Problem]:
        """An interleaved pipeline works in whole rounds; 1f1b does with any number, at the price of idle stages."""
        if self.pipeline == 1 or self.schedule == "1f1b" or count % self.pipeline == 0:
            return
        unit = micro * self.data
        what = f"{count} micro-batches, but {self.schedule} works in rounds of {self.pipeline}"
        rounds = count // self.pipeline
        near = [n * self.pipeline * unit for n in (rounds, rounds + 1) if n]
        yield Problem("global_batch_size", what, f"global_batch_size {' or '.join(map(str, near))}")

    def __str__(self) -> str:
        """The axes that exist: 'pipeline 2 × tensor 4'; 'one process' when there are none."""
        parts = [f"{axis} {getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1]
        return " × ".join(parts) or "one process"

    def describe(self) -> str:
        """The axes, and how each works: 'pipeline 2 (interleaved, 2 stages a rank) × tensor 2 (sequence parallel)'."""
        how = {
            "pipeline": self.schedule
            + (f", {self.virtual_pipeline} stages a rank" if self.virtual_pipeline > 1 else ""),
            "tensor": "sequence parallel" if self.sequence_parallel else "",
            "shard": self.policy,
        }
        parts = [
            f"{axis} {getattr(self, axis)}" + (f" ({how[axis]})" if how.get(axis) else "")
            for axis in AXES
            if getattr(self, axis) > 1
        ]
        return " × ".join(parts) or "one process"


def _each(number: int | tuple[int, ...] | None) -> tuple[int, ...]:
    if number is None:
        return ()
    return (number,) if isinstance(number, int) else number


def legal(number: int) -> str:
    """Divisors of a number, as a set in words: '{1, 2, 4, 7, 14, 28}'; long lists are shortened in the middle."""
    divisors = [str(d) for d in range(1, number + 1) if number % d == 0]
    if len(divisors) > 12:
        divisors = [*divisors[:8], "…", *divisors[-2:]]
    return "{" + ", ".join(divisors) + "}"
