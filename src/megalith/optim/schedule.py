"""Learning rate and weight decay as pure functions of counters: nothing to save, nothing to step.

Knows Megatron-LM's formulas (functions of steps, samples or tokens of *successful* updates) and NeMo 1.x's (functions of
the step). Knows no optimizer, and how long the run is only from `make_schedule`'s arguments.

    counters of the successful updates so far ─┐
                                               ├─▶ n ─▶ warm-up │ decay │ floor ─▶ learning rate of this update
    counters of this update (first_step: one) ─┘

Megatron's own curves give the very first update the learning rate 0, because they take n *before* the update
(`first_step="zero"`). The default here is n *after* it (`"one"`). NeMo's generic warm-up, (s+1)/(W+1), never starts at 0 and
ignores the switch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from megalith.errors import ConfigError, Problem
from megalith.optim.config import COUNTER_CURVES, OptimConfig, SchedConfig, Unit


@dataclass(frozen=True)
class Counters:
    """How far training has come. A skipped update (non-finite gradients) adds nothing."""

    step: int = 0
    samples: int = 0
    tokens: int = 0

    def __add__(self, other: Counters) -> Counters:
        return Counters(self.step + other.step, self.samples + other.samples, self.tokens + other.tokens)


@dataclass(frozen=True)
class Curve:
    """Numbers of one learning-rate curve, lengths all in one unit, counted from the start of the run."""

    peak: float
    floor: float
    warmup: float
    end: float
    """Where the curve ends: the run for NeMo's shapes, the decay for Megatron's."""
    tail: float = 0
    power: float = 1.0
    width: int = 1


# -- NeMo 1.x: s = steps before this one, W warm-up, S length of the run -----------------------------------------


def _generic(decay: Callable[[Curve, float], float]) -> Callable[[Curve, float], float]:
    """NeMo's warm-up policy around a decay: peak·(s+1)/(W+1) up to s = W, the floor after S."""

    def curve(c: Curve, s: float) -> float:
        if c.warmup > 0 and s <= c.warmup:
            return c.peak * (s + 1) / (c.warmup + 1)
        return c.floor if s > c.end else decay(c, s)

    return curve


def _cosine(c: Curve, s: float) -> float:
    ratio = (s - c.warmup) / (c.end - c.warmup)
    return (c.peak - c.floor) * 0.5 * (1 + math.cos(math.pi * ratio)) + c.floor


def _cosine_with_tail(c: Curve, s: float) -> float:
    """`constant_steps` > 0: warm-up from exactly 0, cosine over S − W − C steps, then C steps at the floor."""
    return _warm_then(c, s, c.end - c.tail, lambda r: 0.5 * (math.cos(math.pi * r) + 1.0))


def _falling_line(c: Curve, s: float) -> float:
    ratio = (s - c.warmup) / (c.end - c.warmup)
    return c.floor + (1 - ratio) * (c.peak - c.floor)


def _square_root(c: Curve, s: float) -> float:
    return max(c.peak * math.sqrt((c.end - s) / c.end), c.floor)


def _polynomial(c: Curve, s: float) -> float:
    ratio = (s - c.warmup) / (c.end - c.warmup)
    return (c.peak - c.floor) * (1.0 - ratio) ** c.power + c.floor


def _inverse_square_root(c: Curve, s: float) -> float:
    return c.peak / math.sqrt((s + 1) / (c.warmup + 1))


def _noam(c: Curve, s: float) -> float:
    """Vaswani et al. 2017, §5.3, scaled by the peak; the floor counts after the warm-up only."""
    s = max(1, s)
    lr = c.peak * c.width**-0.5 * (min(s**-0.5, s * c.warmup**-1.5) if c.warmup else s**-0.5)
    return max(lr, c.floor) if s > c.warmup else lr


# -- Megatron-LM: n = steps, samples or tokens of successful updates ----------------------------------------------


def _warm_then(c: Curve, n: float, end: float, coefficient: Callable[[float], float]) -> float:
    if c.warmup > 0 and n <= c.warmup:
        return c.peak * n / c.warmup
    if n > end or end <= c.warmup:
        return c.floor
    return c.floor + (c.peak - c.floor) * coefficient((n - c.warmup) / (end - c.warmup))


def _megatron_linear(c: Curve, n: float) -> float:
    return _warm_then(c, n, c.end, lambda r: 1.0 - r)


def _megatron_cosine(c: Curve, n: float) -> float:
    return _warm_then(c, n, c.end, lambda r: 0.5 * (math.cos(math.pi * r) + 1.0))


def _megatron_constant(c: Curve, n: float) -> float:
    return c.peak * n / c.warmup if c.warmup > 0 and n <= c.warmup else c.peak


def _megatron_inverse_square_root(c: Curve, n: float) -> float:
    if c.warmup > 0 and n <= c.warmup:
        return c.peak * n / c.warmup
    if n > c.end:
        return c.floor
    return max(c.floor, c.peak * math.sqrt(max(c.warmup, 1)) / math.sqrt(max(n, 1)))


_CURVES: dict[str, Callable[[Curve, float], float]] = {
    "CosineAnnealing": _generic(_cosine),
    "CosineAnnealing with constant_steps": _cosine_with_tail,
    "WarmupAnnealing": _generic(_falling_line),
    "SquareRootAnnealing": _generic(_square_root),
    "PolynomialDecayAnnealing": _generic(_polynomial),
    "InverseSquareRootAnnealing": _generic(_inverse_square_root),
    "NoamAnnealing": _noam,
    "linear": _megatron_linear,
    "cosine": _megatron_cosine,
    "constant": _megatron_constant,
    "inverse-square-root": _megatron_inverse_square_root,
}
_COUNT_THE_UPDATE = ("CosineAnnealing with constant_steps", "NoamAnnealing", *COUNTER_CURVES)
"""Curves that would give the first update 0 (or count it twice): these obey `first_step`."""


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay of the next update. Made by `make_schedule`."""

    name: str
    curve: Curve
    unit: Unit
    per_step: Counters
    """What one full step adds; `lr(done)` assumes it for the update it is asked about."""
    total: Counters
    """What the whole run will have counted."""
    first_step: Literal["zero", "one"]
    decay_from: float
    decay_to: float
    decay_style: str
    warnings: tuple[str, ...] = ()

    def lr(self, done: Counters, this: Counters | None = None) -> float:
        """Learning rate of an update, where `done` counts the successful updates before it and `this` the update itself."""
        if self.name in _COUNT_THE_UPDATE and self.first_step == "one":
            done = done + (this or self.per_step)
        return _CURVES[self.name](self.curve, self._count(done))

    def weight_decay(self, done: Counters, this: Counters | None = None) -> float:
        """Weight decay of an update: constant, or from start to end over the run along a line or half a cosine."""
        if self.decay_style == "constant":
            return self.decay_to
        if self.first_step == "one":
            done = done + (this or self.per_step)
        ratio = min(1.0, self._count(done) / self._count(self.total))
        if self.decay_style == "cosine":
            ratio = 0.5 * (math.cos(math.pi * (1 - ratio)) + 1.0)
        return self.decay_from + (self.decay_to - self.decay_from) * ratio

    def _count(self, counters: Counters) -> float:
        if self.unit != "steps":
            return getattr(counters, self.unit)
        # Megatron counts samples also when it is told steps; only its inverse square root without a warm-up can tell.
        return counters.step * self.per_step.samples if self.name in COUNTER_CURVES else counters.step


def make_schedule(
    config: OptimConfig,
    *,
    max_steps: int,
    global_batch: int,
    sequence_length: int = 1,
    total_samples: int | None = None,
    first_step: Literal["zero", "one"] = "one",
    width: int | None = None,
) -> Schedule:
    """The schedule of a run of `max_steps` steps of `global_batch` samples of `sequence_length` tokens.

    `total_samples` is needed only under a batch ramp-up (default max_steps · global_batch). `width` is the model's, for Noam.
    A schedule without a decay phase is legal (the originals ran it) and noted in `.warnings`. Errors: `ConfigError`.
    """
    sched = config.sched
    _refuse(config)
    samples = total_samples if total_samples is not None else max_steps * global_batch
    total = Counters(max_steps, samples, samples * sequence_length)
    name = sched.name
    if name == "CosineAnnealing" and sched.constant_steps:
        name = "CosineAnnealing with constant_steps"
    curve = _make_curve(config, total, global_batch, width)
    schedule = Schedule(
        name=name,
        curve=curve,
        unit=sched.unit,
        per_step=Counters(1, global_batch, global_batch * sequence_length),
        total=total,
        first_step=first_step,
        decay_from=config.weight_decay if config.start_weight_decay is None else config.start_weight_decay,
        decay_to=config.weight_decay if config.end_weight_decay is None else config.end_weight_decay,
        decay_style=config.weight_decay_incr_style,
    )
    return replace(schedule, warnings=_warnings(schedule, sched))


def _refuse(config: OptimConfig) -> None:
    """What `compose` refuses anyway, for those who build sections in Python."""
    found = [replace(p, where=f"model.optim.{p.where}") for p in config.problems()]
    found += [replace(p, where=f"model.optim.sched.{p.where}") for p in config.sched.problems()]
    errors = [problem for problem in found if problem.severity == "error"]
    if errors:
        raise ConfigError(errors)


def _make_curve(config: OptimConfig, total: Counters, global_batch: int, width: int | None) -> Curve:
    sched = config.sched
    megatron = sched.name in COUNTER_CURVES
    unit = sched.unit
    scale = global_batch if megatron and unit == "steps" else 1
    length = {"steps": total.step, "samples": total.samples, "tokens": total.tokens}[unit]
    end = (getattr(sched, f"decay_{unit}") or length) if megatron else length
    warmup = getattr(sched, f"warmup_{unit}")
    if warmup is None:
        warmup = sched.warmup_ratio * end if sched.warmup_ratio else 0
        warmup = warmup if megatron else int(warmup)
    width = sched.d_model or width
    if sched.name == "NoamAnnealing" and width is None:
        raise ConfigError(
            [Problem("model.optim.sched.d_model", "NoamAnnealing needs a width", "give d_model")]
        )
    return Curve(
        peak=config.lr,
        floor=sched.min_lr,
        warmup=warmup * scale,
        end=end * scale,
        tail=sched.constant_steps,
        power=sched.power,
        width=width or 1,
    )


def _warnings(schedule: Schedule, sched: SchedConfig) -> tuple[str, ...]:
    curve = schedule.curve
    if sched.name in ("constant", "InverseSquareRootAnnealing", "NoamAnnealing", "inverse-square-root"):
        return ()
    decay = curve.end - curve.tail * (sched.name == "CosineAnnealing") - curve.warmup
    if decay > 0:
        return ()
    unit = schedule.per_step.samples if schedule.unit == "steps" and sched.name in COUNTER_CURVES else 1
    text = (
        f"the learning-rate schedule {sched.name} has no decay phase: {curve.end / unit:g} {schedule.unit}, "
        f"warm-up {curve.warmup / unit:g}"
        + (f", tail {curve.tail:g}" if curve.tail else "")
        + f" leave {decay / unit:g} to decay in. It rises to {curve.peak:g} and drops to {curve.floor:g} at once."
    )
    return (text,)
