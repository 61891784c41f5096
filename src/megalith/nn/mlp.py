"""The feed-forward half of a block: two matrices and a bend between them, or three with a gate.

`gelu_tanh` is Megatron's and GPT-2's form, `gelu_erf` the exact one: a checkpoint trained with one is, numerically,
another model with the other. Gated forms (Shazeer 2020): `down(bend(gate(x)) · up(x))`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

from megalith.nn.linear import Linear

Activation = Literal[
    "gelu_tanh", "gelu_erf", "relu", "silu", "squared_relu", "geglu", "geglu_erf", "swiglu", "reglu"
]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)
GATED = ("geglu", "geglu_erf", "swiglu", "reglu")


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """relu(x)² (So et al. 2021)."""
    return F.relu(x).square()


def bend(activation: Activation) -> Callable[[torch.Tensor], torch.Tensor]:
    """The elementwise function of an activation; a gated one applies it to its gate."""
    tanh = functools.partial(F.gelu, approximate="tanh")
    return {
        "gelu_tanh": tanh,
        "geglu": tanh,
        "gelu_erf": F.gelu,
        "geglu_erf": F.gelu,
        "relu": F.relu,
        "reglu": F.relu,
        "silu": F.silu,
        "swiglu": F.silu,
        "squared_relu": squared_relu,
    }[activation]


@dataclass(frozen=True)
class MLPSpec:
    """Shape and options of one feed-forward layer: D `width`, F `hidden`."""

    width: int
    hidden: int
    activation: Activation = "gelu_tanh"
    bias: bool = True


class MLP(nn.Module):
    """(…, D) → (…, D)."""

    def __init__(self, spec: MLPSpec) -> None:
        super().__init__()
        self.activation = spec.activation
        self.bend = bend(spec.activation)
        self.up = Linear(spec.width, spec.hidden, axes=("mlp", "embed"), bias=spec.bias)
        self.gate = None
        if spec.activation in GATED:
            self.gate = Linear(spec.width, spec.hidden, axes=("mlp", "embed"), bias=spec.bias)
        self.down = Linear(spec.hidden, spec.width, axes=("embed", "mlp"), bias=spec.bias)

    def forward(self, x: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """`keys` (B,): dropout keys for layers that drop."""
        if self.gate is None:
            return self.down(self.bend(self.up(x, keys)), keys)
        return self.down(self.bend(self.gate(x, keys)) * self.up(x, keys), keys)

    def extra_repr(self) -> str:
        return self.activation
