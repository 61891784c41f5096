"""The two rules of precision: products in the compute dtype, sums and statistics in fp32 at least.

Layers cast their own input and weight (bit-equal to autocast, which is never used): `compute_dtype` is an attribute
of every layer that multiplies matrices, None meaning the dtype of its input.
"""

from __future__ import annotations

import torch
from torch import nn


def at_least_fp32(x: torch.Tensor) -> torch.dtype:
    """The dtype for statistics of `x`: its own, or fp32 where that is narrower."""
    return torch.promote_types(x.dtype, torch.float32)


def set_compute_dtype(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Sets `compute_dtype` on every layer under `module` that has one."""
    for layer in module.modules():
        if hasattr(layer, "compute_dtype"):
            layer.compute_dtype = dtype
