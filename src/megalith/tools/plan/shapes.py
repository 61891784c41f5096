"""A model as shapes alone: no numbers drawn, parameters without memory, and what other pipeline ranks hold, without asking."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from megalith.engine.local import like
from megalith.models.config import ModelConfig
from megalith.models.gpt import GPT, Blocks
from megalith.tools.plan.ledger import local_tensor
from megalith.topology.sizes import Sizes


class Shapes(GPT):
    """Whose initial numbers nobody draws."""

    def init_rules(self) -> list[Any]:
        return [("", 0.0)]


def pretend(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of the same shape and placement, on the CPU. Under a fake mode it has no memory."""
    local = local_tensor(parameter).detach()
    held = torch.empty_strided(local.shape, local.stride(), dtype=local.dtype, device="cpu")
    return nn.Parameter(like(parameter, held), requires_grad=parameter.requires_grad)


def shared_names(model: ModelConfig, sizes: Sizes) -> dict[str, list[int]]:
    """What `Pipeline` asks its peers: names of parameters on several pipeline ranks → these ranks. Blocks are on one."""
    with torch.device("meta"):
        shell = GPT(model)
    shell.blocks = Blocks()
    holders: dict[str, list[int]] = {}
    for rank in range(sizes.pipeline):
        names: dict[str, None] = {}
        for index in range(rank, sizes.stages, sizes.pipeline):
            stage = copy.deepcopy(shell)
            stage.cut(index, sizes.stages, range(0))
            names |= dict.fromkeys(name for name, _ in stage.named_parameters())
        for name in names:
            holders.setdefault(name, []).append(rank)
    return {name: ranks for name, ranks in sorted(holders.items()) if len(ranks) > 1}
