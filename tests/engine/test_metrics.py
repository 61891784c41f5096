"""FLOPs by the published formulas, peaks by data sheet, no guess for unknown devices."""

from __future__ import annotations

import pytest

from megalith.engine.flops import flops_per_token
from megalith.engine.metrics import peak, speed


def test_the_formula_is_megatrons():
    layers, width, length, vocabulary, batch = 24, 2304, 2048, 51200, 7
    ours = flops_per_token(
        matrix_parameters=layers * 12 * width**2 + vocabulary * width,
        layers=layers,
        attention_width=width,
        length=length,
    )
    megatron = (
        72
        * batch
        * length
        * layers
        * width**2
        * (1 + length / (6 * width) + vocabulary / (12 * layers * width))
    )
    assert ours * batch * length == pytest.approx(megatron, rel=1e-12)


def test_published_throughput_is_reproduced():
    """Megatron-LM's April 2021 table: 1.7 billion parameters, 32 A100, 137 TFLOP/s each with recomputation = 44 % of 312."""
    layers, width, length, vocabulary, batch = 24, 2304, 2048, 51200, 512
    per_token = flops_per_token(
        matrix_parameters=layers * 12 * width**2 + vocabulary * width,
        layers=layers,
        attention_width=width,
        length=length,
    )
    recomputed = (
        96
        * batch
        * length
        * layers
        * width**2
        * (1 + length / (6 * width) + vocabulary / (16 * layers * width))
    )
    seconds = recomputed / (32 * 137e12)
    a100 = peak("NVIDIA A100-SXM4-80GB", "bf16-mixed")
    measured = speed(batch * length, seconds, per_token=per_token, peak=a100, processes=32)
    assert measured.tflops_per_second == pytest.approx(137 * 0.75, rel=0.02)  # the fourth pass is not counted
    assert measured.mfu == pytest.approx(0.44 * 0.75, rel=0.02)


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA H200", "bf16-mixed", 989),
        ("NVIDIA H200", "32", 67),
        ("NVIDIA H100 80GB HBM3", "16-mixed", 989),
        ("NVIDIA H100 PCIe", "bf16-mixed", 756),
        ("NVIDIA A100-SXM4-40GB", "bf16-mixed", 312),
        ("NVIDIA A10", "bf16-mixed", 125),
        ("NVIDIA L4", "bf16-mixed", 121),
        ("Tesla V100-SXM2-16GB", "16-mixed", 125),
        ("NVIDIA GeForce RTX 4090", "bf16-mixed", 165.2),
    ],
)
def test_known_devices(name, precision, expected):
    found = peak(name, precision)
    assert found is not None
    assert found.tflops == expected
    assert "data sheet" in found.source or "white paper" in found.source


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("CPU", "32"),
        ("NVIDIA A10G", "bf16-mixed"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16-mixed"),
        ("Tesla V100-SXM2-16GB", "bf16-mixed"),
        ("NVIDIA H200", "64"),
    ],
)
def test_unknown_devices_have_no_peak(name, precision):
    assert peak(name, precision) is None
    assert speed(10, 1.0, per_token=1e9, peak=peak(name, precision)).mfu is None


def test_the_users_number_wins():
    given = peak("CPU", "32", given=0.4)
    assert given is not None
    measured = speed(1000, 2.0, per_token=2e8, peak=given)
    assert measured.tokens_per_second == 500
    assert measured.mfu == pytest.approx(500 * 2e8 / 0.4e12)
