"""A model as shapes alone: no numbers drawn, parameters without memory, and a head that asks no data how much it sees."""

from __future__ import annotations

import math

import torch
from torch import nn

from megalith.engine.local import like
from megalith.models.config import ModelConfig
from megalith.models.family import class_of
from megalith.models.heads import MaskedHead
from megalith.parallel.layers import SequenceMaskedHead
from megalith.tools.plan.ledger import local_tensor


def shapes_of(model: ModelConfig) -> type[nn.Module]:
    """The class of its family; its initial numbers nobody draws."""
    return type("Shapes", (class_of(model),), {"init_rules": lambda self: [("", 0.0)]})


def pretend(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of the same shape and placement, on the CPU. Under a fake mode it has no memory."""
    local = local_tensor(parameter).detach()
    held = torch.empty_strided(local.shape, local.stride(), dtype=local.dtype, device="cpu")
    return nn.Parameter(like(parameter, held), requires_grad=parameter.requires_grad)


def count_targets(head: MaskedHead, each: float) -> None:
    """Makes BERT's head see so many positions of each row: shapes have no targets that could be counted."""
    parts = head.shares.parts if isinstance(head, SequenceMaskedHead) else 1

    def counted(hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = math.ceil(each * len(targets) / parts)
        rows, wanted = hidden.flatten(0, 1)[:chosen], targets.flatten()[: chosen * parts]
        return (rows, wanted) if parts == 1 else (rows[None], wanted[None])

    head.counted = counted  # type: ignore[method-assign]
