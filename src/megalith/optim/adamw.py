"""The update rules: torch's fused AdamW and friends over plain local tensors, their state present from the start.

Knows which torch class a config name means and what its state is called in a checkpoint. Knows no parameter names, no
DTensor and no process: on a layout with sharded parameters the engine passes the local parts, which share memory with them.
State exists before the first update, so that a checkpoint has tensors to load into.
"""

from __future__ import annotations

from typing import Any

import torch

from megalith.optim.config import OptimConfig


def make_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """An optimizer over `parameter_groups`, with zeroed state for every parameter.

    Without groups, one of nothing: a pipeline stage may have only frozen parameters, and steps with the others.
    fused_adam and adamw: AdamW (Loshchilov & Hutter 2019); adam: the decay is added to the gradient; sgd: with momentum.
    """
    groups = groups or [{"params": [], "names": [], "lr_mult": 1.0, "wd_mult": 0.0}]
    if config.name == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    else:
        kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
        optimizer = kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter].update(_empty_state(parameter, config))
    return optimizer


def _empty_state(parameter: torch.Tensor, config: OptimConfig) -> dict[str, torch.Tensor]:
    names = moment_names(config)
    state = {name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in names}
    if config.name != "sgd":
        # A fused kernel wants its counter beside the parameter, in float32.
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return state


def moment_names(config: OptimConfig) -> tuple[str, ...]:
    """Names of a parameter's state tensors of the parameter's shape (`optim.NAME.<this>` in a checkpoint)."""
    if config.name == "sgd":
        return ("momentum_buffer",) if config.momentum else ()
    return ("exp_avg", "exp_avg_sq")


def get_updates(optimizer: torch.optim.Optimizer) -> int:
    """How many updates Adam's bias correction has counted (0 for SGD, which counts none)."""
    steps = {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    return max(steps, default=0)


def set_updates(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Tell Adam how many updates have been made, after its moments were loaded."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(updates)
