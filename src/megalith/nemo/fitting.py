"""What stands around `trainer.fit(model)`: metrics and progress always, the run's folder and checkpoints where one is asked for.

Knows the pieces of `megalith pretrain`; decides nothing about them.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megalith.checkpoint.retention import Retention
from megalith.tasks.pretrain import loop_settings, make_saver, open_run, policy
from megalith.tasks.pretrain_parts import Parts
from megalith.training.checkpointing import CheckpointCallback
from megalith.training.metrics import MetricsCallback, Row, Stopwatch
from megalith.training.progress import ProgressCallback, ProgressDisplay
from megalith.training.saving import Saver


@dataclass(frozen=True)
class Fitting:
    """`saver`: into the run's folder; None where nothing is written."""

    parts: Parts
    callbacks: list[Any]
    saver: Saver | None
    around: ExitStack

    @classmethod
    def begin(cls, parts: Parts, *, writes: bool) -> Fitting:
        """Open the run's folder if it `writes`. Errors: those of `open_run` and of the checkpoint settings."""
        topology, config, around = parts.machine.topology, parts.config, ExitStack()
        settings, watch = loop_settings(config, parts.engine.step), Stopwatch()
        shown: list[Any] = []
        sinks: list[Any] = []
        if topology.is_main:
            display = ProgressDisplay(
                total=settings.max_steps, console=Console(), bar=config.trainer.enable_progress_bar
            )
            shown, sinks = [ProgressCallback(parts.engine, display)], [display.show]
        saver = None
        if writes:
            open_run(parts, around, Console(quiet=not topology.is_main))
            scratch = Path(around.enter_context(tempfile.TemporaryDirectory(prefix="megalith-")))
            saver = make_saver(parts, Retention(policy(config)), scratch)
            sinks += [_written(parts)] if topology.is_main else []
        callbacks = [MetricsCallback(parts.engine, parts.meter, watch, sinks), *shown]
        if saver is not None and settings.save is not None:
            callbacks.append(CheckpointCallback(saver, settings.save, watch))
        return cls(parts, callbacks, saver, around)

    def end(self) -> None:
        """Wait for what is being written, and leave the folder."""
        if self.saver is not None:
            self.saver.wait()
        self.around.close()


def _written(parts: Parts) -> Any:
    def write(row: Row) -> None:
        parts.experiment.metrics.write(row)

    return write
