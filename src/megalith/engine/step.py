"""Forward and backward over the micro-batches of one step. Knows no optimizer and no loop.

Each term's sum is divided once, by a number known beforehand, so gradients add up in `.grad` to those of the mean loss of
the whole global batch, however it is cut.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megalith.engine.batch import Share
from megalith.engine.objective import Batch, Objective
from megalith.errors import UnsupportedError
from megalith.nn.dropout import sample_keys
from megalith.topology.topology import Topology


def accumulate(
    model: nn.Module, objective: Objective, share: Share, *, seed: int, step: int, scale: float = 1.0
) -> dict[str, torch.Tensor]:
    """Gradients of `scale` × the mean loss into `.grad`. → this process's part of each term's mean, and the whole as "loss".

    Dropout masks depend on (seed, step, sample) only, never on the micro-batch that a sample is in.
    """
    total: dict[str, torch.Tensor] = {}
    for micro, divisors in zip(share.micros, share.divisors, strict=True):
        terms = objective.terms(model, micro, sample_keys(seed, step, micro["sample"]))
        parts = divide(terms, divisors)
        (parts["loss"] * scale if scale != 1.0 else parts["loss"]).backward()
        for name, part in parts.items():
            total[name] = total[name] + part.detach() if name in total else part.detach()
    return total


def divide(terms: dict[str, Any], divisors: dict[str, float]) -> dict[str, torch.Tensor]:
    """Each term's sum over its divisor, and their weighted sum as "loss"."""
    parts = {name: term.sum / divisors[name] for name, term in terms.items()}
    loss = sum(part if terms[name].weight == 1 else part * terms[name].weight for name, part in parts.items())
    return {**parts, "loss": loss}  # type: ignore[dict-item]


@torch.no_grad()
def evaluate(
    model: nn.Module, objective: Objective, batch: Batch, topology: Topology
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Sum (float64) and count of each term over one batch of every data rank, without dropout."""
    terms = objective.terms(model, batch, None)
    axes = ("replicate", "shard", "context")
    return {
        name: (topology.sum(term.sum.double(), *axes), topology.sum(torch.as_tensor(term.count), *axes))
        for name, term in terms.items()
    }


def require_gradients(parameters: dict[str, torch.Tensor]) -> None:
    """After the first backward: every trainable parameter has a gradient, or the ones without are named."""
    missing = [name for name, parameter in parameters.items() if parameter.grad is None]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise UnsupportedError(
            f"no gradient reached {len(missing)} of {len(parameters)} trainable parameters: {shown}",
            where="first backward",
            fix="freeze what the loss does not use, or use it",
        )
