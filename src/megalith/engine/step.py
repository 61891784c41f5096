"""Forward and backward over the micro-batches of one step, on any layout. Knows no optimizer and no loop.

Each term's sum is divided once, by a number known beforehand, so gradients add up in `.grad` to those of the mean loss of
the whole global batch, however it is cut. A pipeline interleaves the same micro-batches by its own schedule.

    accumulate / run_pipeline ─▶ .grad, this rank's part ─ finish_gradients ─▶ .grad, what this rank's parameters need
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from megalith.engine.batch import Share
from megalith.engine.objective import Batch, Objective
from megalith.errors import UnsupportedError
from megalith.nn.dropout import sample_keys
from megalith.parallel import data
from megalith.parallel.context import PLACES
from megalith.parallel.data import local_gradient
from megalith.topology.topology import Topology

if TYPE_CHECKING:
    from megalith.parallel.pipeline import Pipeline

Terms = dict[str, torch.Tensor]


def make_pipeline(stages: Sequence[nn.Module], topology: Topology) -> Pipeline | None:
    """The schedules over several stages; their module, with torch's pipelines behind it, is a second to import."""
    if topology.size("pipeline") == 1:
        return None
    from megalith.parallel.pipeline import Pipeline

    return Pipeline(stages, topology)


class Forward:
    """One micro-batch through the stages of this process: the same call with a pipeline and without."""

    def __init__(self, stages: Sequence[nn.Module], objective: Objective, topology: Topology) -> None:
        self.stages, self.objective, self.topology = list(stages), objective, topology
        self.pipeline = make_pipeline(stages, topology)
        modules = {id(module): module for stage in stages for module in stage.modules()}
        self.partial = [
            (module, name)
            for module in modules.values()
            for name in getattr(module, "partial_gradients", ())
            if getattr(module, name).requires_grad
        ]
        """Layers, and their parameters of whose gradient every tensor rank has a part."""

    def inputs(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The objective's; later stages, which see a part of a sequence, are told its length by the positions."""
        x, kwargs = self.objective.inputs(batch)
        if self.pipeline and self.topology.sizes.sequence_parallel:
            for name, places in PLACES.items():
                if name in batch and places not in kwargs:
                    tokens = batch[name]
                    kwargs[places] = (
                        torch.arange(tokens.shape[1], device=x.device).expand_as(tokens).contiguous()
                    )
        return x, kwargs

    def terms(self, batch: Batch, keys: torch.Tensor | None) -> dict[str, Any]:
        """Loss terms of one micro-batch, differentiable. Only without a pipeline."""
        x, kwargs = self.inputs(batch)
        return self.objective.terms(self.stages[0], self.stages[0](x, keys=keys, **kwargs), batch)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Sum (float64) and count of each term over one batch of every data rank, without dropout."""
        terms: dict[str, Any] = {}
        if self.pipeline is None:
            terms = self.terms(batch, None)
        elif (output := self.pipeline.forward(*self.inputs(batch))) is not None:
            terms = self.objective.terms(self.stages[-1], output, batch)
        zero = torch.zeros((), dtype=torch.float64, device=self.topology.device)
        found = {}
        for name in self.objective.counts(batch):
            both = torch.stack([zero, zero])
            if name in terms:
                both = torch.stack([terms[name].sum.double(), torch.as_tensor(terms[name].count).to(zero)])
            total = self.topology.sum(both, "pipeline", "replicate", "shard", "context")
            found[name] = total[0], total[1]
        return found


def accumulate(forward: Forward, share: Share, *, seed: int, step: int, scale: float = 1.0) -> Terms:
    """Gradients of `scale` × the mean loss into `.grad`. → this process's part of each term's mean, and the whole as "loss".

    Dropout masks depend on (seed, step, sample) only, never on the micro-batch that a sample is in.
    """
    total: Terms = {}
    (stage,) = forward.stages
    for number, (micro, divisors) in enumerate(zip(share.micros, share.divisors, strict=True)):
        data.begin_micro_batch(stage, forward.topology, last=number == len(share.micros) - 1)
        parts = divide(forward.terms(micro, sample_keys(seed, step, micro["sample"])), divisors)
        (parts["loss"] * scale if scale != 1.0 else parts["loss"]).backward()
        _add(total, parts)
    return total


def run_pipeline(forward: Forward, share: Share, *, seed: int, step: int, scale: float = 1.0) -> Terms:
    """The same through a pipeline; ranks without the last stage return no terms."""
    assert forward.pipeline is not None
    total: Terms = {}

    def loss(output: torch.Tensor, number: int) -> torch.Tensor:
        terms = forward.objective.terms(forward.stages[-1], output, share.micros[number])
        parts = divide(terms, share.divisors[number])
        _add(total, parts)
        return parts["loss"] * scale

    whole = {name: torch.cat([micro[name] for micro in share.micros]) for name in share.micros[0]}
    x, kwargs = forward.inputs(whole)
    kwargs["keys"] = sample_keys(seed, step, whole["sample"])
    forward.pipeline.step(x, kwargs, len(share.micros), loss)
    return total


def _add(total: Terms, parts: Mapping[str, torch.Tensor]) -> None:
    for name, part in parts.items():
        total[name] = total[name] + part.detach() if name in total else part.detach()


def divide(terms: dict[str, Any], divisors: dict[str, float]) -> Terms:
    """Each term's sum over its divisor, and their weighted sum as "loss"."""
    parts = {name: term.sum / divisors[name] for name, term in terms.items()}
    loss = sum(part if terms[name].weight == 1 else part * terms[name].weight for name, part in parts.items())
    return {**parts, "loss": loss}  # type: ignore[dict-item]


def finish_gradients(forward: Forward, parameters: Mapping[str, nn.Parameter]) -> None:
    """What no layer could finish alone: parts of a sequence's gradient, and parameters that several stages hold."""
    topology = forward.topology
    for module, name in forward.partial:
        topology.sum(local_gradient(getattr(module, name)), "tensor")
    data.sum_gradients(forward.stages, topology)
    if forward.pipeline is not None:
        forward.pipeline.sum_shared_gradients(dict(parameters))


def require_gradients(parameters: Mapping[str, torch.Tensor]) -> None:
    """After the first backward: every trainable parameter has a gradient, or the ones without are named."""
    missing = [name for name, parameter in parameters.items() if parameter.grad is None]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise UnsupportedError(
            f"no gradient reached {len(missing)} of {len(parameters)} trainable parameters: {shown}",
            where="first backward",
            fix="freeze what the loss does not use, or use it",
        )
