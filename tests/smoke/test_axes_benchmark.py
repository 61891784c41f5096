"""The benchmark of parallel axes: its arithmetic, its names, and the way it goes with a tiny model."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from megalith.testing.parity import layouts

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def axes(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("axes")


def test_every_layout_is_known(axes):
    assert set(axes.AXES) <= set(layouts())


def test_messages_that_overlap_count_once(axes):
    assert axes.covered([(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (5.5, 6.0)]) == 5.0
    assert axes.covered([]) == 0.0


def test_it_measures_a_layout_beside_one_process(axes, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "axes.json"
    assert axes.main(["--quick", "--steps", "1", "--sides", "tp2", "--no-weak", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["single"]["ratio"] > 0
    row = found["axes"]["tp2"]
    assert row["processes"] == 2
    assert row["ratio"] == pytest.approx(row["median_seconds"] / row["one_process_seconds"], rel=0.1)
    assert row["overhead"] == pytest.approx(2 * row["ratio"], abs=0.01)
    assert 0 < row["messages"] <= 1
    assert found["machine"]["threads_a_process"] == 1
