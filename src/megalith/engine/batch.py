"""A rank's share of a global batch → micro-batches and divisors, all known before the first forward.

Knows how to cut and count. Knows no model.

    share (b·n samples) ─ counts ─ all-reduce over data ranks ─▶ divisors
                        └ n micro-batches of b, on the device, of their sequences this context rank's part
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from megalith.engine.objective import Batch, Objective
from megalith.errors import DataError
from megalith.parallel.context import share_sequence
from megalith.topology.topology import Topology

LossAverage = Literal["tokens", "micro_batches"]
_LENGTHS = {"lengths": "tokens", "encoder_lengths": "encoder_tokens"}
"""What says how long the rows are before their padding, and the rows."""


@dataclass(frozen=True)
class Share:
    """What one step works on. `counts`, `samples` and `tokens` are of the global batch; tokens of an encoder-decoder are those
    of both sides, padding too: what a step computes on."""

    micros: list[Batch]
    divisors: list[dict[str, float]]
    """Of each micro-batch: what the sum of each term is divided by."""
    counts: dict[str, int]
    samples: int
    tokens: int

    @property
    def empty(self) -> bool:
        """Has the global batch no target at all?"""
        return not any(self.counts.values())


def prepare(
    batch: Batch,
    objective: Objective,
    topology: Topology,
    *,
    micro_batch_size: int,
    average: LossAverage = "tokens",
) -> Share:
    """Cut, count and move a share.

    `average`: "tokens" divides by the targets of the global batch, so its factorisation does not matter; "micro_batches"
    is Megatron-LM's mean of the micro-batches' means, where targets of a micro-batch with few of them weigh more.
    Errors: `DataError` when the share is not a multiple of `micro_batch_size`.
    """
    samples = len(batch["tokens"])
    if samples == 0 or samples % micro_batch_size:
        raise DataError(
            f"{samples} samples are not a multiple of micro_batch_size {micro_batch_size}",
            where="batch",
            fix="choose a global_batch_size that is micro_batch_size × data-parallel size × a whole number",
        )
    if topology.size("pipeline") > 1:  # a pipeline is given all its micro-batches at once
        batch = without_needless_lengths(batch)
    micros = split(batch, micro_batch_size)
    local = [
        objective.counts(micro) for micro in micros
    ]  # on the CPU, where the loader left the batch: no sync
    counts = global_counts(local, topology)
    if average == "tokens":
        divisors = [{name: float(max(count, 1)) for name, count in counts.items()}] * len(micros)
    else:
        parts = len(micros) * topology.data_size
        divisors = [{name: float(max(int(count), 1) * parts) for name, count in own.items()} for own in local]
    return Share(
        micros=[place(micro, topology) for micro in micros],
        divisors=divisors,
        counts=counts,
        samples=samples * topology.data_size,
        tokens=tokens_in(batch) * topology.data_size,
    )


def tokens_in(batch: Batch) -> int:
    """Tokens that the model reads in a batch, on both sides where it has two."""
    return sum(batch[name].numel() for name in ("encoder_tokens", "tokens") if name in batch)


def without_needless_lengths(batch: Batch) -> Batch:
    """The batch (on the CPU) without the lengths of rows of which none is padded: attention then needs no mask.

    A function of the data alone, so all processes that compute these samples decide alike.
    """
    needless = [
        name
        for name, tokens in _LENGTHS.items()
        if name in batch and int(batch[name].min()) >= batch[tokens].shape[1]
    ]
    return {name: tensor for name, tensor in batch.items() if name not in needless}


def split(batch: Batch, size: int) -> list[Batch]:
    """Consecutive micro-batches of `size` samples; the last one takes what is left."""
    return [
        {name: tensor[first : first + size] for name, tensor in batch.items()}
        for first in range(0, len(batch["tokens"]), size)
    ]


def global_counts(local: list[dict[str, torch.Tensor]], topology: Topology) -> dict[str, int]:
    """Targets of each term over all micro-batches of all data ranks; context ranks count the same whole sequences."""
    names = list(local[0])
    total = torch.stack([torch.stack([counts[name] for counts in local]).sum() for name in names])
    if topology.mesh is not None:  # a group reduces where the model is; alone, the count never leaves the CPU
        total = topology.sum(total.to(topology.device), "replicate", "shard")
    return dict(zip(names, total.tolist(), strict=True))


def place(batch: Batch, topology: Topology) -> Batch:
    """The same batch where the model is: on the device, and of each sequence the part that this process computes.

    Without lengths that say nothing, unless a pipeline has decided that for several micro-batches.
    """
    if topology.size("pipeline") == 1:
        batch = without_needless_lengths(batch)
    there = {name: tensor.to(topology.device, non_blocking=True) for name, tensor in batch.items()}
    return share_sequence(there, topology)
