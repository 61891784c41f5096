"""When a run saves. What a checkpoint holds is `saving`'s business, which ones stay `checkpoint.retention`'s.

A save that is due at a step where validation is due too comes after it, so that `val_loss` is in the checkpoint's name and rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from megalith.checkpoint.layout import step_name
from megalith.training.metrics import Stopwatch
from megalith.training.saving import Saver


@dataclass(frozen=True)
class SaveTimes:
    """`steps`: every so many steps; `seconds`: when so long has passed since the last save; neither: after each validation.

    The end of the run, whatever ends it, always saves.
    """

    steps: int | None = None
    seconds: float | None = None

    @property
    def after_validation(self) -> bool:
        """Neither steps nor time were given."""
        return not self.steps and not self.seconds


class CheckpointCallback(Checkpoint):
    """Saves through the trainer's strategy, and says so to `announce`. Being a `Checkpoint`, it runs after all others."""

    def __init__(
        self, saver: Saver, times: SaveTimes, watch: Stopwatch, announce: Callable[[str], None] | None = None
    ) -> None:
        super().__init__()
        self.saver, self.times, self.watch, self.announce = saver, times, watch, announce
        self._saved_at: int | None = None
        self._saved_time = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that starts from a step need not save it again."""
        self._saved_at, self._saved_time = self.saver.engine.step, time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Save if it is due and no validation comes first."""
        if self._due(trainer) and not self._validation_follows(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if it is due after a validation inside `fit`."""
        inside_fit = trainer.state.fn == "fit" and not trainer.sanity_checking
        if inside_fit and (self.times.after_validation or self._due(trainer)):
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What the last step left unsaved."""
        self._save(trainer)

    def _due(self, trainer: pl.Trainer) -> bool:
        step, times = self.saver.engine.step, self.times
        by_step = bool(times.steps) and step % (times.steps or 1) == 0
        by_time = bool(times.seconds) and time.monotonic() - self._saved_time >= (times.seconds or 0)
        return trainer.strategy.reduce_boolean_decision(by_step or by_time, all=False)

    def _validation_follows(self, trainer: pl.Trainer) -> bool:
        every = trainer.val_check_batch
        if trainer.should_stop or not trainer.enable_validation or not isinstance(every, int):
            return False
        return self.saver.engine.step % every == 0

    def _save(self, trainer: pl.Trainer) -> None:
        step = self.saver.engine.step
        if step == self._saved_at:
            return
        began = time.perf_counter()
        with self.watch.left_out():
            trainer.save_checkpoint(self.saver.root / step_name(step))
        if self.announce:
            verb = "saving" if self.saver.checkpointer.asynchronous else "saved"
            seconds = time.perf_counter() - began
            self.announce(f"step {step} | {verb} {self.saver.root.name}/{step_name(step)} ({seconds:.1f} s)")
        self._saved_at, self._saved_time = step, time.monotonic()
