"""Speed in tokens, FLOPs and as a share of the device's peak, with the source of the peak named.

Knows arithmetic and data sheets. Guesses nothing: an unknown device, or a CPU, has no peak and hence no MFU unless the
user gives one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Peak:
    """Dense matrix-product peak of one device, and who says so."""

    tflops: float
    source: str


_TFLOPS: tuple[tuple[str, float | None, float | None, float | None, str], ...] = (
    # pattern of the device's name, bf16, fp16, fp32; the more special name first
    (r"\bGB200\b", 2500, 2500, 80, "NVIDIA GB200 NVL72 data sheet"),
    (r"\bB200\b", 2250, 2250, 75, "NVIDIA HGX B200 data sheet"),
    (r"\bGH200\b", 989, 989, 67, "NVIDIA GH200 data sheet"),
    (r"\bH200 NVL\b", 835, 835, 60, "NVIDIA H200 NVL data sheet"),
    (r"\bH200\b", 989, 989, 67, "NVIDIA H200 data sheet"),
    (r"\bH100 NVL\b", 835, 835, 60, "NVIDIA H100 NVL data sheet"),
    (r"\bH100 PCIe\b", 756, 756, 51, "NVIDIA H100 PCIe data sheet"),
    (r"\bH100\b", 989, 989, 67, "NVIDIA H100 SXM data sheet"),
    (r"\bA100\b", 312, 312, 19.5, "NVIDIA A100 data sheet"),
    (r"\bA40\b", 149.7, 149.7, 37.4, "NVIDIA A40 data sheet"),
    (r"\bA30\b", 165, 165, 10.3, "NVIDIA A30 data sheet"),
    (r"\bA10\b", 125, 125, 31.2, "NVIDIA A10 data sheet"),
    (r"\bL40S\b", 362, 362, 91.6, "NVIDIA L40S data sheet"),
    (r"\bL40\b", 181, 181, 90.5, "NVIDIA L40 data sheet"),
    (r"\bL4\b", 121, 121, 30.3, "NVIDIA L4 data sheet"),
    (r"\bV100-PCIE", None, 112, 14, "NVIDIA V100 data sheet"),
    (r"\bV100-SXM2", None, 125, 15.7, "NVIDIA V100 data sheet"),
    (r"\bT4\b", None, 65, 8.1, "NVIDIA T4 data sheet"),
    (r"\bRTX 4090\b(?! Laptop| D)", 165.2, 165.2, 82.6, "NVIDIA Ada architecture white paper, fp32 accumulation"),
    (r"\bRTX 3090\b(?! Ti)", 71, 71, 35.6, "NVIDIA Ampere GA102 white paper, fp32 accumulation"),
    (r"\bMI300X\b", 1307.4, 1307.4, 163.4, "AMD Instinct MI300X data sheet"),
)  # fmt: skip
_COLUMNS = {"bf16-mixed": 1, "16-mixed": 2, "32": 3}


def peak(device_name: str, precision: str, *, given: float | None = None) -> Peak | None:
    """Peak of a device by the name that its driver gives; None when it is not known.

    `given` (TFLOP/s; `trainer.peak_tflops`) wins. fp32 is that of the plain units, since TF32 is off by default.
    """
    if given is not None:
        return Peak(given, "trainer.peak_tflops")
    column = _COLUMNS.get(precision)
    for row in _TFLOPS:
        if column and re.search(row[0], device_name):
            value = row[column]
            return Peak(float(value), row[4]) if isinstance(value, float | int) else None
    return None


def device_name(device: torch.device) -> str:
    """What `peak` is asked with; a CPU has no entry in any table."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


@dataclass(frozen=True)
class Speed:
    """Speed over an interval; per process for FLOPs, of the whole run for tokens. `mfu` None: unknown device."""

    tokens_per_second: float
    tflops_per_second: float
    mfu: float | None


def speed(
    tokens: int, seconds: float, *, per_token: float, peak: Peak | None = None, processes: int = 1
) -> Speed:
    """`tokens` of the global batches done in `seconds`; `per_token` from `flops`.

    MFU (model FLOPs utilisation) = FLOPs that the model needs ÷ what the device could do: recomputation earns nothing.
    """
    tflops = tokens * per_token / seconds / processes / 1e12
    return Speed(tokens / seconds, tflops, tflops / peak.tflops if peak else None)
