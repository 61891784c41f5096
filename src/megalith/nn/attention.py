"""Self-attention: projections, rotation, and the core that weighs values.

The core is a submodule so that it can be swapped (context parallel) or recomputed on its own (selective
checkpointing). A core that cannot honour the mask or the dropout asked for refuses by name.

    x ─ qkv ─┬─ q ─ rotate ─┐
             ├─ k ─ rotate ─┼─ [cache] ─ core ─ out
             └─ v ──────────┘

Legend: B batch, T time, S keys, D width, H heads, G key-value heads, R = H/G heads a group, K head_dim
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from megalith.errors import UnsupportedError
from megalith.nn.cache import LayerCache
from megalith.nn.dropout import SITE_PROBABILITIES, ProbabilityDropout
from megalith.nn.linear import Linear
from megalith.nn.position import Rotary
from megalith.nn.precision import at_least_fp32
from megalith.nn.visibility import Visibility

CoreName = Literal["auto", "sdpa", "flex", "eager"]


@dataclass(frozen=True)
class AttentionSpec:
    """Shape and options of one attention layer. `scale` None: 1/√K. `qkv_bias`, `out_bias`: which projections have one."""

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


class Shared(NamedTuple):
    """What all layers of one forward share: who sees whom, and the rotary cosines and sines."""

    visibility: Visibility
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None


class Attention(nn.Module):
    """(B, T, D) → (B, T, D). `qkv` rows are grouped by key-value head: (G, R queries + key + value, K).

    With as many key-value heads as heads this is Megatron's order [head][q|k|v]; any split of the rows into whole
    groups is a valid smaller attention, which is what tensor parallelism needs.
    """

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.head_dim, self.rotary = spec.head_dim, spec.rotary
        self.group_size = spec.heads // spec.kv_heads
        rows = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
        self.qkv = Linear(spec.width, rows, axes=("kv_heads", "embed"), bias=spec.qkv_bias)
        self.core = make_core(spec)
        self.out = Linear(spec.heads * spec.head_dim, spec.width, axes=("embed", "heads"), bias=spec.out_bias)

    def forward(
        self,
        x: torch.Tensor,
        shared: Shared,
        keys: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        q, k, v = self.project(x)
        if self.rotary is not None and shared.rotary is not None:
            q, k = self.rotary.rotate(q, *shared.rotary), self.rotary.rotate(k, *shared.rotary)
        if cache is not None:
            k, v = cache.extend(k, v)
        y = self.core(q, k, v, shared.visibility, keys)
        return self.out(y.transpose(1, 2).flatten(2))

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, T, D) → q (B, H, T, K), k and v (B, G, T, K)."""
        qkv = self.qkv(x)
        groups = qkv.unflatten(-1, (-1, self.group_size + 2, self.head_dim))
        q, k, v = groups.split((self.group_size, 1, 1), dim=-2)
        return q.flatten(2, 3).transpose(1, 2), k.squeeze(-2).transpose(1, 2), v.squeeze(-2).transpose(1, 2)


class SDPACore(nn.Module):
    """`scaled_dot_product_attention`: any mask, no dropout of probabilities (its own would depend on the layout)."""

    name = "sdpa"

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.scale = spec.scale
        self.grouped = spec.kv_heads != spec.heads
        refuse_dropout(self.name, spec)

    def wants_blocks(self, device: torch.device) -> bool:
        """Should masks come as flex attention's blocks?"""
        return False

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        visibility: Visibility,
        keys: torch.Tensor | None,
    ) -> torch.Tensor:
        """q (B, H, T, K), k and v (B, G, S, K) → (B, H, T, K)."""
        if visibility.blocks is not None:
            raise UnsupportedError(
                "block masks are for the flex core", where=f"the {self.name} attention core"
            )
        mask = visibility.mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=visibility.causal, scale=self.scale, enable_gqa=self.grouped
        )

    def extra_repr(self) -> str:
        return "" if self.scale is None else f"scale={self.scale:g}"


class FlexCore(SDPACore):
    """Flex attention where a block mask asks for it (document masks on CUDA), SDPA for everything else."""

    name = "flex"

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        self.insists = spec.core == "flex"

    def wants_blocks(self, device: torch.device) -> bool:
        """On CUDA; elsewhere only when flex was asked for by name. Errors: `UnsupportedError` to train so on a CPU."""
        if self.insists and device.type != "cuda" and torch.is_grad_enabled():
            raise UnsupportedError(
                f"flex attention has no backward on {device.type}",
                where="model.attention_core",
                fix="use attention_core auto or sdpa, which honour document masks there",
            )
        return device.type == "cuda" or self.insists

    @functools.cached_property
    def kernel(self) -> Callable[..., torch.Tensor]:
        return torch.compile(flex_attention, dynamic=False)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        visibility: Visibility,
        keys: torch.Tensor | None,
    ) -> torch.Tensor:
        if visibility.blocks is None:
            return super().forward(q, k, v, visibility, keys)
        inlined = torch.compiler.is_compiling() or q.device.type == "cpu"
        attend = flex_attention if inlined else self.kernel
        return attend(q, k, v, block_mask=visibility.blocks, scale=self.scale, enable_gqa=self.grouped)


class EagerCore(nn.Module):
    """Scores written out: any mask, keyed dropout of probabilities; memory grows with T·S. The core to compare with."""

    name = "eager"

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
        self.drop = ProbabilityDropout(spec.dropout, SITE_PROBABILITIES)

    def wants_blocks(self, device: torch.device) -> bool:
        return False

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        visibility: Visibility,
        keys: torch.Tensor | None,
    ) -> torch.Tensor:
        if visibility.blocks is not None:
            raise UnsupportedError(
                "block masks are for the flex core", where=f"the {self.name} attention core"
            )
        if q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = (q @ k.transpose(-1, -2)).to(at_least_fp32(q)) * self.scale
        probabilities = self.drop(hide(scores, visibility).softmax(-1), keys)
        return probabilities.to(v.dtype) @ v

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}"


def hide(scores: torch.Tensor, visibility: Visibility) -> torch.Tensor:
    """Scores (B, H, T, S) with −inf where a query may not look, and the bias added."""
    mask = visibility.mask
    if visibility.causal:
        queries, keys = scores.shape[-2:]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)
    if mask is None:
        return scores
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask


def make_core(spec: AttentionSpec) -> nn.Module:
    """The core of a name; `auto` is flex (which is SDPA but for document masks on CUDA), or eager under dropout."""
    if spec.core == "eager" or (spec.core == "auto" and spec.dropout > 0):
        return EagerCore(spec)
    return SDPACore(spec) if spec.core == "sdpa" else FlexCore(spec)


def refuse_dropout(name: str, spec: AttentionSpec) -> None:
    """Errors: `UnsupportedError` when probabilities should drop in a core that cannot do it by key."""
    if spec.dropout > 0:
        raise UnsupportedError(
            f"the {name} core cannot drop attention probabilities by key (attention_dropout {spec.dropout:g})",
            where="model.attention_core",
            fix="use attention_core eager (or auto), or attention_dropout 0",
        )
