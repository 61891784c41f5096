"""A run of NeMo's that goes on here at its step: its checkpoint's weights, optimizer and counters, as our own have them.

    NAME.ckpt (a file, or one of each rank) ─▶ tensors model.… and optim.… by our names + what state.json would say

Knows which formats keep a run, and what of it has no place here. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megalith.checkpoint.convert.megatron_optimizer import open_optimizer
from megalith.checkpoint.convert.source import Optimizer, Source, of_foreign
from megalith.checkpoint.convert.to_native import counters
from megalith.checkpoint.formats import nemo_lightning
from megalith.checkpoint.formats.foreign import Foreign
from megalith.checkpoint.lazy import Lazy
from megalith.errors import CheckpointError

KINDS = (nemo_lightning.KIND,)
"""Formats of runs that can go on here."""
LEFT = (
    "begun by NeMo: weights, optimizer, step and consumed samples go on; its callbacks, the state of its random numbers and of "
    "its learning-rate schedule stay behind (the schedule follows from the configuration and the step)"
)
ORDER = "model.data.order=megatron reads on in the order in which NeMo would"


@dataclass(frozen=True)
class Continued:
    """`state`: counters, seed, architecture, as in `state.json`; `notices`: what a person should know."""

    foreign: Foreign
    source: Source
    optimizer: Optimizer
    state: Mapping[str, Any]
    notices: tuple[str, ...]

    def tensors(self) -> dict[str, Lazy]:
        """Every tensor that an engine saves, by full name; of weights in half precision the optimizer's fp32 ones.

        Errors: `CheckpointError` where these are not those weights: the optimizer numbers its parameters in another order.
        """
        fix = "model.init_from takes the weights to step 0 of a new run"
        weights = self.source.masters(fix=fix) or self.source.tensors
        moments = {f"optim.{name}": lazy for name, lazy in self.optimizer.moments.items()}
        return {**{f"model.{name}": lazy for name, lazy in weights.items()}, **moments}


def open_continued(foreign: Foreign) -> Continued:
    """No tensor is read. Errors: `CheckpointError` for a checkpoint that a run cannot go on from."""
    if foreign.kind not in KINDS:
        raise CheckpointError(
            f"another program wrote it ({foreign.kind}): a run cannot go on at its step",
            where=str(foreign.path),
            fix="model.init_from takes its weights to step 0 of a new run",
        )
    optimizer, why = open_optimizer(foreign)
    if optimizer is None:
        raise CheckpointError(
            why or "it holds no optimizer state: a run cannot go on at its step",
            where=str(foreign.path),
            fix="model.init_from takes its weights to step 0 of a new run",
        )
    source = of_foreign(foreign)
    state = {**foreign.described(), **counters(source, optimizer)}
    return Continued(foreign, source, optimizer, state, (*foreign.notices, LEFT, ORDER))
