"""Pipeline parallelism: which layers a process holds, and the schedules that move micro-batches through the stages.

    rank 0   stage 0 (layers 0-1)   stage 2 (4-5)      with two stages a rank, stages go round the ranks
    rank 1   stage 1 (layers 2-3)   stage 3 (6-7)

Training runs on torch.distributed.pipelining; shapes are stated, so that it does not run a forward and backward to find them,
and a schedule is kept for each (micro-batches, size, length). Evaluation sends activations stage by stage by itself: any
number of micro-batches, no gradients. Knows a model that can `cut` itself. Knows no loss but as a function.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from megalith.parallel.data import local_gradient
from megalith.parallel.stage import Stage
from megalith.topology.topology import Topology

Loss = Callable[[torch.Tensor, int], torch.Tensor]
"""(output of the last stage, number of the micro-batch) → scalar."""


def split(whole: nn.Module, topology: Topology, layers: int) -> list[nn.Module]:
    """The stages of a meta model that this process holds; the model itself without a pipeline.

    What all stages need (a relative bias) is one module in all stages of a process.
    """
    sizes = topology.sizes
    if sizes.pipeline == 1:
        return [whole]
    stages = []
    for index in range(topology.rank("pipeline"), sizes.stages, sizes.pipeline):
        stage = copy.deepcopy(whole)
        stage.cut(index, sizes.stages, sizes.layers_of(layers)[index])  # type: ignore[operator]
        if stages and getattr(stage, "relative_bias", None) is not None:
            stage.relative_bias = stages[0].relative_bias
        stages.append(stage)
    return stages


class Pipeline:
    """The schedules of one process's stages."""

    def __init__(self, stages: Sequence[nn.Module], topology: Topology) -> None:
        self.stages, self.topology = list(stages), topology
        sizes, rank = topology.sizes, topology.rank("pipeline")
        self.indices = list(range(rank, sizes.stages, sizes.pipeline))
        self._schedules: dict[tuple[int, int, int], tuple[Any, list[Loss]]] = {}
        self.shared = self._shared_names()
        """Names of parameters on several pipeline ranks → these ranks."""

    # -- training ------------------------------------------------------------------------------------------------

    def step(self, tokens: torch.Tensor, kwargs: dict[str, torch.Tensor], count: int, loss: Loss) -> None:
        """Forward and backward of `count` micro-batches, cut from (B·count, …) tensors along dim 0, into `.grad`."""
        schedule, cell = self._schedule((count, tokens.shape[0] // count, tokens.shape[1]))
        cell[:] = [loss]
        numbers = torch.arange(count) if self.stages[-1].last else None
        arguments = (tokens,) if self.stages[0].first else ()
        schedule.step(*arguments, target=numbers, return_outputs=False, **kwargs)
        cell.clear()

    def _schedule(self, key: tuple[int, int, int]) -> tuple[Any, list[Loss]]:
        if key not in self._schedules:
            count, size, length = key
            cell: list[Loss] = []
            stages = [self._stage(i, m, size, length) for i, m in zip(self.indices, self.stages, strict=True)]
            name = self.topology.sizes.schedule
            # With fewer micro-batches than stages (a batch that ramps up), every forward is warm-up: 1f1b is GPipe there.
            few = count < self.topology.sizes.stages
            kind = {
                "1f1b": ScheduleGPipe if few else Schedule1F1B,
                "interleaved": ScheduleInterleaved1F1B,
                "zero_bubble": ScheduleInterleavedZeroBubble,
            }[name]
            self._schedules[key] = (
                kind(
                    stages[0] if name == "1f1b" else stages,
                    count,
                    loss_fn=lambda output, number: cell[0](output, int(number)),
                    scale_grads=False,
                ),
                cell,
            )
        return self._schedules[key]

    def _stage(self, index: int, model: nn.Module, size: int, length: int) -> Stage:
        activation = self._activation(size, length, "meta").requires_grad_()
        tokens = torch.empty(size, length, dtype=torch.long, device="meta")
        return Stage(
            model,
            index,
            self.topology.sizes.stages,
            self.topology.device,
            input_args=tokens if model.first else activation,
            output_args=activation,
            group=self.topology.group("pipeline"),
        )

    def _activation(self, size: int, length: int, device: torch.device | str) -> torch.Tensor:
        """What passes between stages: (B, T, D), or this rank's part of the sequence."""
        model, sizes = self.stages[0], self.topology.sizes
        dtype = model.residual_dtype or next(model.parameters()).dtype
        time = length // sizes.tensor if sizes.sequence_parallel else length
        return torch.empty(size, time, model.config.hidden_size, dtype=dtype, device=device)  # type: ignore[union-attr]

    # -- evaluation ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor, kwargs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """One micro-batch through all stages. → the last stage's output on the rank that holds it, else None."""
        group, sizes = self.topology.group("pipeline"), self.topology.sizes
        rank = self.topology.rank("pipeline")
        output: torch.Tensor | None = None
        for model in self.stages:
            x = tokens
            if not model.first:
                x = self._activation(*tokens.shape[:2], self.topology.device)
                dist.recv(x, group=group, group_src=(rank - 1) % sizes.pipeline)
            output = model(x, **kwargs)
            if not model.last:
                dist.send(output.contiguous(), group=group, group_dst=(rank + 1) % sizes.pipeline)
        return output if self.stages[-1].last else None

    # -- parameters on several stages ----------------------------------------------------------------------------

    def _shared_names(self) -> dict[str, list[int]]:
        group = self.topology.group("pipeline")
        mine = [name for stage in self.stages for name, _ in stage.named_parameters()]
        everyone: list[Any] = [None] * self.topology.size("pipeline")
        dist.all_gather_object(everyone, mine, group=group)
        holders: dict[str, list[int]] = {}
        for rank, names in enumerate(everyone):
            for name in dict.fromkeys(names):
                holders.setdefault(name, []).append(rank)
        return {name: ranks for name, ranks in sorted(holders.items()) if len(ranks) > 1}

    def counts(self, name: str) -> bool:
        """Is this process the one that counts the parameter in a norm?"""
        return self.topology.rank("pipeline") == self.shared.get(name, [self.topology.rank("pipeline")])[0]

    def sum_shared_gradients(self, parameters: dict[str, nn.Parameter]) -> None:
        """Add up the gradients of a parameter over the ranks that hold it, so that all of them go on with the same bits."""
        rank, group = self.topology.rank("pipeline"), self.topology.group("pipeline")
        for name, holders in self.shared.items():
            if rank not in holders or not parameters[name].requires_grad:
                continue
            gradient = local_gradient(parameters[name])
            if len(holders) == self.topology.size("pipeline"):
                dist.all_reduce(gradient, group=group)
            else:
                (peer,) = set(holders) - {rank}
                _exchange(gradient, peer, group)


def _exchange(gradient: torch.Tensor, peer: int, group: Any) -> None:
    """gradient += the peer's, on both sides."""
    other = torch.empty_like(gradient)
    mine = gradient.contiguous()
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, mine, group=group, group_peer=peer),
            dist.P2POp(dist.irecv, other, group=group, group_peer=peer),
        ]
    )
    for work in works:
        work.wait()
    gradient.add_(other)
