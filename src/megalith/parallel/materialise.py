"""A meta module gets memory and its initial numbers, which depend on the seed and on names alone, not on who holds what."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from megalith.topology.rng import Rule, initialise


@torch.no_grad()
def materialise(
    module: nn.Module, rules: Sequence[Rule], seed: int, *, device: torch.device, prefix: str = ""
) -> None:
    """Meta parameters → real memory, filled by `rules`; what is real already stays. `prefix` of the module's own names."""
    for path, child in module.named_modules():
        for key, parameter in list(child.named_parameters(recurse=False)):
            if parameter.is_meta:
                memory = torch.empty_like(parameter, device=device)
                setattr(child, key, nn.Parameter(memory, requires_grad=parameter.requires_grad))
                name = prefix + ".".join(filter(None, (path, key)))
                initialise([(name, getattr(child, key))], rules, seed)
