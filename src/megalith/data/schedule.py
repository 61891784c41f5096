"""How large the global batch is at every step: constant, or ramped up as Megatron's `--rampup-batch-size` does.

```
size = start + ⌊consumed / (samples / N)⌋ · increment   while consumed ≤ samples,   N = (global − start) / increment
```
in double precision, as Megatron computes it. The whole ramp is laid out and checked before the first step. Knows sizes
and counts. Refuses to know what a sample is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megalith.errors import ConfigError, Problem

KEY = "model.rampup_batch_size"


class Stage(NamedTuple):
    """From step `step` (0 is the first), with `consumed` samples read before it, batches have `size` samples."""

    step: int
    consumed: int
    size: int


@dataclass(frozen=True)
class BatchRampUp:
    """Batch sizes from `start` to `global_batch_size` in steps of `increment` over `samples` samples.

    `BatchRampUp.constant(n)` has no ramp. ConfigError, with every problem, where the numbers do not fit.
    """

    start: int
    increment: int
    samples: int
    global_batch_size: int

    def __post_init__(self) -> None:
        problems = self._problems()
        if problems:
            raise ConfigError(problems)

    @classmethod
    def constant(cls, global_batch_size: int) -> BatchRampUp:
        """Batches of one size."""
        return cls(global_batch_size, 1, 0, global_batch_size)

    @classmethod
    def from_config(cls, rampup: Sequence[int] | None, global_batch_size: int) -> BatchRampUp:
        """From `rampup_batch_size: [start, increment, samples]`, or None for a constant size."""
        if rampup is None:
            return cls.constant(global_batch_size)
        if len(rampup) != 3:
            fix = "three numbers: [first batch size, increment, samples over which it grows]"
            raise ConfigError([Problem(KEY, f"{list(rampup)} has {len(rampup)} numbers", fix)])
        start, increment, samples = rampup
        return cls(start, increment, samples, global_batch_size)

    def check(self, micro_batch_size: int, data_size: int) -> None:
        """ConfigError unless every batch size that is reached divides by micro-batch × data-parallel size."""
        unit = micro_batch_size * data_size
        bad = sorted({stage.size for stage in self.stages if stage.size % unit})
        if not bad:
            return
        what = (
            f"micro_batch_size {micro_batch_size} × data-parallel size {data_size} = {unit} does not divide "
            f"the batch size{'s' if len(bad) > 1 else ''} {_short(bad)}"
        )
        if len(self.stages) == 1:
            fix = f"model.global_batch_size: a multiple of {unit}: {_multiples(self.global_batch_size, unit)}"
            raise ConfigError([Problem("model.global_batch_size", what, fix)])
        raise ConfigError([Problem(KEY, what, self._legal(unit))])

    def size_at(self, consumed: int) -> int:
        """Batch size of the step that begins when `consumed` samples are read."""
        if consumed > self.samples or not self._increments:
            return self.global_batch_size
        per_increment = self.samples / self._increments
        level = int(consumed / per_increment) if per_increment else self._increments
        return self.start + level * self.increment

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """Where the size changes, from step 0 on; the last stage lasts for ever."""
        return tuple(self._walk())

    def consumed_at(self, step: int) -> int:
        """Samples read before step `step` (0 is the first) of a run that began with this schedule."""
        stage = self.stages[bisect_right(self.stages, step, key=lambda s: s.step) - 1]
        return stage.consumed + (step - stage.step) * stage.size

    def step_at(self, consumed: int) -> int:
        """The step that begins at `consumed` samples: inverse of `consumed_at`. ValueError inside a batch."""
        step = self.steps_within(consumed)
        if self.consumed_at(step) != consumed:
            raise ValueError(f"{consumed} samples are not a whole number of steps (step {step} begins at "
                             f"{self.consumed_at(step)})")  # fmt: skip
        return step

    def steps_within(self, samples: int) -> int:
        """Whole steps that fit into `samples`: Megatron's iteration count for `--train-samples`."""
        stage = self.stages[bisect_right(self.stages, samples, key=lambda s: s.consumed) - 1]
        return stage.step + (samples - stage.consumed) // stage.size

    @property
    def _increments(self) -> int:
        return (self.global_batch_size - self.start) // self.increment

    def _walk(self) -> Iterator[Stage]:
        step, consumed = 0, 0
        while True:
            size = self.size_at(consumed)
            yield Stage(step, consumed, size)
            steps = self._steps_of_size(consumed, size)
            if steps is None:
                return
            step, consumed = step + steps, consumed + steps * size

    def _steps_of_size(self, consumed: int, size: int) -> int | None:
        """Steps until the size changes; None when it never does. Sizes never shrink, so halving finds the border."""
        low, high = 0, (self.samples - consumed) // size + 1  # behind `samples` the size is the last one
        if self.size_at(consumed + high * size) == size:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            if self.size_at(consumed + middle * size) == size:
                low = middle
            else:
                high = middle
        return high

    def _problems(self) -> list[Problem]:
        problems = []
        if self.global_batch_size < 1:
            what = f"{self.global_batch_size} is not a batch size"
            return [Problem("model.global_batch_size", what, "a whole number above 0")]
        if self.start < 1:
            problems.append(Problem(KEY, f"the first batch size is {self.start}", "a whole number above 0"))
        if self.increment < 1:
            problems.append(Problem(KEY, f"the increment is {self.increment}", "a whole number above 0"))
        if self.samples < 0:
            problems.append(Problem(KEY, f"the length is {self.samples} samples", "0 or more"))
        gap = self.global_batch_size - self.start
        if gap < 0:
            what = f"the first batch size {self.start} is above global_batch_size {self.global_batch_size}"
            problems.append(Problem(KEY, what, f"at most {self.global_batch_size}"))
        elif self.increment > 0 and gap % self.increment:
            what = f"{self.increment} does not divide global_batch_size {self.global_batch_size} − first {self.start}"
            problems.append(Problem(KEY, what, "an increment among " + _short(_divisors(gap))))
        return problems

    def _legal(self, unit: int) -> str:
        if self.global_batch_size % unit:
            sizes = _multiples(self.global_batch_size, unit)
            return f"model.global_batch_size first: a multiple of {unit}: {sizes}"
        starts = range(unit, self.global_batch_size + 1, unit)
        start = self.start if self.start % unit == 0 else min(starts, key=lambda s: abs(s - self.start))
        increments = [d for d in _divisors(self.global_batch_size - start) if d % unit == 0]
        return (
            f"first batch size among {_short(starts)}; with first {start}, increments {_short(increments)}"
            if increments
            else f"first batch size among {_short(starts)}; with first {start} there is no ramp: drop the key"
        )


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _multiples(near: int, unit: int) -> str:
    below = near // unit * unit
    return " or ".join(str(n) for n in (below, below + unit) if n > 0)


def _short(numbers: Sequence[int]) -> str:
    shown = [str(number) for number in numbers]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:6], "…", shown[-1]])
