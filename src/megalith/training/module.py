"""The LightningModule: a thin hand that moves the engine. Holds no parameter; Lightning sees an empty module.

The engine hangs outside the module tree, so that Lightning neither moves, casts, counts nor saves its parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch

from megalith.engine.engine import Engine, StepResult
from megalith.engine.objective import Batch
from megalith.training.saving import Saver

TOKENS = "lm"
"""The term whose targets are tokens: its exponential is the perplexity."""


@dataclass(frozen=True)
class Validation:
    """An exact evaluation at a step: of each term the mean over all its targets, and their sum."""

    step: int
    terms: dict[str, float]
    targets: int
    """Tokens that were predicted."""

    @property
    def loss(self) -> float:
        """What is trained: the terms together."""
        return sum(self.terms.values())

    @property
    def perplexity(self) -> float:
        """exp of the loss of the tokens alone, capped at e²⁰ as Megatron-LM prints it."""
        return math.exp(min(20.0, self.terms.get(TOKENS, self.loss)))

    def named(self, kind: str) -> dict[str, float]:
        """`val_loss`, `val_perplexity`, and of several terms each: `val_lm_loss`, …"""
        found = {f"{kind}_loss": self.loss, f"{kind}_perplexity": self.perplexity}
        parts = {f"{kind}_{name}_loss": value for name, value in self.terms.items()}
        return {**found, **parts} if len(parts) > 1 else found


def reduced(result: StepResult) -> dict[str, float]:
    """A step's losses as NeMo calls them: `reduced_train_loss`, and of several terms each: `reduced_lm_train_loss`, …"""
    parts = {f"reduced_{name}_train_loss": value for name, value in result.terms.items()}
    whole = {"reduced_train_loss": result.loss}
    return {**whole, **parts} if len(parts) > 1 else whole


class MegalithModule(pl.LightningModule):
    """Trains `engine` under a `MegalithStrategy`. Logs `train_loss`, `val_loss`, `test_loss` for other people's callbacks."""

    engine: Engine
    saver: Saver | None = None
    """Of a module that a trainer is given without engine and saver of its own."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.automatic_optimization = False
        object.__setattr__(self, "engine", engine)
        self.result: StepResult | None = None
        """The last training step's."""
        self.validation: Validation | None = None
        """The last validation's."""
        self.test: Validation | None = None
        self._totals: dict[str, tuple[float, int]] = {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The engine's: Lightning's wrapper around it counts the steps."""
        return self.engine.optimizer

    def transfer_batch_to_device(self, batch: Batch, device: Any, dataloader_idx: int) -> Batch:
        """Nothing: the engine counts targets where the loader left them, and moves micro-batches itself."""
        return batch

    def on_validation_model_zero_grad(self) -> None:
        """Gradients are of no use to a validation: give their memory back."""
        self.engine.zero_gradients()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step of the engine, whose update goes through Lightning's optimizer: that counts the steps."""
        optimizer: Any = self.optimizers()
        self.result = self.engine.train_step(batch, optimizer.step)
        if self.engine.step % self.trainer.log_every_n_steps == 0:  # each call costs half a millisecond
            self.log("train_loss", self.result.loss, logger=False, sync_dist=False)

    def metrics(self) -> dict[str, float]:
        """What is known of the engine at this very step, exact: for ranking and naming a checkpoint.

        A validation that was made at an earlier step is not in it.
        """
        logged = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        found = {name: value for name, value in logged.items() if not name.startswith(("val_", "test_"))}
        if self.result is not None:
            found |= {"train_loss": self.result.loss, **reduced(self.result)}
        if self.validation is not None and self.validation.step == self.engine.step:
            found |= {name: value for name, value in logged.items() if name.startswith("val_")}
            found |= self.validation.named("val")
        return found

    # -- validation and test: sums and counts over everything, divided once ----------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start the sums."""
        self._totals = {}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch to the sums."""
        self._add(batch)

    def on_validation_epoch_end(self) -> None:
        """Divide, and log `val_loss`, `val_perplexity`, and the terms."""
        self.validation = self._finish()
        if self.validation is not None:
            self._log("val", self.validation)

    def on_test_epoch_start(self) -> None:
        """Start the sums."""
        self._totals = {}

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch to the sums."""
        self._add(batch)

    def on_test_epoch_end(self) -> None:
        """Divide, and log `test_loss`, `test_perplexity`, and the terms."""
        self.test = self._finish()
        if self.test is not None:
            self._log("test", self.test)

    def _add(self, batch: Batch) -> None:
        for name, (value, count) in self.engine.evaluate([batch]).items():
            before, number = self._totals.get(name, (0.0, 0))
            self._totals[name] = before + value, number + count

    def _finish(self) -> Validation | None:
        """The means over all targets; None when there was not one target."""
        counted = {name: (value, count) for name, (value, count) in self._totals.items() if count}
        if not counted:
            return None
        means = {name: value / count for name, (value, count) in counted.items()}
        return Validation(self.engine.step, means, counted[TOKENS][1] if TOKENS in counted else 0)

    def _log(self, kind: str, found: Validation) -> None:
        self.log_dict(found.named(kind), logger=False, sync_dist=False)
