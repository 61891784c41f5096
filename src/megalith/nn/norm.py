"""Normalisation over the last dimension, with statistics in fp32 at least; the result has the input's dtype."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from megalith.nn.precision import at_least_fp32

NormKind = Literal["layernorm", "rmsnorm"]


class LayerNorm(nn.Module):
    """`(x − mean) / √(variance + eps) · weight + bias` (Ba et al. 2016)."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.axes = ("norm",)
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = at_least_fp32(x)
        y = F.layer_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.bias.to(wide), self.eps)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps:g}"


class RMSNorm(nn.Module):
    """`x / √(mean(x²) + eps) · weight` (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.axes = ("norm",)
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = at_least_fp32(x)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps:g}"


def make_norm(kind: NormKind, width: int, eps: float) -> LayerNorm | RMSNorm:
    """The norm of a name."""
    return {"layernorm": LayerNorm, "rmsnorm": RMSNorm}[kind](width, eps)
