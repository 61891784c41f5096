"""Cross entropy of the next token, with logits that exist for a chunk of rows at a time.

Logits of a chunk, their log-sum-exp over the true vocabulary and, in training, the gradients of hidden states and of
the head are made in the same pass, so the (B·T, V) logits never exist whole; backward only multiplies by the incoming
gradient. Divides by nothing: the sum and the count leave apart, the engine divides once by the global count.

    hidden chunk (N, D) ─ · Wᵀ ─▶ (N, V) ─▶ Σ loss, p − 1[target] ─┬─ · W ─▶ dhidden (N, D)
                                                                 └─ ᵀ · hidden, added up ─▶ dW (V, D)

Legend: B batch, T time, D width, V true vocabulary, N rows of a chunk
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from megalith.nn.precision import at_least_fp32

NOT_COUNTED = -1
"""Target of a position that does not enter the loss."""

CHUNK = {"cpu": 512, "cuda": 4096}
"""Rows at a time: on a CPU few, for the cache; on a GPU many, since each chunk reads and writes the fp32 gradient of the table."""
ALIGNED_COLUMNS = 8
"""A GPU multiplies half-precision matrices at full speed only if their rows begin at multiples of 16 bytes."""

Elementwise = Callable[[torch.Tensor, torch.Tensor, torch.dtype], tuple[torch.Tensor, torch.Tensor]]
Value = Callable[[torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]


class LossTerm(NamedTuple):
    """One named part of a loss: the `sum` over counted targets (fp32 at least), their `count`, the `weight` in the total."""

    sum: torch.Tensor
    count: torch.Tensor
    weight: float = 1.0


class CrossEntropy(nn.Module):
    """Sum of −log p(target) over counted targets, `chunk` rows at a time (None: as many as suit the device).

    `elementwise` (loss and gradient of a chunk's logits) and `value` (its loss alone) may be replaced. `picks`: on a CPU, logits of
    rows that are not counted are left out; on a GPU one would have to wait for their number.
    """

    def __init__(self, chunk: int | None = None) -> None:
        super().__init__()
        self.chunk, self.picks = chunk, False
        self.compute_dtype: torch.dtype | None = None
        self.elementwise: Elementwise = softmax_minus_one_hot
        self.value: Value = chunk_sum

    def forward(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        vocabulary: int,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden (…, D), head weight (≥ V, D), targets (…) with −1 not counted → scalar sum, fp32 at least.

        `bias` (≥ V,) is added to the logits.
        """
        hidden, targets = hidden.flatten(0, -2), targets.flatten()
        if self.picks and hidden.device.type == "cpu":
            rows = (targets >= 0).nonzero()[:, 0]
            hidden, targets = hidden[rows], targets[rows]
        dtype = self.compute_dtype or hidden.dtype
        learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        chunk = self.chunk or CHUNK.get(hidden.device.type, max(CHUNK.values()))
        plan = _Plan(vocabulary, chunk, dtype, learns, self.elementwise, self.value)
        return ChunkedCrossEntropy.apply(hidden, weight, bias, targets, plan)

    def extra_repr(self) -> str:
        return f"{self.chunk} rows at a time" if self.chunk else ""


class _Plan(NamedTuple):
    vocabulary: int
    chunk: int
    dtype: torch.dtype
    learns: bool
    elementwise: Elementwise
    value: Value


class ChunkedCrossEntropy(torch.autograd.Function):
    """(N, D), (≥ V, D), (≥ V,) or None, (N,) → scalar. See the module's drawing; an argument that needs no gradient costs none."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        plan: _Plan,
    ) -> torch.Tensor:
        wide = at_least_fp32(hidden)
        columns = product_columns(plan.vocabulary, weight)
        table = weight[:columns].to(plan.dtype)
        shift = None if bias is None else bias[: plan.vocabulary].to(plan.dtype)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        wants = [plan.learns and need for need in ctx.needs_input_grad[:3]]
        hidden_gradient = torch.empty_like(hidden) if wants[0] else None
        weight_gradient = torch.empty_like(weight) if wants[1] else None
        bias_gradient = torch.zeros_like(bias) if bias is not None and wants[2] else None
        if weight_gradient is not None:
            weight_gradient[columns if len(hidden) else 0 :] = 0
        for begin in range(0, hidden.shape[0], plan.chunk):
            rows = slice(begin, begin + plan.chunk)
            h = hidden[rows].to(plan.dtype)
            if not any(wants):
                total += plan.value(chunk_logits(h, table, plan.vocabulary, shift), targets[rows], wide)
                continue
            part, gradient = plan.elementwise(
                chunk_logits(h, table, plan.vocabulary, shift), targets[rows], wide
            )
            total += part
            if bias_gradient is not None:
                bias_gradient[: plan.vocabulary] += gradient.sum(0, dtype=bias_gradient.dtype)
            if columns > plan.vocabulary:
                gradient = F.pad(gradient, (0, columns - plan.vocabulary))
            if hidden_gradient is not None:
                hidden_gradient[rows] = gradient @ table
            if weight_gradient is not None:
                accumulate(weight_gradient[:columns], gradient.T @ h, first=begin == 0)
        ctx.save_for_backward(hidden_gradient, weight_gradient, bias_gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients = (
            None if gradient is None else gradient * upstream.to(gradient.dtype)
            for gradient in ctx.saved_tensors
        )
        return *gradients, None, None


def product_columns(vocabulary: int, weight: torch.Tensor) -> int:
    """How many rows of the table are multiplied: the true vocabulary, on a GPU up to the next aligned number that there is."""
    if weight.device.type == "cpu":
        return vocabulary
    return min(-(-vocabulary // ALIGNED_COLUMNS) * ALIGNED_COLUMNS, weight.shape[0])


def chunk_logits(
    hidden: torch.Tensor, table: torch.Tensor, vocabulary: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """(N, D), (≥ V, D), (V,) → (N, V); what the table has beyond the vocabulary is multiplied and cut off."""
    logits = hidden @ table.T
    logits = logits if logits.shape[-1] == vocabulary else logits[:, :vocabulary]
    return logits if bias is None else logits.add_(bias)


def softmax_minus_one_hot(
    logits: torch.Tensor, targets: torch.Tensor, wide: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, V) → summed loss of the counted rows, and its gradient by the logits in the logits' own dtype.

    Eager, it overwrites its logits where they are wide already: a chunk exists once, not once an operation.
    """
    dtype, counted = logits.dtype, (targets >= 0).to(wide)
    column = targets.clamp(min=0)[:, None]
    logits = logits.to(wide)
    logits -= logits.amax(-1, keepdim=True)
    chosen = logits.gather(-1, column)[:, 0]
    total = logits.exp_().sum(-1)
    loss = ((total.log() - chosen) * counted).sum()
    if (
        torch.compiler.is_compiling()
    ):  # a scatter would end the fused loop: it is twice as slow (measured, CPU)
        target = torch.arange(logits.shape[-1], device=logits.device) == column
        logits = logits * (counted / total)[:, None] - torch.where(target, counted[:, None], 0)
        return loss, logits.to(dtype)
    logits *= (counted / total)[:, None]
    logits.scatter_add_(-1, column, -counted[:, None])
    return loss, logits.to(dtype)


def accumulate(total: torch.Tensor, part: torch.Tensor, *, first: bool) -> None:
    """`total` (uninitialised before the first part) += `part`, in the dtype of `total`."""
    if first:
        total.copy_(part)
    else:
        total += part


def chunk_sum(logits: torch.Tensor, targets: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """The loss alone, for evaluation."""
    logits = logits.to(wide)
    chosen = logits.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    return ((logits.logsumexp(-1) - chosen) * (targets >= 0)).sum()
