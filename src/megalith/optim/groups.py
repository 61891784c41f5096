"""Which parameters decay. Knows shapes and names; knows no optimizer and no layout."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def parameter_groups(
    named_parameters: Iterable[tuple[str, torch.Tensor]], weight_decay: float
) -> list[dict[str, Any]]:
    """Two optimizer groups, matrices (which decay) and biases and 1-D parameters (which do not); empty ones are left out.

    Frozen parameters are left out. Each group carries `names`, in the order of `params`, and the multipliers
    `lr_mult` and `wd_mult` that `set_rates` applies to a schedule's numbers.
    """
    decays: dict[bool, list[tuple[str, torch.Tensor]]] = {True: [], False: []}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            decays[parameter.ndim > 1].append((name, parameter))
    return [
        {
            "params": [parameter for _, parameter in members],
            "names": [name for name, _ in members],
            "weight_decay": weight_decay if decay else 0.0,
            "lr_mult": 1.0,
            "wd_mult": 1.0 if decay else 0.0,
        }
        for decay, members in decays.items()
        if members
    ]


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Put this update's learning rate and weight decay into every group, each times the group's multipliers."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]
        group["weight_decay"] = weight_decay * group["wd_mult"]
