"""Attention cores: scores, who may look at whom, softmax, weighted values. No parameters, no projections.

`sdpa` everywhere; `flex` where document masks meet a GPU; `eager` written out, for dropout of probabilities and to compare
with. A core that cannot honour the mask or the dropout asked for refuses by name. On a CPU a document mask becomes one
causal call a document (Σ length² work and no mask) where that is cheaper than one masked call.

Legend: B batch, T queries, S keys, H heads, G key-value heads, K head_dim
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from megalith.errors import UnsupportedError
from megalith.nn.dropout import ProbabilityDropout
from megalith.nn.precision import at_least_fp32
from megalith.nn.visibility import Visibility, as_mask, document_lengths, triangle

CoreName = Literal["auto", "sdpa", "flex", "eager"]
CALL_COST, CAUSAL_SHARE = 1500, 0.6
"""On CPU (measured): a call costs as much as this many masked scores, a causal score this share of a masked one."""

WRITTEN_OUT = 512 * 512
"""On CPU, in half precisions (measured): up to so many scores of a head SDPA is the slower way to train."""

FLEX_LEAST_WIDTH = 16
"""Its kernel multiplies tiles of this many channels."""


class CoreSpec(Protocol):
    """What a core reads of an attention layer's options."""

    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def scale(self) -> float | None: ...
    @property
    def dropout(self) -> float: ...
    @property
    def core(self) -> CoreName: ...
    @property
    def site(self) -> int: ...


def make_core(spec: CoreSpec) -> nn.Module:
    """The core of a name; `auto` is flex (which is SDPA but for document masks on CUDA), or eager under dropout.

    Errors: `UnsupportedError` for dropout in a core that cannot drop by key.
    """
    if spec.core == "eager" or (spec.core == "auto" and spec.dropout > 0):
        return EagerCore(spec)
    return SDPACore(spec) if spec.core == "sdpa" else FlexCore(spec)


class SDPACore(nn.Module):
    """`scaled_dot_product_attention`: any mask, no dropout of probabilities (its own would depend on the layout)."""

    name = "sdpa"

    def __init__(self, spec: CoreSpec) -> None:
        super().__init__()
        if spec.dropout > 0:
            raise UnsupportedError(
                f"the {self.name} core cannot drop attention probabilities by key (attention_dropout {spec.dropout:g})",
                where="model.attention_core",
                fix="use attention_core eager (or auto), or attention_dropout 0",
            )
        self.scale = spec.scale
        self.grouped = spec.kv_heads != spec.heads

    def wants_blocks(self, device: torch.device) -> bool:
        """Should document masks come as flex attention's blocks?"""
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
        refuse_blocks(self.name, visibility)
        if visibility.causal:
            return self.attend(q, k, v, causal=True)
        square = q.shape[2] == k.shape[2]
        if (
            visibility.documents is not None
            and square
            and q.device.type == "cpu"
            and not torch.compiler.is_compiling()
        ):
            lengths = document_lengths(visibility.documents)
            if lengths is not None and worth_splitting(lengths):
                return self.by_document(q, k, v, lengths)
        mask = as_mask(visibility, q.shape[2], k.shape[2], q.device)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        return self.attend(q, k, v, mask=mask)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        if faster_written_out(q, k, mask):
            if causal:
                mask = triangle(q.shape[2], k.shape[2], q.device)
            return written_out(q, k, v, mask, self.scale)
        if causal and q.shape[2] != k.shape[2]:
            # By the kernels' own flag the first query would meet the first key.
            mask, causal = last_meets_last(q.shape[2], k.shape[2]), False
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale, enable_gqa=self.grouped
        )

    def by_document(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[list[int]]
    ) -> torch.Tensor:
        """One small causal attention a document."""
        rows = []
        for row, pieces in zip(zip(q, k, v, strict=True), lengths, strict=True):
            parts = zip(*(x[None].split(pieces, dim=2) for x in row), strict=True)
            rows.append(torch.cat([self.attend(*part, causal=True) for part in parts], dim=2))
        return torch.cat(rows)

    def extra_repr(self) -> str:
        return "" if self.scale is None else f"scale={self.scale:g}"


class FlexCore(SDPACore):
    """Flex attention where a block mask asks for it (document masks on CUDA), SDPA for everything else."""

    name = "flex"

    def __init__(self, spec: CoreSpec) -> None:
        super().__init__(spec)
        self.insists = spec.core == "flex"
        self.wide_enough = spec.head_dim >= FLEX_LEAST_WIDTH

    def wants_blocks(self, device: torch.device) -> bool:
        """Where the kernel trains; elsewhere only to evaluate, when flex was asked for by name.

        Errors: `UnsupportedError` with the reason when flex was asked for by name and cannot train.
        """
        reason = self.untrainable(device)
        if self.insists and reason and torch.is_grad_enabled():
            raise UnsupportedError(
                f"flex attention {reason}",
                where="model.attention_core",
                fix="use attention_core auto or sdpa, which honour document masks there",
            )
        return self.insists or not reason

    def untrainable(self, device: torch.device) -> str:
        """Why document blocks cannot be used in training here; empty when they can."""
        if device.type != "cuda":
            return f"has no backward on {device.type}"
        if importlib.util.find_spec("triton") is None:
            return "needs triton, which is not installed"
        return "" if self.wide_enough else f"needs heads of at least {FLEX_LEAST_WIDTH} channels"

    @functools.cached_property
    def kernel(self) -> Callable[..., torch.Tensor]:
        """Flex attention is fast only compiled; inside a compiled block it is part of that graph instead."""
        from torch.nn.attention.flex_attention import flex_attention

        return torch.compile(flex_attention)

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
        from torch.nn.attention.flex_attention import flex_attention

        inlined = torch.compiler.is_compiling() or q.device.type == "cpu"
        attend = flex_attention if inlined else self.kernel
        return attend(q, k, v, block_mask=visibility.blocks, scale=self.scale, enable_gqa=self.grouped)


class EagerCore(nn.Module):
    """Scores written out: any mask, keyed dropout of probabilities; memory grows with T·S."""

    name = "eager"

    def __init__(self, spec: CoreSpec) -> None:
        super().__init__()
        self.scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
        self.drop = ProbabilityDropout(spec.dropout, spec.site)

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
        """q (B, H, T, K), k and v (B, G, S, K) → (B, H, T, K); softmax and its dropout in fp32 at least."""
        refuse_blocks(self.name, visibility)
        if q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = (q @ k.transpose(-1, -2)).to(at_least_fp32(q)) * self.scale
        probabilities = self.drop(hide(scores, visibility).softmax(-1), keys, visibility.first)
        return probabilities.to(v.dtype) @ v

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}"


def last_meets_last(queries: int, keys: int) -> torch.Tensor:
    """The causal triangle of the last queries as torch's own kind of mask, by which a GPU's kernels need no numbers."""
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(queries, keys)


def faster_written_out(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Is `written_out` faster than SDPA in training on a CPU? Measured, forward and backward, heads of 64.

    Twice as fast in half precisions up to `WRITTEN_OUT` scores a head; three times under a mask that learns, to which no fused
    kernel there gives a gradient.
    """
    if q.device.type != "cpu" or not torch.is_grad_enabled():
        return False
    if mask is not None and mask.requires_grad:
        return True
    half = q.dtype in (torch.bfloat16, torch.float16)
    return half and q.requires_grad and q.shape[2] * k.shape[2] <= WRITTEN_OUT


def written_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """What SDPA computes, in three operations on tensors without the strides of heads; memory grows with T·S.

    Scores are kept in the dtype of the products, as Megatron's own are.
    """
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    q = (q * (q.shape[-1] ** -0.5 if scale is None else scale)).contiguous()
    scores = q @ k.contiguous().transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ v.contiguous()


def hide(scores: torch.Tensor, visibility: Visibility) -> torch.Tensor:
    """Scores (B, H, T, S) with −inf where a query may not look, and the bias added."""
    mask = as_mask(visibility, scores.shape[-2], scores.shape[-1], scores.device)
    if mask is None:
        return scores
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask


def worth_splitting(lengths: list[list[int]]) -> bool:
    """Is one call a document cheaper than one masked call for all?"""
    whole = sum(sum(row) ** 2 for row in lengths)
    return sum(CAUSAL_SHARE * n * n + CALL_COST for row in lengths for n in row) < whole


def refuse_blocks(name: str, visibility: Visibility) -> None:
    """Errors: `UnsupportedError` when a core without blocks is handed flex attention's."""
    if visibility.blocks is not None:
        raise UnsupportedError("block masks are for the flex core", where=f"the {name} attention core")
