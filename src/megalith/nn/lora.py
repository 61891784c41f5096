"""A matrix product with a low-rank one beside it: the weight stays as it is, two thin matrices learn (Hu et al. 2021).

    x ─┬─ · Wᵀ ────────────────────┬─ + ─▶ y
       └─ drop ─ · Aᵀ ─ · scale ─ · Bᵀ ┘         A (r, in), B (out, r), scale = alpha / rank

A begins at random and B at zero, so that nothing is changed at first. `parallel` swaps these classes as it does plain layers.

Legend: B batch, T time
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megalith.nn.dropout import SITE_LORA, Dropout
from megalith.nn.linear import Linear

PROJECTIONS = (
    "attention.qkv",
    "attention.out",
    "cross.q",
    "cross.kv",
    "cross.out",
    "mlp.up",
    "mlp.gate",
    "mlp.down",
)
"""The products of a block, by their names in it; each drops by a mask of its own."""


class InputDropout(Dropout):
    """Dropout of what A reads: no part of the residual stream, so each process sees whole rows of it, or some channels of all."""

    def extra_repr(self) -> str:
        return f"{self.rate:g}, {PROJECTIONS[self.site - SITE_LORA]}"


class LoRALinear(Linear):
    """`y = x Wᵀ + b + scale · drop(x) Aᵀ Bᵀ`; (B, T, in) → (B, T, out). Made of a plain layer by `add_lora`.

    `lora_a` is (r, in), `lora_b` (out, r). They are cast as the weight is.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scale: float
    drop_lora: InputDropout

    def forward(self, x: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        x = x.to(self.compute_dtype or x.dtype)
        return super().forward(x) + self.beside(x, self.lora_a, self.lora_b, keys)

    def beside(
        self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, keys: torch.Tensor | None
    ) -> torch.Tensor:
        """The low-rank product alone; `a` and `b` as this process holds them."""
        narrow = F.linear(self.drop_lora(x, keys), a.to(x.dtype)) * self.scale
        return F.linear(narrow, b.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.described}"

    @property
    def described(self) -> str:
        """For `print(model)`."""
        return f"LoRA rank {self.lora_a.shape[0]} × {self.scale:g}"


def add_lora(linear: Linear, *, rank: int, scale: float, dropout: float, projection: str) -> LoRALinear:
    """Makes of a layer, in place, one that learns by two matrices without numbers yet, in the weight's dtype, where it is."""
    width_out, width_in = linear.weight.shape
    linear.__class__ = LoRALinear
    assert isinstance(linear, LoRALinear)
    linear.scale = scale
    linear.lora_a = nn.Parameter(linear.weight.new_empty(rank, width_in))
    linear.lora_b = nn.Parameter(linear.weight.new_empty(width_out, rank))
    linear.drop_lora = InputDropout(dropout, SITE_LORA + PROJECTIONS.index(projection))
    return linear
