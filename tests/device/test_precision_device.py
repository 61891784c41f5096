"""A training step in every precision stays near float64 on the CPU, its optimizer included."""

from __future__ import annotations

import math

import pytest
import torch

from megalith.optim.scaler import ConstantScaler, DynamicScaler
from tests.device.small import gradients, small_batch, small_engine, weights, worst

pytestmark = pytest.mark.device
CPU = torch.device("cpu")
LIMITS = {"32": 2e-5, "bf16-mixed": 3e-2, "16-mixed": 4e-3}
"""Of the largest element of each gradient. bf16 keeps 8 bits of a product's operands (a rounding of 4e-3), fp16 11."""


@pytest.mark.parametrize("documents", [False, True], ids=["plain", "documents"])
@pytest.mark.parametrize("precision", LIMITS)
def test_gradients_stay_near_float64(device, precision, documents):
    exact = small_engine(CPU, "64")
    engine = small_engine(device, precision, scaler=ConstantScaler(2.0**10))
    batch = small_batch(documents=documents)
    wanted, found = exact.forward_backward(batch), engine.forward_backward(batch)
    assert found["loss"].item() == pytest.approx(wanted["loss"].item(), rel=LIMITS[precision] / 10)
    assert all(p.grad.dtype == torch.float32 for p in engine.trainable.values())
    scaled = {name: gradient / 2**10 for name, gradient in gradients(engine).items()}
    error = worst(scaled, gradients(exact))
    assert error < LIMITS[precision]
    assert precision == "32" or error > 1e-5  # the casts happened


def test_fused_adamw_moves_as_on_the_cpu(device):
    """Clipping, weight decay and bias correction over three steps, fp32 beside float64."""
    exact, engine = small_engine(CPU, "64"), small_engine(device, "32")
    before = weights(engine)
    assert all(group["fused"] for group in engine.optimizer.param_groups)
    assert {s["step"].device.type for s in engine.optimizer.state.values()} == {device.type}
    for step in range(3):
        wanted, found = exact.train_step(small_batch(step)), engine.train_step(small_batch(step))
        assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-4)
        assert found.grad_norm > engine.clip  # it clips
    assert worst(weights(engine), weights(exact)) < 1e-3
    moved = {name: w - before[name] for name, w in weights(exact).items()}
    assert worst({name: w - before[name] for name, w in weights(engine).items()}, moved) < 1e-3


def test_fp16_finds_its_scale_and_learns(device):
    """From 2³² down by overflows, each of which changes nothing; then the loss falls."""
    engine = small_engine(device, "16-mixed", scaler=DynamicScaler(hysteresis=1))
    start = weights(engine)
    result = engine.train_step(small_batch())
    assert result.skipped
    assert not math.isfinite(result.grad_norm)
    assert all(torch.equal(weight, start[name]) for name, weight in weights(engine).items())
    while result.skipped:
        result = engine.train_step(small_batch())
    assert engine.scaler.scale == 2.0**32 / 2**engine.skipped
    learnt = [engine.train_step(small_batch()) for _ in range(20)][-1]
    assert learnt.loss < result.loss - 0.3
    assert all(weight.isfinite().all() for weight in weights(engine).values())
