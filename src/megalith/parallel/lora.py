"""Low-rank layers of which each process holds a part: inside the doors of the layers they stand beside, so nothing more is sent.

    column   x ─ copy|gather ─▶ x · Wₖᵀ + x · Aᵀ · Bₖᵀ           A whole, B shared by its rows
    row      xₖ · Wₖᵀ + xₖ · Aₖᵀ · Bᵀ ─ reduce|scatter_sum ─▶    A shared by its columns, B whole

Of the gradient of the matrix that is whole every rank has a part, and `finish_gradients` adds them up.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megalith.nn.lora import InputDropout, LoRALinear
from megalith.parallel.layers import ColumnParallelLinear, RowParallelLinear, Shares, local


class ColumnParallelLoRA(ColumnParallelLinear, LoRALinear):
    """Each rank makes a part of the outputs; all drop alike."""

    def forward(self, x: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        x = self.shares.enter(x.to(self.compute_dtype or x.dtype))
        bias = None if self.bias is None else local(self.bias, x.dtype)
        y = F.linear(x, local(self.weight, x.dtype), bias)
        return y + self.beside(x, self.lora_a, local(self.lora_b), keys)

    def extra_repr(self) -> str:
        return f"{ColumnParallelLinear.extra_repr(self)}, {self.described}"


class RowParallelLoRA(RowParallelLinear, LoRALinear):
    """Each rank has a part of the inputs; both products of it are added up in one message."""

    def forward(self, x: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        x = x.to(self.compute_dtype or x.dtype)
        part = F.linear(x, local(self.weight, x.dtype))
        y = self.shares.leave(part + self.beside(x, local(self.lora_a), self.lora_b, keys))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{RowParallelLinear.extra_repr(self)}, {self.described}"


class SharedInputDropout(InputDropout):
    """Dropout of this rank's channels: they are numbered in the whole layer."""

    shares: Shares

    def first_column(self, width: int) -> int:
        return self.shares.part * width
