"""Activation checkpointing: keep fewer activations, compute them again in the backward pass.

Knows which blocks to wrap. Wraps `block.forward` (or the attention core's), outside compilation. Dropout masks are
hashes of their position, so the second forward is the same as the first without saving any generator's state.

    full, uniform, 2 layers     [0 1] [2 3] [4 5]    only the input of each group is kept
    full, block, 2 layers       [0] [1]  2 3 4 5     only the first two are recomputed
    selective                   every layer keeps all but the scores and probabilities of attention
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megalith.errors import ConfigError, Problem, UnsupportedError
from megalith.models.stack import named_blocks, towers
from megalith.nn.attention import Attention
from megalith.topology.topology import Topology

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Recompute:
    """What to recompute: Megatron's and NeMo's `activations_checkpoint_{granularity,method,num_layers}`."""

    granularity: Literal["full", "selective"] = "full"
    method: Literal["uniform", "block"] = "uniform"
    layers: int = 1

    @classmethod
    def from_keys(
        cls, granularity: str | None, method: str | None = None, num_layers: int | None = None
    ) -> Recompute | None:
        """From the config keys; None when nothing is recomputed. A method alone means full (configs before NeMo 1.10).

        Errors: `ConfigError` with every key that is not legal.
        """
        if granularity is None and method is None:
            return None
        granularity, method = granularity or "full", method or "uniform"
        layers = 1 if num_layers is None else num_layers
        problems = [
            Problem(f"model.activations_checkpoint_{key}", f"{value!r} is not a choice", fix)
            for key, value, legal, fix in (
                ("granularity", granularity, granularity in ("full", "selective"), "full, selective or null"),
                ("method", method, method in ("uniform", "block"), "uniform, block or null"),
                ("num_layers", layers, layers >= 1, "a whole number from 1 up"),
            )
            if not legal
        ]
        if problems:
            raise ConfigError(problems)
        return cls(granularity, method, layers)  # type: ignore[arg-type]


def check_recompute(topology: Topology, recompute: Recompute | None) -> None:
    """Errors: `UnsupportedError` for recomputation over several blocks whose weights are never gathered together."""
    joined = recompute is not None and (recompute.granularity, recompute.method) == ("full", "uniform")
    if joined and recompute.layers > 1 and topology.sizes.zero_stage == 3 and topology.sizes.sharing > 1:
        raise UnsupportedError(
            f"recomputing {recompute.layers} layers as one needs their weights together, zero_stage 3 gathers one layer's",
            where="model.activations_checkpoint_num_layers",
            fix="use 1, or activations_checkpoint_method block, or zero_stage 2",
        )


def recompute_blocks(stage: nn.Module, how: Recompute) -> None:
    """Wrap a stage's blocks; of an encoder-decoder, those of either side. Evaluation and generation (no gradients) run the
    wrapped forward directly."""
    if how.granularity == "selective":
        for block in named_blocks(stage).values():
            for module in block.modules():
                if isinstance(module, Attention):
                    module.core.forward = checkpointed(module.core.forward)
        return
    for tower in towers(stage):
        blocks = list(tower.values())
        if how.method == "block":
            for block in blocks[: how.layers]:
                block.forward = checkpointed(block.forward)
        else:
            for first in range(0, len(blocks), how.layers):
                _join(blocks[first : first + how.layers])


def checkpointed(forward: Forward) -> Forward:
    """`forward`, keeping only its arguments for the backward pass."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return wrapped


def _join(group: list[nn.Module]) -> None:
    """Recompute several blocks as one: all but the last pass their input on and leave their other arguments behind,
    and at the last one's turn all run under one checkpoint. The model's loop over its blocks stays as it is."""
    forwards = [block.forward for block in group]
    waiting: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def run(x: torch.Tensor, arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> torch.Tensor:
        for forward, (args, kwargs) in zip(forwards, arguments, strict=True):
            x = forward(x, *args, **kwargs)
        return x

    run_recomputed = checkpointed(run)

    def turn(index: int) -> Forward:
        def wrapped(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if not torch.is_grad_enabled():
                return forwards[index](x, *args, **kwargs)
            del waiting[index:]  # left over from a forward that was interrupted
            waiting.append((args, kwargs))
            return run_recomputed(x, list(waiting)) if index == len(group) - 1 else x

        return wrapped

    for index, block in enumerate(group):
        block.forward = turn(index)
