"""Scoring a long token stream with a model of bounded length: sliding windows, every target counted exactly once.

Windows as in Megatron-LM's `tasks/zeroshot_gpt`: window i starts at i·stride and reads `length` tokens; the first
counts all its targets, a later one only its last `stride`. Windows that would count nothing are not run.

    N tokens of the stream, T length of a window, B windows a batch
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from megalith.errors import ConfigError, DataError, Problem
from megalith.evaluate.scoring import score_targets
from megalith.generate.crew import Crew
from megalith.models.gpt import GPT

LARGEST_EXPONENT = 20.0
"""exp(20) is where Megatron-LM caps a perplexity."""
Progress = Callable[[int, int], None]
"""(done, all)."""


def capped_exp(loss: float) -> float:
    """A perplexity."""
    return math.exp(min(LARGEST_EXPONENT, loss))


@dataclass(frozen=True)
class Score:
    """Summed negative log-likelihood in nats over `targets` tokens."""

    total: float
    targets: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.total / self.targets

    @property
    def perplexity(self) -> float:
        """exp(loss), capped at exp(20)."""
        return capped_exp(self.loss)

    def bits_per_byte(self, num_bytes: int) -> float:
        """Bits needed to code one byte of the text."""
        return self.total / math.log(2) / num_bytes


def window_starts(num_tokens: int, length: int, stride: int) -> list[int]:
    """Where each window begins. N − 1 targets in all: the first window holds `length`, each later one adds `stride`."""
    beyond = max(num_tokens - 1 - length, 0)
    return [i * stride for i in range(math.ceil(beyond / stride) + 1)]


def window(tokens: np.ndarray, start: int, length: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets (T,) of the window at `start`; a target that does not count here is −1."""
    part = tokens[start : start + length + 1]
    inputs = np.zeros(length, dtype=np.int64)
    targets = np.full(length, -1, dtype=np.int64)
    filled = len(part) - 1
    inputs[:filled], targets[:filled] = part[:-1], part[1:]
    if start > 0:
        targets[: length - stride] = -1
    return inputs, targets


def check_length(model: GPT, length: int) -> None:
    """Errors: `ConfigError` when the model has no positions for so many tokens."""
    positions = model.config.max_positions
    if positions is not None and length > positions:
        problem = f"{length} is longer than the {positions} positions that the model has"
        raise ConfigError([Problem("--seq-length", problem, f"use at most {positions}")])


def check(model: GPT, tokens: np.ndarray, length: int, stride: int) -> None:
    """Errors: `ConfigError` for windows that the model cannot read or that leave gaps, `DataError` for too few tokens."""
    check_length(model, length)
    if not 1 <= stride <= length:
        problem = f"{stride} is not between 1 and the window length {length}"
        raise ConfigError([Problem("--overlapping-eval", problem, f"use 1 … {length}")])
    if len(tokens) < 2:
        raise DataError(
            f"{len(tokens)} tokens hold no target to score", where="text", fix="give at least two tokens"
        )


def score(
    model: GPT,
    tokens: np.ndarray,
    *,
    length: int,
    stride: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
    crew: Crew | None = None,
) -> Score:
    """Scores every token of `tokens` (N,) but the first, which has no context.

    `length` T is the window, `stride` how many new targets each later window adds (default T: no overlap; smaller
    gives every target more context and costs T/stride times as much). `progress` gets windows done and in all. `crew`: the processes among which batches are
    shared out; sums are added up batch by batch, in order, so their number changes nothing.
    """
    stride = length if stride is None else stride
    check(model, tokens, length, stride)
    model.eval()
    device, crew = next(model.parameters()).device, crew or Crew()
    starts = window_starts(len(tokens), length, stride)
    batches = [starts[first : first + batch_size] for first in range(0, len(starts), batch_size)]

    def work(batch: list[int]) -> tuple[float, int]:
        rows = [window(tokens, s, length, stride) for s in batch]
        inputs = torch.from_numpy(np.stack([r[0] for r in rows])).to(device)
        targets = torch.from_numpy(np.stack([r[1] for r in rows])).to(device)
        losses = score_targets(model, inputs, targets, crew.relay).losses
        return float(losses.sum()), len(losses)

    def report(done: int) -> None:
        if progress is not None:
            progress(min(done * batch_size, len(starts)), len(starts))

    found = crew.divide(batches, work, report)
    return Score(math.fsum(total for total, _ in found), sum(counted for _, counted in found))
