"""A matrix product that casts its own operands, and names what its two dimensions count.

Knows nothing of the model around it. `parallel` swaps its class by `axes`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megalith.nn.axes import Axis


class Linear(nn.Module):
    """`y = x Wᵀ + b`. `weight` is (out, in), `axes` names (out, in); `bias` is None when absent.

    Input and weight are cast to `compute_dtype` (None: the input's own); the masters and their `.grad` keep theirs.
    """

    def __init__(self, width_in: int, width_out: int, *, axes: tuple[Axis, Axis], bias: bool = True) -> None:
        super().__init__()
        self.axes = axes
        self.compute_dtype: torch.dtype | None = None
        self.weight = nn.Parameter(torch.empty(width_out, width_in))
        self.bias = nn.Parameter(torch.empty(width_out)) if bias else None

    def forward(self, x: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """`keys` (B,): dropout keys of a layer that drops (`lora.LoRALinear`); nothing here does."""
        x = x.to(self.compute_dtype or x.dtype)
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        width_out, width_in = self.weight.shape
        bias = "" if self.bias is not None else ", no bias"
        return f"{width_in} → {width_out}, axes=({self.axes[0]} ← {self.axes[1]}){bias}"
