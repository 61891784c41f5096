"""One transformer block, for every architecture: attention and feed-forward, each with norm, dropout and residual.

In a decoder that has an encoder, attention across to it stands between the two, wired like them.

    pre_ln    x ─┬─ norm ─ f ─ drop ─ + ─▶        residual_after_norm: the line below starts behind the norm
                 └────────────────────┘
    post_ln   x ─┬─ f ─ drop ─ + ─ norm ─▶
                 └─────────────┘

A forward writes no attribute and reads no number of its layer: one compiled block serves all, and recomputation
replays it exactly (dropout is keyed).

Legend: B batch, T time, D width
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from megalith.nn.attention import Attention, AttentionSpec, CrossAttention, Shared
from megalith.nn.cache import LayerCache
from megalith.nn.dropout import SITE_ATTENTION, SITE_CROSS, SITE_MLP, Dropout
from megalith.nn.mlp import MLP, MLPSpec
from megalith.nn.norm import NormKind, make_norm


@dataclass(frozen=True)
class BlockSpec:
    """Options of one block. `wiring`: where the norm stands, and where the residual line starts.

    `cross`: attention to an encoder's output; None: there is no encoder.
    """

    attention: AttentionSpec
    mlp: MLPSpec
    norm: NormKind = "layernorm"
    eps: float = 1e-5
    dropout: float = 0.0
    wiring: Literal["pre_ln", "pre_ln_residual_after_norm", "post_ln"] = "pre_ln"
    cross: AttentionSpec | None = None


class Block(nn.Module):
    """(B, T, D) → (B, T, D). A half-precision branch added onto an fp32 stream stays fp32."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        width = spec.attention.width
        self.wiring = spec.wiring
        self.norm_attention = make_norm(spec.norm, width, spec.eps)
        self.attention = Attention(spec.attention)
        self.drop_attention = Dropout(spec.dropout, SITE_ATTENTION)
        self.cross: CrossAttention | None = None
        if spec.cross is not None:
            self.norm_cross = make_norm(spec.norm, width, spec.eps)
            self.cross = CrossAttention(spec.cross)
            self.drop_cross = Dropout(spec.dropout, SITE_CROSS)
        self.norm_mlp = make_norm(spec.norm, width, spec.eps)
        self.mlp = MLP(spec.mlp)
        self.drop_mlp = Dropout(spec.dropout, SITE_MLP)

    def forward(
        self,
        x: torch.Tensor,
        shared: Shared,
        keys: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        """`keys` (B,): dropout keys of this layer (`layer_keys`), needed in training with dropout."""
        across = None if cache is None else cache.across
        if self.wiring == "post_ln":
            x = self.norm_attention(x + self.drop_attention(self.attention(x, shared, keys, cache), keys))
            if self.cross is not None:
                x = self.norm_cross(x + self.drop_cross(self.cross(x, shared, keys, across), keys))
            return self.norm_mlp(x + self.drop_mlp(self.mlp(x, keys), keys))
        y = self.norm_attention(x)
        line = x if self.wiring == "pre_ln" else y
        x = line + self.drop_attention(self.attention(y, shared, keys, cache), keys)
        if self.cross is not None:
            y = self.norm_cross(x)
            line = x if self.wiring == "pre_ln" else y
            x = line + self.drop_cross(self.cross(y, shared, keys, across), keys)
        y = self.norm_mlp(x)
        line = x if self.wiring == "pre_ln" else y
        return line + self.drop_mlp(self.mlp(y, keys), keys)

    def extra_repr(self) -> str:
        return self.wiring
