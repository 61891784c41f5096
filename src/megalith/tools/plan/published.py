"""Runs that their makers published, against which step times are set. Facts, and the arithmetic that turns them into one number.

A100: README of Megatron-LM, April 2021, fp16, everything recomputed; FLOP/s are hardware FLOPs. H100: README of Megatron Core,
2024, bf16, length 4096, vocabulary 131,072; FLOP/s are model FLOPs, layouts are not part of what is kept here.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class Published:
    """One run: billions of parameters, TFLOP/s of a GPU; where known the shape, layout and batch."""

    billions: float
    tflops: float
    width: int = 0
    layers: int = 0
    heads: int = 0
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    gpus: int = 1
    samples: int = 1
    micro: int = 1

    @property
    def bubble(self) -> float:
        """Idle ÷ working time, as `speed.bubble` has it."""
        data = self.gpus // (self.tensor * self.pipeline)
        return (self.pipeline - 1) / (self.virtual * (self.samples // (data * self.micro)))


PEAKS = {"A100": 312.0, "H100": 989.0}
A100 = tuple(
    Published(billions, tflops, *rest)
    for billions, tflops, *rest in (
        #  B     TFLOP/s width layers heads t  p  v  GPUs  samples micro
        (1.7, 137, 2304, 24, 24, 1, 1, 1, 32, 512, 16),
        (3.6, 138, 3072, 30, 32, 2, 1, 1, 64, 512, 16),
        (7.5, 142, 4096, 36, 32, 4, 1, 1, 128, 512, 16),
        (18.4, 135, 6144, 40, 48, 8, 1, 1, 256, 1024, 8),
        (39.1, 138, 8192, 48, 64, 8, 2, 1, 512, 1536, 4),
        (76.1, 140, 10240, 60, 80, 8, 4, 3, 1024, 1792, 2),
        (145.6, 148, 12288, 80, 96, 8, 8, 2, 1536, 2304, 2),
        (310.1, 155, 16384, 96, 128, 8, 16, 2, 1920, 2160, 1),
        (529.6, 163, 20480, 105, 128, 8, 35, 3, 2520, 2520, 1),
        (1008, 163, 25600, 128, 160, 8, 64, 1, 3072, 3072, 1),
    )
)
H100 = tuple(
    Published(billions, tflops)
    for billions, tflops in (
        (1.7, 408.8), (7.1, 465.9), (16, 489.1), (32, 459.6), (70, 419.7), (119, 420.5), (177, 432.8),
        (314, 474.4), (462, 459.9),
    )
)  # fmt: skip
RUNS = {"A100": A100, "H100": H100}


@dataclass(frozen=True)
class Calibration:
    """One efficiency for all runs of a family, and how far their FLOP/s lie from what it gives: −0.1 is a tenth slower."""

    family: str
    efficiency: float
    slowest: float
    fastest: float

    def tflops(self, bubble: float) -> float:
        """What a GPU does."""
        return PEAKS[self.family] * self.efficiency / (1 + bubble)


def calibrate(family: str) -> Calibration:
    """Of "A100" or "H100"."""
    runs = RUNS[family]
    efficiencies = [run.tflops * (1 + run.bubble) / PEAKS[family] for run in runs]
    mean = fmean(efficiencies)
    return Calibration(family, mean, min(efficiencies) / mean - 1, max(efficiencies) / mean - 1)
