"""All passes over a model, in one order; a pass whose axis has size 1 changes nothing. Each pass is its own module.

    meta model → what tunes it → pipeline split → tensor (+ sequence) → context → compute dtype
               → block by block: memory and initial numbers → compile → data; recompute; the rest likewise

A block is shared out before the next gets memory: no process holds more than its part of the model and one block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from megalith.models.stack import LanguageModel, Rule, named_blocks
from megalith.parallel.compile import compile_block, compile_loss
from megalith.parallel.context import share_context
from megalith.parallel.cut import split
from megalith.parallel.data import share_data
from megalith.parallel.materialise import materialise
from megalith.parallel.memory import Recompute, check_recompute, recompute_blocks
from megalith.parallel.tensor import share_tensors
from megalith.topology.precision import precision as precision_of
from megalith.topology.topology import Topology


def build(
    model_class: type[nn.Module], config: object, topology: Topology, *, seed: int, precision: str = "32",
    compile: bool = False, recompute: Recompute | None = None, device: torch.device | None = None,
    adapt: Callable[[LanguageModel], Sequence[Rule]] | None = None,
) -> list[nn.Module]:  # fmt: skip
    """The stages of the model that this process owns, initialised and ready to train (one stage without a pipeline).

    Initial weights are a function of the seed and the parameters' names alone. `device`: default the topology's.
    `adapt` puts further parameters into the whole model (`adapt.Method.install`) and says how they begin.
    """
    check_recompute(topology, recompute)
    numbers, device = precision_of(precision), device or topology.device
    with torch.device("meta"):
        whole = model_class(config)
        rules = [*(adapt(whole) if adapt else ()), *whole.init_rules()]
    stages = split(whole.to(numbers.parameters), topology)
    for stage in stages:  # all of them before any gets memory: they may share layers
        share_tensors(stage, topology)
        share_context(stage, topology)
        stage.set_compute_dtype(numbers.compute)
    for stage in stages:
        for name, block in named_blocks(stage).items():
            materialise(block, rules, seed, device=device, prefix=f"{name}.")
            if compile:
                compile_block(block)
            share_data(block, topology)
        if recompute is not None:  # outside compile: inside it, sharded parameters break (torch 2.13)
            recompute_blocks(stage, recompute)
        materialise(stage, rules, seed, device=device)
        if compile:
            compile_loss(stage)
        share_data(stage, topology, root=True)
    return stages
