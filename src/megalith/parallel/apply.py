"""All passes over a model, in one order. A pass whose axis has size 1 changes nothing, so it is not called.

    meta model → real memory, numbers from the seed → compute dtype → compile per block → recompute

Knows the order and nothing else: each pass is its own module.
"""

from __future__ import annotations

import torch
from torch import nn

from megalith.parallel.compile import compile_stage
from megalith.parallel.memory import Recompute, recompute_blocks
from megalith.topology.precision import precision as precision_of
from megalith.topology.rng import initialise
from megalith.topology.topology import Topology


def build(
    model_class: type[nn.Module],
    config: object,
    topology: Topology,
    *,
    seed: int,
    precision: str = "32",
    compile: bool = False,
    recompute: Recompute | None = None,
    device: torch.device | None = None,
) -> list[nn.Module]:
    """The stages of the model that this process owns, initialised and ready to train (one stage without a pipeline).

    Initial weights are a function of the seed and the parameters' names alone. `device`: default the topology's.
    """
    numbers = precision_of(precision)
    with torch.device("meta"):
        stage = model_class(config).to(numbers.parameters)
    stage.to_empty(device=device or topology.device)
    initialise(stage.named_parameters(), stage.init_rules(), seed)
    stage.set_compute_dtype(numbers.compute)
    if compile:
        compile_stage(stage)
    if recompute is not None:  # outside compile: inside it, sharded parameters break (torch 2.13)
        recompute_blocks(stage, recompute)
    return [stage]
