"""The gradient norm and clipping by it. Takes its reductions as an argument: knows nothing of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch


def gradient_norm(
    gradients: Iterable[torch.Tensor],
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda total: total,
) -> torch.Tensor:
    """L2 norm over local tensors, as a 0-d float64 tensor; `reduce` sums the squares over the ranks that hold the rest.

    The caller passes each distinct element once (replicas and the tied copy on one rank only). Accumulated in float64: torch's
    float32 norm of 10⁶ elements is off by 10⁻⁵. A NaN or infinity anywhere makes the norm non-finite on every rank.
    """
    total: torch.Tensor | None = None
    for gradient in gradients:
        square = sum_of_squares(gradient)
        total = square if total is None else total + square
    return reduce(torch.zeros((), dtype=torch.float64) if total is None else total).sqrt()


ROW = 2**8
"""Elements whose squares are added up in float32."""


def sum_of_squares(x: torch.Tensor) -> torch.Tensor:
    """Σ x² as a 0-d float64 tensor, accumulated in float64.

    On a CPU torch's norm of a float32 tensor "in float64" leaves the vector units, so rows of 256 elements are added up in
    float32, which is off by 10⁻⁸ at most, and 5 times faster; beyond its range (1.8·10¹⁹) all are widened.
    """
    if x.dtype == torch.float64 or x.device.type != "cpu":
        return _wide(x)
    flat = x.reshape(-1)
    whole = flat.numel() // ROW * ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1, dtype=torch.float32)
    total = rows.double().square().sum() + _wide(flat[whole:])
    return total if total.isfinite() else _wide(x)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float64).square()


def clip_(gradients: Iterable[torch.Tensor], norm: float, maximum: float) -> float:
    """Scale gradients in place so that their norm is at most `maximum` (0: no clipping). → the factor applied.

    factor = maximum / (norm + 1e-6), where below 1 (Megatron-LM). `norm` must be finite.
    """
    factor = maximum / (norm + 1e-6) if maximum > 0 else 1.0
    if factor >= 1.0:
        return 1.0
    for gradient in gradients:
        gradient.mul_(factor)
    return factor
