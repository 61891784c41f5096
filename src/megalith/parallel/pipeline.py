"""Pipeline parallelism: the schedules that move micro-batches through the stages that `cut` made.

Of an encoder-decoder the first stages hold the encoder, whose end sends the memory, and the others the decoder, each of which
passes it on with its own hidden states:

    encoder ─ (B, S, D) ─▶ encoder ─ memory ─▶ decoder ─ (B, T, D), memory ─▶ decoder        and gradients back likewise

Training runs on torch.distributed.pipelining; shapes are stated, so that it does not run a forward and backward to find them,
and a schedule is kept for each (micro-batches, size, length). Evaluation sends activations stage by stage by itself: any
number of micro-batches, no gradients. Knows models that say what passes. Knows no loss but as a function.

Legend: B batch, T time, S time of the encoder, D width
"""

from __future__ import annotations

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

from megalith.models.stack import INPUT
from megalith.nn.position import RelativeBias
from megalith.parallel.data import local_gradient
from megalith.parallel.stage import Stage
from megalith.topology.topology import Topology

Loss = Callable[[torch.Tensor, int], torch.Tensor]
"""(output of the last stage, number of the micro-batch) → scalar."""
Lengths = tuple[tuple[str, int], ...]
"""Of each sequence whose hidden states pass through the stages of a process."""


class Pipeline:
    """The schedules of one process's stages."""

    def __init__(self, stages: Sequence[nn.Module], topology: Topology) -> None:
        self.stages, self.topology = list(stages), topology
        sizes, rank = topology.sizes, topology.rank("pipeline")
        self.indices = list(range(rank, sizes.stages, sizes.pipeline))
        self._schedules: dict[tuple[int, int, Lengths], tuple[Any, list[Loss]]] = {}
        ranks = {
            name: sorted({stage % sizes.pipeline for stage in held})
            for name, held in self.stages[0].holders.items()
        }
        self.shared = {name: held for name, held in ranks.items() if len(held) > 1}
        """Names of parameters on several pipeline ranks → these ranks."""

    # -- training ------------------------------------------------------------------------------------------------

    def step(self, tokens: torch.Tensor, kwargs: dict[str, torch.Tensor], count: int, loss: Loss) -> None:
        """Forward and backward of `count` micro-batches, cut from (B·count, …) tensors along dim 0, into `.grad`."""
        schedule, cell = self._schedule((count, tokens.shape[0] // count, self._lengths(tokens, kwargs)))
        cell[:] = [loss]
        numbers = torch.arange(count) if self.stages[-1].last else None
        arguments = (tokens,) if self.stages[0].first else ()
        schedule.step(*arguments, target=numbers, return_outputs=False, **kwargs)
        cell.clear()

    def _schedule(self, key: tuple[int, int, Lengths]) -> tuple[Any, list[Loss]]:
        if key not in self._schedules:
            count, size, lengths = key
            cell: list[Loss] = []
            stages = [
                self._stage(i, m, size, lengths) for i, m in zip(self.indices, self.stages, strict=True)
            ]
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

    def _stage(self, index: int, model: nn.Module, size: int, lengths: Lengths) -> Stage:
        tokens = torch.empty(size, dict(lengths)[INPUT], dtype=torch.long, device="meta")
        taken = self._message(model.takes, size, lengths, "meta")
        given = self._message(model.gives, size, lengths, "meta")
        stage = Stage(
            model,
            index,
            self.topology.sizes.stages,
            self.topology.device,
            input_args=(tokens,) if model.first else tuple(part.requires_grad_() for part in taken),
            output_args=tuple(part.requires_grad_() for part in given),
            group=self.topology.group("pipeline"),
        )
        begins = not set(model.gives) <= set(model.takes)
        stage.undivided = begins or any(isinstance(module, RelativeBias) for module in model.modules())
        return stage

    def _lengths(self, tokens: torch.Tensor, kwargs: dict[str, torch.Tensor]) -> Lengths:
        named = {**kwargs, INPUT: tokens}
        passing = {INPUT, *(name for model in self.stages for name in (*model.takes, *model.gives))}
        return tuple((name, named[name].shape[1]) for name in sorted(passing))

    def _message(
        self, names: Sequence[str], size: int, lengths: Lengths, device: torch.device | str
    ) -> list[torch.Tensor]:
        """What passes between stages: of each sequence (B, T, D), or this rank's part of it."""
        model, sizes = self.stages[0], self.topology.sizes
        dtype = model.residual_dtype or next(model.parameters()).dtype
        parts = sizes.tensor if sizes.sequence_parallel else 1
        width = model.config.hidden_size  # type: ignore[union-attr]
        return [
            torch.empty(size, dict(lengths)[name] // parts, width, dtype=dtype, device=device)
            for name in names
        ]

    # -- evaluation ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor, kwargs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """One micro-batch through all stages. → the last stage's output on the rank that holds it, else None."""
        group, sizes = self.topology.group("pipeline"), self.topology.sizes
        rank = self.topology.rank("pipeline")
        lengths = self._lengths(tokens, kwargs)
        output: Any = None
        for model in self.stages:
            taken = [tokens]
            if not model.first:
                taken = self._message(model.takes, len(tokens), lengths, self.topology.device)
                for part in taken:
                    dist.recv(part, group=group, group_src=(rank - 1) % sizes.pipeline)
            output = model(*taken, **kwargs)
            if not model.last:
                for part in output if isinstance(output, tuple) else (output,):
                    dist.send(part.contiguous(), group=group, group_dst=(rank + 1) % sizes.pipeline)
        return output if self.stages[-1].last else None

    # -- parameters on several stages ----------------------------------------------------------------------------

    def counts(self, name: str) -> bool:
        """Is this process the one that counts the parameter in a norm?"""
        return self.topology.rank("pipeline") == self.shared.get(name, [self.topology.rank("pipeline")])[0]

    def sum_shared_gradients(self, parameters: dict[str, nn.Parameter]) -> None:
        """Add up the gradients of a parameter over the ranks that hold it, so that all of them go on with the same bits."""
        rank, group = self.topology.rank("pipeline"), self.topology.group("pipeline")
        for name, ranks in self.shared.items():
            if rank not in ranks or not parameters[name].requires_grad:
                continue
            gradient = local_gradient(parameters[name])
            if len(ranks) == self.topology.size("pipeline"):
                dist.all_reduce(gradient, group=group)
            else:
                _exchange(gradient, rank, ranks, group)


def _exchange(gradient: torch.Tensor, rank: int, ranks: Sequence[int], group: Any) -> None:
    """Every rank's becomes the sum over `ranks`, added up in their order: the same bits everywhere."""
    mine = gradient.contiguous()
    parts = {peer: mine if peer == rank else torch.empty_like(mine) for peer in ranks}
    operations = []
    for peer in ranks:
        if peer != rank:
            operations.append(dist.P2POp(dist.isend, mine, group=group, group_peer=peer))
            operations.append(dist.P2POp(dist.irecv, parts[peer], group=group, group_peer=peer))
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    total = parts[ranks[0]]
    for peer in ranks[1:]:
        total.add_(parts[peer])
    gradient.copy_(total)
