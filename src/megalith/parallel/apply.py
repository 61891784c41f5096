"""All passes over a model, in one order. A pass whose axis has size 1 changes nothing.

    meta model → pipeline split → tensor (+ sequence) → compute dtype
               → block by block: real memory, numbers from the seed → compile → data
               → recompute → the rest of the stage likewise

Knows the order and nothing else: each pass is its own module. A block is sharded before the next one gets memory, so no
process ever holds more than its part of the model and one block of it.
"""

from __future__ import annotations

import torch
from torch import nn

from megalith.errors import UnsupportedError
from megalith.parallel.compile import compile_block, compile_loss
from megalith.parallel.data import share_data
from megalith.parallel.memory import Recompute, recompute_blocks
from megalith.parallel.pipeline import split
from megalith.parallel.tensor import share_tensors
from megalith.topology.precision import precision as precision_of
from megalith.topology.rng import Rule, initialise
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
    Errors: `UnsupportedError` for recomputation over several blocks whose weights are not kept together.
    """
    _refuse(topology, recompute)
    numbers = precision_of(precision)
    with torch.device("meta"):
        whole = model_class(config).to(numbers.parameters)
    rules = whole.init_rules()
    stages = split(whole, topology, len(whole.blocks))
    for stage in stages:
        share_tensors(stage, topology)
        stage.set_compute_dtype(numbers.compute)
    for stage in stages:
        for name, block in stage.blocks.items():
            materialise(block, f"blocks.{name}.", rules, seed, device or topology.device)
            if compile:
                compile_block(block)
            share_data(block, topology)
        if recompute is not None:  # outside compile: inside it, sharded parameters break (torch 2.13)
            recompute_blocks(stage, recompute)
        materialise(stage, "", rules, seed, device or topology.device)
        if compile:
            compile_loss(stage)
        share_data(stage, topology, root=True)
    return stages


def _refuse(topology: Topology, recompute: Recompute | None) -> None:
    joined = recompute is not None and recompute.method == "uniform" and recompute.layers > 1
    if joined and topology.sizes.zero_stage == 3 and topology.size("shard") > 1:
        raise UnsupportedError(
            "recomputing several layers as one needs all of their weights at once, zero_stage 3 gathers a layer's",
            where="model.activations_checkpoint_num_layers",
            fix="use 1, or activations_checkpoint_method block, or zero_stage 2",
        )


@torch.no_grad()
def materialise(module: nn.Module, prefix: str, rules: list[Rule], seed: int, device: torch.device) -> None:
    """Meta parameters → real memory with their initial numbers; what is real already stays."""
    for path, child in module.named_modules():
        for key, parameter in list(child.named_parameters(recurse=False)):
            if not parameter.is_meta:
                continue
            real = nn.Parameter(
                torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad
            )
            setattr(child, key, real)
            name = prefix + ".".join(filter(None, (path, key)))
            initialise([(name, real)], rules, seed)
