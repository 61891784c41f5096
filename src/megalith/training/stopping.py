"""When to stop before the last step: a signal, or the time that was given.

One owner of SIGTERM, SIGINT and SIGUSR1: this module. The first signal asks, and the run saves after the step under way and
ends with exit code 3; the second is left to the operating system and ends the process at once (a checkpoint that is being
written does not count until it is whole). Lightning's own handlers never get to run.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch

from megalith.engine.engine import Engine

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


class StopRequest:
    """Has someone, or the clock, asked the run to stop? `seconds`: how long the run may last, from now on."""

    def __init__(self, seconds: float | None = None) -> None:
        self.signal: signal.Signals | None = None
        """The signal that asked."""
        self.show: Callable[[str], bool] | None = None
        """Shows a line and says whether it could (a progress bar would overwrite what is written past it). It is called in
        a signal handler: it may only remember the line."""
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._before: dict[signal.Signals, Any] = {}

    @property
    def out_of_time(self) -> bool:
        """Is the time up?"""
        return self._deadline is not None and time.monotonic() >= self._deadline

    @property
    def asked(self) -> bool:
        """Should the run stop after this step?"""
        return self.signal is not None or self.out_of_time

    def settle(self, received: signal.Signals | None) -> None:
        """What all processes agreed on: a signal that one of them got, or that the time is up."""
        self.signal = received
        if received is None:
            self._deadline = time.monotonic()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, the first signal is a question. Afterwards the handlers are those that were there before."""
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            self.install()
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before = {}

    def install(self) -> None:
        """Take the signals (again); nothing outside `listening`."""
        for number in self._before:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if self.signal is None:
            self.signal = received
            text = f"{received.name}: saving after this step, then stopping. Once more stops at once."
            if self.show is None or not self.show(text):
                # Not print: a handler may interrupt one, and buffered streams do not allow a second writer.
                os.write(2, f"\n{text}\n".encode())
            return
        if os.isatty(1):
            os.write(1, b"\x1b[?25h\n")  # the bar hides the cursor
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


class StopCallback(pl.Callback):
    """Ends `fit` after the step in which a stop was asked for; no validation comes in between, the final save does."""

    def __init__(self, engine: Engine, request: StopRequest) -> None:
        self.engine, self.request = engine, request

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning has just set its own handlers: take the signals back."""
        self.request.install()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """All processes agree, since the signal may reach them at different steps."""
        if trainer.strategy.reduce_boolean_decision(self.request.asked, all=False):
            mine = torch.tensor(int(self.request.signal or 0), device=trainer.strategy.root_device)
            number = int(trainer.strategy.all_gather(mine).max())
            self.request.settle(signal.Signals(number) if number else None)
            trainer.limit_val_batches = 0
            trainer.should_stop = True


class Beat(pl.Callback):
    """Tells a watchdog after every batch that this process gets on."""

    def __init__(self, beat: Callable[[], None]) -> None:
        self.beat = beat

    def on_train_batch_end(self, *_: Any) -> None:
        """A step is done."""
        self.beat()

    def on_validation_batch_end(self, *_: Any) -> None:
        """A batch is evaluated."""
        self.beat()

    def on_test_batch_end(self, *_: Any) -> None:
        """A batch is evaluated."""
        self.beat()

    def on_save_checkpoint(self, *_: Any) -> None:
        """A save begins."""
        self.beat()
