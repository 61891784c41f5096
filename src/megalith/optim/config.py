"""The sections `model.optim` and `model.optim.sched`: which optimizer, which learning-rate curve.

Knows the keys, their meanings and which of them exclude each other. Knows neither torch nor how long a run is:
lengths that default to the run's are `None` here and filled in by `schedule.make_schedule`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from megalith.config.schema import (
    Finding,
    ForeignKey,
    Section,
    error,
    ignored,
    refused,
    renamed,
    setting,
    warning,
)

STEP_CURVES = (
    "CosineAnnealing",
    "WarmupAnnealing",
    "SquareRootAnnealing",
    "PolynomialDecayAnnealing",
    "InverseSquareRootAnnealing",
    "NoamAnnealing",
)
"""NeMo's curves: functions of the step alone."""
COUNTER_CURVES = ("linear", "cosine", "constant", "inverse-square-root")
"""Megatron's curves: functions of steps, samples or tokens."""

CurveName = Literal[
    "CosineAnnealing",
    "WarmupAnnealing",
    "SquareRootAnnealing",
    "PolynomialDecayAnnealing",
    "InverseSquareRootAnnealing",
    "NoamAnnealing",
    "linear",
    "cosine",
    "constant",
    "inverse-square-root",
]
Unit = Literal["steps", "samples", "tokens"]


class SchedConfig(Section):
    """The learning rate (and nothing else) as a function of how far training has come."""

    foreign_keys: ClassVar[Mapping[str, ForeignKey]] = {
        "warmup_fraction": renamed("warmup_ratio"),
        "monitor": ignored("no schedule here watches a metric"),
        "reduce_on_plateau": refused("no schedule here watches a metric"),
        "hold_steps": refused("a plateau at the peak is not built; constant_steps is a tail at min_lr"),
        "constant_ratio": refused("give the tail in steps: constant_steps"),
        "max_steps": ignored("trainer.max_steps is the length of the run, as in NeMo"),
        "iters_per_batch": ignored("schedules count steps"),
        "args": ignored("the keys of the schedule stand beside its name"),
        "cycle": ignored(
            "the decay ends with the run, so there is nothing left to start again in (nor has it an effect in NeMo)"
        ),
    }
    null_means: ClassVar[Mapping[str, Any] | None] = {"name": "constant"}
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("warmup_steps", "warmup_samples", "warmup_tokens", "warmup_ratio"),
    )

    name: CurveName = setting(
        "CosineAnnealing",
        "Shape of the learning rate: NeMo's names (functions of the step) or Megatron's lr-decay-style "
        "(linear, cosine, constant, inverse-square-root: functions of steps, samples or tokens).",
    )
    min_lr: float = setting(0.0, "The learning rate never decays below this.", ge=0)
    warmup_steps: int | None = setting(None, "Length of the linear warm-up.", unit="steps", ge=0)
    warmup_samples: int | None = setting(
        None, "The same in samples (Megatron's shapes).", unit="samples", ge=0
    )
    warmup_tokens: int | None = setting(None, "The same in tokens (Megatron's shapes).", unit="tokens", ge=0)
    warmup_ratio: float | None = setting(
        None, "Warm-up as a fraction of the run (NeMo) or of the decay length (Megatron).", ge=0, le=1
    )
    constant_steps: int = setting(
        0, "CosineAnnealing only: steps spent at min_lr at the end of the run (a tail, not a plateau at the peak).",
        unit="steps", ge=0,
    )  # fmt: skip
    decay_steps: int | None = setting(
        None, "Megatron's shapes: where the decay ends, counted from the start of the run. Default: the whole run.",
        unit="steps", gt=0,
    )  # fmt: skip
    decay_samples: int | None = setting(None, "The same in samples.", unit="samples", gt=0)
    decay_tokens: int | None = setting(None, "The same in tokens.", unit="tokens", gt=0)
    by: Unit | None = setting(
        None,
        "What Megatron's shapes count. Default: the unit of the warmup_* and decay_* keys given, else steps.",
    )
    power: float = setting(1.0, "PolynomialDecayAnnealing only: the exponent.", gt=0)
    d_model: int | None = setting(
        None, "NoamAnnealing only: the width whose inverse root scales the curve. Default: the model's.", gt=0
    )
    last_epoch: Literal[-1] = setting(-1, "Accepted for NeMo's files; the step comes from the checkpoint.")

    @property
    def unit(self) -> Unit:
        """What the curve counts: `by`, else the unit of the lengths that were given, else steps."""
        return self.by or next(iter(self._units()), "steps")

    def _units(self) -> list[Unit]:
        named: dict[Unit, tuple[Any, ...]] = {
            "steps": (self.warmup_steps, self.decay_steps),
            "samples": (self.warmup_samples, self.decay_samples),
            "tokens": (self.warmup_tokens, self.decay_tokens),
        }
        return [unit for unit, values in named.items() if any(v is not None for v in values)]

    def problems(self) -> Iterable[Finding]:
        """Lengths in two units, two warm-ups, or a unit that the shape cannot count."""
        units = self._units()
        if len(units) > 1:
            yield error(
                "warmup_steps", f"the schedule mixes {' and '.join(units)}", "give every length in one unit"
            )
        elif self.by and units and self.by != units[0]:
            yield error("by", f"is {self.by}, but lengths are given in {units[0]}", "leave `by` out")
        if self.unit != "steps" and self.name in STEP_CURVES:
            yield error(
                "name",
                f"{self.name} counts steps, not {self.unit}",
                f"{', '.join(COUNTER_CURVES)} count {self.unit}",
            )
        counts = {f"warmup_{u}": getattr(self, f"warmup_{u}") for u in ("steps", "samples", "tokens")}
        given = [name for name, value in counts.items() if value is not None]
        if self.warmup_ratio is not None and given:
            yield error(
                "warmup_ratio", f"and {given[0]} are both given", "~model.optim.sched.warmup_ratio drops one"
            )
        yield from (warning(key, f"has no effect on {self.name}") for key in self._idle())

    def _idle(self) -> Iterable[str]:
        """Keys that were given and that this shape does not read."""
        readers = {
            "constant_steps": ("CosineAnnealing",),
            "power": ("PolynomialDecayAnnealing",),
            "d_model": ("NoamAnnealing",),
            "decay_steps": COUNTER_CURVES,
        }
        for key, names in readers.items():
            if self.name not in names and getattr(self, key) != type(self).model_fields[key].default:
                yield key


class OptimConfig(Section):
    """The optimizer, its numbers, and its schedule."""

    name: Literal["fused_adam", "adamw", "adam", "sgd"] = setting(
        "fused_adam",
        "fused_adam and adamw are AdamW (decoupled weight decay; Megatron's `adam`), adam adds the decay to the "
        "gradient (NeMo's and torch's `adam`), sgd has momentum.",
    )
    lr: float = setting(2e-4, "Peak learning rate.", ge=0)
    weight_decay: float = setting(
        0.01, "Weight decay of matrices; biases and 1-D parameters have none.", ge=0
    )
    betas: tuple[float, float] = setting((0.9, 0.999), "Adam: decay of the first and second moments.")
    eps: float = setting(1e-8, "Adam: added to the root of the second moment.", gt=0)
    momentum: float = setting(0.9, "sgd: momentum.", ge=0, lt=1)
    start_weight_decay: float | None = setting(
        None, "Weight decay at the first step; default weight_decay.", ge=0
    )
    end_weight_decay: float | None = setting(
        None, "Weight decay at the last step; default weight_decay.", ge=0
    )
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = setting(
        "constant", "How weight decay goes from start_weight_decay to end_weight_decay."
    )
    sched: SchedConfig = setting(SchedConfig, "The learning-rate schedule.")

    def problems(self) -> Iterable[Finding]:
        """Numbers that contradict each other."""
        if not all(0 <= beta < 1 for beta in self.betas):
            yield error("betas", f"{list(self.betas)} must lie in [0, 1)")
        if self.sched.min_lr > self.lr:
            yield error(
                "sched.min_lr", f"{self.sched.min_lr:g} is above lr {self.lr:g}", f"at most {self.lr:g}"
            )
        constant = self.weight_decay_incr_style == "constant"
        if constant and self.start_weight_decay != self.end_weight_decay:
            yield error(
                "weight_decay_incr_style",
                f"is constant, but weight decay goes from {self.start_weight_decay} to {self.end_weight_decay}",
                "linear or cosine",
            )
