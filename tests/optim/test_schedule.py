"""Schedules against hand-calculated values and against slow, stateful retellings of the reference's loops."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from megalith.errors import ConfigError
from megalith.optim.config import COUNTER_CURVES, STEP_CURVES, OptimConfig, SchedConfig
from megalith.optim.schedule import Counters, make_schedule

GBS, SEQ = 8, 16


def schedule(name, *, lr=1.0, max_steps=100, first_step="zero", total_samples=None, optim=None, **sched):
    config = OptimConfig(lr=lr, sched={"name": name, **sched}, **(optim or {}))
    return make_schedule(
        config, max_steps=max_steps, global_batch=GBS, sequence_length=SEQ, total_samples=total_samples,
        first_step=first_step, width=64,
    )  # fmt: skip


def at(step, batch=GBS):
    return Counters(step, step * batch, step * batch * SEQ)


# -- Megatron: a counter of samples that grows by the global batch at every successful step ------------------------


class MegatronLoop:
    """The reference as it runs: everything in samples, stepped after each successful update."""

    def __init__(self, style, max_lr, min_lr, warmup, decay):
        self.style, self.max_lr, self.min_lr, self.warmup, self.decay, self.n = (
            style,
            max_lr,
            min_lr,
            warmup,
            decay,
            0,
        )

    def lr(self):
        n = self.n
        if self.warmup > 0 and n <= self.warmup:
            return self.max_lr * n / self.warmup
        if self.style == "constant":
            return self.max_lr
        if n > self.decay:
            return self.min_lr
        if self.style == "inverse-square-root":
            value = self.max_lr * max(self.warmup, 1) ** 0.5 / max(n, 1) ** 0.5
            return value if value > self.min_lr else self.min_lr
        ratio = (n - self.warmup) / (self.decay - self.warmup)
        if self.style == "linear":
            coefficient = 1 - ratio
        else:
            coefficient = (math.cos(math.pi * ratio) + 1) / 2
        return self.min_lr + (self.max_lr - self.min_lr) * coefficient


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("style", COUNTER_CURVES)
def test_megatron_curves_by_steps(style, warmup):
    loop = MegatronLoop(style, 3e-4, 3e-5, warmup * GBS, 80 * GBS)
    ours = schedule(style, lr=3e-4, min_lr=3e-5, warmup_steps=warmup, decay_steps=80)
    for step in range(100):
        assert ours.lr(at(step)) == pytest.approx(loop.lr(), rel=1e-14), step
        loop.n += GBS


@pytest.mark.parametrize("style", COUNTER_CURVES)
@pytest.mark.parametrize("unit", ["samples", "tokens"])
def test_megatron_curves_by_samples_and_tokens_with_a_growing_batch(style, unit):
    one = SEQ if unit == "tokens" else 1
    loop = MegatronLoop(style, 1e-3, 0.0, 100 * one, 1500 * one)
    lengths = {f"warmup_{unit}": 100 * one, f"decay_{unit}": 1500 * one}
    ours = schedule(style, lr=1e-3, total_samples=2000, **lengths)
    done = Counters()
    for step in range(200):
        batch = 4 if step < 50 else GBS
        assert ours.lr(done) == pytest.approx(loop.lr(), rel=1e-14), step
        done += Counters(1, batch, batch * SEQ)
        loop.n += batch * one


def test_megatron_hand_values():
    linear = schedule("linear", min_lr=0.1, warmup_steps=10)
    # 10 of 100 steps of warm-up, then from 1 to 0.1 over 90 steps: half-way at step 55
    assert [linear.lr(at(s)) for s in (0, 5, 10, 55, 100, 101)] == pytest.approx([0, 0.5, 1, 0.55, 0.1, 0.1])
    cosine = schedule("cosine", min_lr=0.0, warmup_steps=10)
    assert [cosine.lr(at(s)) for s in (40, 55, 70)] == pytest.approx([0.75, 0.5, 0.25])
    root = schedule("inverse-square-root", warmup_steps=4)
    assert [root.lr(at(s)) for s in (4, 16, 64)] == pytest.approx([1, 0.5, 0.25])
    assert schedule("inverse-square-root").lr(at(2)) == pytest.approx(
        1 / math.sqrt(2 * GBS)
    )  # counted in samples
    assert [schedule("constant", warmup_steps=2).lr(at(s)) for s in (0, 1, 99, 999)] == [0, 0.5, 1, 1]


def test_warmup_fraction_is_of_the_decay_length():
    ours = schedule("linear", warmup_ratio=0.1, decay_steps=50)
    assert ours.curve.warmup == 5 * GBS
    assert schedule("linear", warmup_ratio=0.1, decay_samples=1000).curve.warmup == 100


def test_by_without_lengths_takes_the_run():
    assert schedule("linear", by="samples").curve.end == 100 * GBS
    assert schedule("linear", by="tokens").curve.end == 100 * GBS * SEQ


def test_first_step_one_is_the_same_curve_a_step_earlier():
    for name in COUNTER_CURVES:
        zero, one = (schedule(name, warmup_steps=10, first_step=f) for f in ("zero", "one"))
        assert zero.lr(at(0)) == 0
        assert one.lr(at(0)) == pytest.approx(0.1)
        assert [one.lr(at(s)) for s in range(99)] == [zero.lr(at(s + 1)) for s in range(99)]


def test_first_step_one_counts_the_actual_batch():
    ours = schedule("linear", warmup_samples=100, decay_samples=1000, first_step="one")
    assert ours.lr(Counters(3, 30, 480)) == pytest.approx(0.38)  # 30 + a full batch of 8
    assert ours.lr(Counters(3, 30, 480), Counters(1, 4, 64)) == pytest.approx(0.34)


# -- NeMo: s is the number of scheduler steps so far ----------------------------------------------------------------


def nemo(name, s, peak, floor, warmup, total, tail, power):
    """The reference's policy written out, one case after the other."""
    if name == "NoamAnnealing":
        s = s if s > 1 else 1
        lr = peak / 8.0 * min(1 / math.sqrt(s), s / math.sqrt(warmup**3))  # 8 = √64
        return max(lr, floor) if s > warmup else lr
    if name == "CosineAnnealing" and tail > 0:
        decay = total - warmup - tail
        if s <= warmup:
            return peak * s / warmup
        if s > warmup + decay:
            return floor
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * (s - warmup) / decay))
    if s <= warmup:
        return peak * (s + 1) / (warmup + 1)
    if s > total:
        return floor
    if name == "CosineAnnealing":
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * (s - warmup) / (total - warmup)))
    if name == "WarmupAnnealing":
        return peak + (floor - peak) * (s - warmup) / (total - warmup)
    if name == "SquareRootAnnealing":
        return max(floor, peak * math.sqrt((total - s) / total))
    if name == "PolynomialDecayAnnealing":
        return floor + (peak - floor) * (1 - (s - warmup) / (total - warmup)) ** power
    assert name == "InverseSquareRootAnnealing"
    return peak * math.sqrt((warmup + 1) / (s + 1))


@pytest.mark.parametrize("tail", [0, 30])
@pytest.mark.parametrize("name", STEP_CURVES)
def test_nemo_curves(name, tail):
    ours = schedule(name, lr=2e-4, min_lr=2e-5, warmup_steps=12, constant_steps=tail, power=2.0)
    tail = tail if name == "CosineAnnealing" else 0
    for s in range(110):
        expected = nemo(name, s, 2e-4, 2e-5, 12, 100, tail, 2.0)
        assert ours.lr(at(s)) == pytest.approx(expected, rel=1e-13), s


def test_nemo_hand_values():
    cosine = schedule("CosineAnnealing", warmup_steps=4, max_steps=104)
    assert [cosine.lr(at(s)) for s in (0, 1, 4, 54, 104)] == pytest.approx([0.2, 0.4, 1, 0.5, 0], abs=1e-15)
    # NeMo's second documented example: 78 warm-up, 157 cosine, 545 at min_lr of 780
    tail = schedule("CosineAnnealing", warmup_steps=78, constant_steps=545, min_lr=0.25, max_steps=780)
    assert [tail.lr(at(s)) for s in (0, 39, 78, 235, 236, 779)] == pytest.approx(
        [0, 0.5, 1, 0.25, 0.25, 0.25]
    )
    assert tail.warnings == ()
    square = schedule("PolynomialDecayAnnealing", max_steps=10, power=2.0)
    assert [square.lr(at(s)) for s in (0, 5, 10, 11)] == pytest.approx([1, 0.25, 0, 0])
    assert schedule("CosineAnnealing", warmup_ratio=0.055).curve.warmup == 5  # NeMo truncates


def test_first_step_touches_only_curves_that_start_at_nothing():
    for name in STEP_CURVES[:5]:
        zero, one = (schedule(name, warmup_steps=10, first_step=f) for f in ("zero", "one"))
        assert [zero.lr(at(s)) for s in range(100)] == [one.lr(at(s)) for s in range(100)]
    assert schedule("CosineAnnealing", warmup_steps=10, constant_steps=5, first_step="one").lr(at(0)) == 0.1
    assert schedule("CosineAnnealing", warmup_steps=10, constant_steps=5, first_step="zero").lr(at(0)) == 0


def test_no_decay_phase_is_a_warning_and_runs_as_the_original_did():
    # the first documented example of NeMo: 1000 steps, warm-up 320, tail 2240
    ours = schedule(
        "CosineAnnealing", lr=2e-3, min_lr=2e-6, max_steps=1000, warmup_steps=320, constant_steps=2240
    )
    assert len(ours.warnings) == 1
    assert "no decay phase" in ours.warnings[0]
    assert "-1560" in ours.warnings[0]
    assert [ours.lr(at(s)) for s in (160, 320, 321, 999)] == pytest.approx([1e-3, 2e-3, 2e-6, 2e-6])
    megatron = schedule("linear", warmup_steps=200)
    assert "no decay phase: 100 steps, warm-up 200" in megatron.warnings[0]
    assert megatron.lr(at(100)) == 0.5
    assert schedule("constant", warmup_steps=200).warnings == ()


@pytest.mark.parametrize("name", [*STEP_CURVES, *COUNTER_CURVES])
@pytest.mark.parametrize("warmup", [0, 1, 99, 100, 300])
def test_every_curve_is_finite_and_within_bounds_everywhere(name, warmup):
    for tail in (0, 50, 500):
        ours = schedule(name, min_lr=0.01, warmup_steps=warmup, constant_steps=tail, first_step="one")
        values = [ours.lr(at(s)) for s in range(130)]
        assert all(0 <= v <= 1 for v in values)


# -- weight decay -----------------------------------------------------------------------------------------------------


def test_weight_decay_increments():
    ramp = {"weight_decay": 0.01, "start_weight_decay": 0.02, "end_weight_decay": 0.1}
    linear = schedule("linear", optim={**ramp, "weight_decay_incr_style": "linear"})
    assert [linear.weight_decay(at(s)) for s in (0, 25, 100, 200)] == pytest.approx([0.02, 0.04, 0.1, 0.1])
    cosine = schedule("linear", optim={**ramp, "weight_decay_incr_style": "cosine"})
    # (cos(π(1−r))+1)/2 at r = 1/3 is 1/4
    assert [cosine.weight_decay(at(s, 9)) for s in (0, 50)] == pytest.approx([0.02, 0.06])
    third = schedule("linear", max_steps=99, optim={**ramp, "weight_decay_incr_style": "cosine"})
    assert third.weight_decay(at(33)) == pytest.approx(0.04)
    assert schedule("linear", optim={"weight_decay": 0.3}).weight_decay(at(50)) == 0.3
    by_samples = schedule("linear", by="samples", optim={**ramp, "weight_decay_incr_style": "linear"})
    assert by_samples.weight_decay(Counters(1, 400, 0)) == pytest.approx(0.06)


# -- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sched": {"warmup_steps": 5, "warmup_ratio": 0.1}}, "both given"),
        ({"sched": {"name": "linear", "warmup_steps": 5, "decay_samples": 10}}, "mixes steps and samples"),
        ({"sched": {"name": "linear", "by": "tokens", "warmup_steps": 5}}, "given in steps"),
        ({"sched": {"name": "CosineAnnealing", "warmup_samples": 5}}, "counts steps"),
        ({"lr": 1e-5, "sched": {"min_lr": 1e-4}}, "above lr"),
        ({"betas": [0.9, 1.0]}, "must lie in"),
        ({"start_weight_decay": 0.1, "end_weight_decay": 0.2}, "linear or cosine"),
    ],
)
def test_impossible_combinations_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        make_schedule(OptimConfig(**values), max_steps=10, global_batch=1)


@pytest.mark.parametrize(
    ("name", "values", "idle"),
    [
        ("WarmupAnnealing", {"constant_steps": 5}, ["constant_steps"]),
        (
            "CosineAnnealing",
            {"power": 2.0, "d_model": 8, "decay_steps": 9},
            ["power", "d_model", "decay_steps"],
        ),
        ("linear", {"power": 2.0, "decay_steps": 9}, ["power"]),
        ("PolynomialDecayAnnealing", {"power": 2.0, "constant_steps": 0}, []),
        ("NoamAnnealing", {"d_model": 8}, []),
    ],
)
def test_a_key_that_does_nothing_says_so(name, values, idle):
    found = list(SchedConfig(name=name, **values).problems())
    assert [(p.where, p.severity, p.what) for p in found] == [
        (key, "warning", f"has no effect on {name}") for key in idle
    ]


def test_every_problem_is_reported_at_once():
    config = OptimConfig(betas=[2, 0], lr=1e-5, sched={"min_lr": 1, "warmup_steps": 5, "warmup_ratio": 0.1})
    with pytest.raises(ConfigError) as caught:
        make_schedule(config, max_steps=10, global_batch=1)
    assert {p.where for p in caught.value.problems} == {
        "model.optim.betas", "model.optim.sched.min_lr", "model.optim.sched.warmup_ratio",
    }  # fmt: skip


@pytest.mark.parametrize("values", [{"sched": {"name": "CosineAnealing"}}, {"sched": {"last_epoch": 3}}])
def test_unknown_values_are_refused(values):
    with pytest.raises(ValidationError):
        OptimConfig(**values)


def test_nemo_sections_load_as_written():
    gpt = {"name": "fused_adam", "lr": 2e-4, "weight_decay": 0.01, "betas": [0.9, 0.98],
           "sched": {"name": "CosineAnnealing", "warmup_steps": 500, "constant_steps": 50000, "min_lr": 2e-5}}  # fmt: skip
    t5 = {"name": "fused_adam", "lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01,
          "sched": {"name": "WarmupAnnealing", "min_lr": 1e-5, "last_epoch": -1, "warmup_ratio": 0.01}}  # fmt: skip
    ours = make_schedule(OptimConfig(**gpt), max_steps=100000, global_batch=8)
    assert ours.curve.end - ours.curve.tail - ours.curve.warmup == 49500
    assert make_schedule(OptimConfig(**t5), max_steps=100000, global_batch=8).curve.warmup == 1000


def test_noam_without_a_width_is_refused():
    config = OptimConfig(sched={"name": "NoamAnnealing", "warmup_steps": 10})
    with pytest.raises(ConfigError, match="d_model"):
        make_schedule(config, max_steps=10, global_batch=1)
