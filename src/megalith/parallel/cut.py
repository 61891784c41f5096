"""Which layers a process of a pipeline holds.

    rank 0   stage 0 (layers 0-1)   stage 2 (4-5)      with two stages a rank, stages go round the ranks
    rank 1   stage 1 (layers 2-3)   stage 3 (6-7)

Of an encoder-decoder the first stages hold the encoder and the others the decoder. Knows models that can `cut` themselves;
nothing of schedules, nor of what passes between stages.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from megalith.models.stack import towers
from megalith.topology.topology import Topology


def split(whole: nn.Module, topology: Topology) -> list[nn.Module]:
    """The stages of a meta model that this process holds; the model itself without a pipeline.

    What several stages need (a relative bias, a tied table) is one module in all stages of a process.
    """
    sizes = topology.sizes
    if sizes.pipeline == 1:
        return [whole]
    parts = sizes.layers_of(*map(len, towers(whole)))
    found = holders(whole, parts)
    stages: list[nn.Module] = []
    for index in range(topology.rank("pipeline"), sizes.stages, sizes.pipeline):
        stage = copy.deepcopy(whole)
        stage.cut(index, sizes.stages, parts[index])  # type: ignore[operator]
        stage.holders = found  # type: ignore[assignment]
        for name, held in found.items():
            before = [i for i in held if i < index and i % sizes.pipeline == index % sizes.pipeline]
            if index in held and before:
                path = name.rpartition(".")[0]
                stage.set_submodule(path, stages[before[0] // sizes.pipeline].get_submodule(path))
        stages.append(stage)
    return stages


def holders(whole: nn.Module, parts: Sequence[range]) -> dict[str, list[int]]:
    """Names of the parameters that several stages hold → these stages, which have `parts` of the layers."""
    shell = copy.deepcopy(whole)
    for tower in towers(shell):
        for layer in tower:
            tower[layer] = nn.Identity()
    found: dict[str, list[int]] = {}
    for index, layers in enumerate(parts):
        stage = copy.deepcopy(shell)
        stage.cut(index, len(parts), layers)  # type: ignore[operator]
        for name, _ in stage.named_parameters():
            found.setdefault(name, []).append(index)
    return {name: stages for name, stages in sorted(found.items()) if len(stages) > 1}
