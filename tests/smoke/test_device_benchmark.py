"""The GPU benchmark's own code, run on a CPU: processes, turns, the file it writes, and what it does without memory."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megalith.engine.metrics import Peak

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROW = {"seconds": [2.0, 1.0, 4.0], "warm_up_seconds": 1.0, "last_loss": 9.0, "peak_gib": 3.0}


@pytest.fixture
def device(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("device")


def test_every_side_takes_its_turn_in_a_process_of_its_own(tmp_path):
    output = tmp_path / "device.json"
    command = [sys.executable, str(BENCHMARKS / "device.py"), "--device", "cpu", "--sizes", "nano"]
    options = ["--no-compile", "--rounds", "1", "--steps", "1", "--output", str(output)]
    sides = ["--sides", "megalith", "torch"]
    done = subprocess.run(
        [*command, *options, *sides],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())["sizes"]["nano"]
    assert list(found["sides"]) == ["megalith", "torch"]
    assert not found["left_out"]
    for row in found["sides"].values():
        assert row["tokens_per_second"] > 0
        assert row["peak_gib"] > 0
        assert row["micro_batch"] == 2
        assert row["last_loss"] == pytest.approx(math.log(50304), abs=0.5)
    assert found["sides"]["megalith"]["ratio"] == 1


def test_a_side_without_memory_starts_again_with_half(device):
    asked = []

    def run(side, shape):
        asked.append(shape.micro_batch)
        return {"out_of_memory": True} if shape.micro_batch > 16 else dict(ROW)

    size = device.SIZES["124m"]
    comparison = device.Comparison(size, size.shape("cpu", compiled=False, recompute=False), None)
    comparison.take(run, "megalith")
    comparison.take(run, "megalith")  # the next round begins with what fitted
    assert asked == [64, 32, 16, 16]
    assert comparison.row("megalith")["micro_batch"] == 16


def test_a_side_that_fails_is_named_and_left_out(device):
    size = device.SIZES["nano"]
    comparison = device.Comparison(size, size.shape("cpu", compiled=False, recompute=False), None)
    for found in ({"failed": "no transformers"}, dict(ROW)):
        comparison.take(lambda side, shape, found=found: found, "transformers")
    comparison.take(lambda side, shape: {"out_of_memory": True}, "torch")
    left_out = comparison.summary()["left_out"]
    assert left_out == {"transformers": "no transformers", "torch": "out of memory with one sample"}


def test_ratios_goals_and_mfu(device):
    """By hand: 124M, 512 × 1024 tokens a step, median step 2 s, a peer twice as slow."""
    size = device.SIZES["124m"]
    shape = size.shape("cuda", compiled=True, recompute=False)
    comparison = device.Comparison(size, shape, Peak(989.0, "a data sheet"))
    comparison.take(lambda side, shape: dict(ROW), "megalith")
    comparison.take(lambda side, shape: {**ROW, "seconds": [4.0]}, "torch")
    comparison.take(lambda side, shape: {**ROW, "seconds": [1.0]}, "transformers")
    own = comparison.row("megalith")
    rate = 512 * 1024 / 2
    per_token = 6 * (12 * 12 * 768**2 + 50304 * 768) + 12 * 12 * 768 * 1024
    assert own["tokens_per_second"] == pytest.approx(rate)
    assert own["mfu"] == pytest.approx(rate * per_token / 989e12, abs=1e-4)
    assert (comparison.row("torch")["ratio"], comparison.row("transformers")["ratio"]) == (2.0, 0.5)
    assert comparison.missed() == ["tokens_per_second 262144 < 500000", "0.5 of transformers < 0.95"]


def test_without_a_gpu_it_says_so(device, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert device.main([]) == 2
    assert "--device cpu" in capsys.readouterr().out


def test_the_sizes_are_the_published_ones(device):
    found = {
        name: device.SIZES[name].shape("cpu", compiled=False, recompute=False) for name in ("124m", "1.3b")
    }
    assert found["124m"].parameters == pytest.approx(124.4e6, rel=2e-3)
    assert found["1.3b"].parameters == pytest.approx(1.31e9, rel=1e-2)
    assert all(shape.batch % shape.micro_batch == 0 and shape.length == 1024 for shape in found.values())
