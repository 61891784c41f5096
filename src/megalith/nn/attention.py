"""Self-attention and cross-attention: projections, rotation, and the core that weighs values.

The core (`cores.py`) is a submodule so that it can be swapped (context parallel) or recomputed on its own (selective
checkpointing).

    x ─ qkv ─┬─ q ─ rotate ─┐
             ├─ k ─ rotate ─┼─ [cache] ─ core ─ out
             └─ v ──────────┘

    x ─ q ─────────────────┬─ core ─ out         across: keys and values are of another sequence, the memory
    memory ─ kv ─┬─ k ─────┤
                 └─ v ─────┘

Legend: B batch, T time, S keys (of the memory: its time), D width, H heads, G key-value heads, R = H/G heads a group, K head_dim
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from megalith.nn.cache import LayerCache
from megalith.nn.cores import CoreName, make_core
from megalith.nn.dropout import SITE_PROBABILITIES
from megalith.nn.linear import Linear
from megalith.nn.position import Rotary
from megalith.nn.visibility import Visibility


@dataclass(frozen=True)
class AttentionSpec:
    """Shape and options of one attention layer. `scale` None: 1/√K. `qkv_bias`, `out_bias`: which projections have one.

    `site` numbers the dropout of probabilities.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = True
    out_bias: bool = True
    scale: float | None = None
    dropout: float = 0.0
    rotary: Rotary | None = None
    core: CoreName = "auto"
    site: int = SITE_PROBABILITIES


class Shared(NamedTuple):
    """What all layers of one forward share: who sees whom (as the core wants it), and the rotary cosines and sines.

    Of a decoder also `memory` (B, S, D), the encoder's last hidden states, and `across`: who sees which of them.
    """

    visibility: Visibility
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    memory: torch.Tensor | None = None
    across: Visibility | None = None


class Attention(nn.Module):
    """(B, T, D) → (B, T, D). `qkv` rows are grouped by key-value head: (G, R queries + key + value, K).

    With as many key-value heads as heads this is Megatron's order [head][q|k|v]; any split of the rows into whole
    groups is a valid smaller attention, which is what tensor parallelism needs.
    """

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.head_dim, self.rotary = spec.head_dim, spec.rotary
        self.kv_heads = spec.kv_heads
        """Key-value heads that this process holds."""
        self.group_size = spec.heads // spec.kv_heads
        self.add_projections(spec)
        self.core = make_core(spec)
        self.out = Linear(spec.heads * spec.head_dim, spec.width, axes=("embed", "heads"), bias=spec.out_bias)

    def add_projections(self, spec: AttentionSpec) -> None:
        """The layers that make queries, keys and values."""
        rows = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
        self.qkv = Linear(spec.width, rows, axes=("kv_heads", "embed"), bias=spec.qkv_bias)

    def forward(
        self,
        x: torch.Tensor,
        shared: Shared,
        keys: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        q, k, v = self.project(x, keys)
        if self.rotary is not None and shared.rotary is not None:
            q, k = self.rotary.rotate(q, *shared.rotary), self.rotary.rotate(k, *shared.rotary)
        if cache is not None:
            k, v = cache.extend(k, v)
            q = q.to(k.dtype)
        y = self.core(q, k, v, shared.visibility, keys)
        return self.out(y.transpose(1, 2).flatten(2), keys)

    def project(
        self, x: torch.Tensor, keys: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, T, D) → q (B, H, T, K), k and v (B, G, T, K)."""
        qkv = self.qkv(x, keys)
        groups = qkv.unflatten(-1, (-1, self.group_size + 2, self.head_dim))
        q, k, v = groups.split((self.group_size, 1, 1), dim=-2)
        return q.flatten(2, 3).transpose(1, 2), k.squeeze(-2).transpose(1, 2), v.squeeze(-2).transpose(1, 2)


class CrossAttention(Attention):
    """(B, T, D) → (B, T, D): queries of a decoder look at an encoder's output. Rows of `kv` are (G, key + value, K)."""

    def add_projections(self, spec: AttentionSpec) -> None:
        """Queries of one sequence, keys and values of the other."""
        inner, rows = spec.heads * spec.head_dim, 2 * spec.kv_heads * spec.head_dim
        self.q = Linear(spec.width, inner, axes=("heads", "embed"), bias=spec.qkv_bias)
        self.kv = Linear(spec.width, rows, axes=("kv_heads", "embed"), bias=spec.qkv_bias)

    def forward(
        self,
        x: torch.Tensor,
        shared: Shared,
        keys: torch.Tensor | None = None,
        seen: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """`seen`: keys and values of the memory where they were made before (`look_up`)."""
        q = self.q(x, keys).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        k, v = self.look_up(shared.memory, keys) if seen is None else seen
        y = self.core(q.to(k.dtype), k, v, shared.across, keys)
        return self.out(y.transpose(1, 2).flatten(2), keys)

    def look_up(
        self, memory: torch.Tensor, keys: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory (B, S, D) → its keys and values, each (B, G, S, K): the same for every query, so they are made once."""
        k, v = self.kv(memory, keys).unflatten(-1, (-1, 2, self.head_dim)).unbind(-2)
        return k.transpose(1, 2), v.transpose(1, 2)
