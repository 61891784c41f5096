"""What a model says of chosen tokens: their negative log-likelihoods, with logits for those positions alone.

Of a model in pipeline stages the last one scores, and tells the others. Knows hidden states and targets. Knows no windows,
files or words.

Legend: B batch, T time, D width, V vocabulary, N positions that count
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megalith.generate.relay import Relay
from megalith.models.gpt import GPT
from megalith.nn.loss import NOT_COUNTED

CHUNK = 512
"""Positions whose logits exist at a time."""


class Scored(NamedTuple):
    """Of each position that counts, in row order: nats (N,) float64, and whether its target is the most probable token (N,)."""

    losses: torch.Tensor
    right: torch.Tensor


@torch.inference_mode()
def score_targets(
    model: GPT, inputs: torch.Tensor, targets: torch.Tensor, relay: Relay | None = None
) -> Scored:
    """inputs, targets (B, T), a target of −1 not counted → losses and hits of the others, on the CPU.

    Softmax in fp32 at least. What stands behind a row's last counted target does not matter: the model is causal. `relay`: of
    a model in pipeline stages, each of which calls this with the same rows.
    """
    relay, counted = relay or Relay(), targets != NOT_COUNTED
    hidden, wanted = relay.forward(model, inputs), targets[counted]
    if model.last:
        losses, right = _scored(model, hidden[counted], wanted)
    else:
        losses = torch.empty(len(wanted), dtype=torch.float64, device=wanted.device)
        right = torch.empty_like(wanted, dtype=torch.bool)
    return Scored(relay.of_last(losses).cpu(), relay.of_last(right).cpu())


def _scored(model: GPT, hidden: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of hidden states (N, D) the losses (N,) and hits (N,)."""
    losses, right = [], []
    for rows, goal in zip(hidden.split(CHUNK), wanted.split(CHUNK), strict=True):
        logits = model.logits(rows)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chosen = logits.gather(-1, goal[:, None])[:, 0]
        losses.append((logits.logsumexp(-1) - chosen).double())
        right.append(logits.argmax(-1) == goal)
    return torch.cat(losses), torch.cat(right)
