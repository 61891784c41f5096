"""What a run measures, as rows: in `metrics.jsonl`, in TensorBoard, in W&B, on the screen, the same numbers everywhere.

    {"step": 10, "consumed_samples": 80, "consumed_tokens": 5120, "train_loss": 9.1, "lr": 0.0001, "grad_norm": 2.3, …}
    {"step": 10, "consumed_samples": 80, "consumed_tokens": 5120, "val_loss": 9.0, "val_perplexity": 8103.1, …}

A loss of several terms has them beside it: a BERT's `train_loss` is the sum of `lm loss` and `sop loss`, `val_loss` that of
`val_lm_loss` and `val_sop_loss`. A row's `step` counts finished steps. Losses and norms are of that step alone, never averages, so that a resumed run writes the
rows that an uninterrupted one would have written; speeds are of the steps since the row before, validating and saving left out.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from megalith.engine.engine import Engine, StepResult
from megalith.engine.fit import Report
from megalith.engine.metrics import Peak, speed
from megalith.training.module import MegalithModule, Validation, reduced

Row = dict[str, Any]
FILE = "metrics.jsonl"
TERM = " loss"
"""Behind the name of a term of the training loss, as Megatron-LM calls it."""


@dataclass(frozen=True)
class Meter:
    """What speeds are made of: FLOPs that the model needs for a token, and the device's peak where it is known."""

    flops_per_token: float
    peak: Peak | None = None
    processes: int = 1


def train_row(engine: Engine, report: Report, meter: Meter) -> Row:
    """The row of the last of the steps in `report`."""
    last = report.results[-1]
    tokens = sum(result.tokens for result in report.results)
    seconds = max(report.seconds, 1e-9)
    fast = speed(tokens, seconds, per_token=meter.flops_per_token, peak=meter.peak, processes=meter.processes)
    row: Row = {**_where(engine), "train_loss": last.loss}
    if len(last.terms) > 1:
        row |= {f"{name}{TERM}": value for name, value in last.terms.items()}
    row |= {
        "lr": last.lr,
        "grad_norm": last.grad_norm,
        "loss_scale": last.loss_scale,
        "skipped": engine.skipped,
        "global_batch_size": last.samples,
        "step_seconds": seconds / len(report.results),
        "tokens_per_second": fast.tokens_per_second,
        "tflops_per_second": fast.tflops_per_second,
    }
    return row if fast.mfu is None else {**row, "mfu": fast.mfu}


def evaluation_row(engine: Engine, kind: str, found: Validation, seconds: float) -> Row:
    """The row of a validation ("val") or a test ("test")."""
    return {
        **_where(engine),
        **found.named(kind),
        f"{kind}_targets": found.targets,
        f"{kind}_seconds": seconds,
    }


def _where(engine: Engine) -> Row:
    return {
        "step": engine.step,
        "consumed_samples": engine.consumed_samples,
        "consumed_tokens": engine.consumed_tokens,
    }


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, on disk as soon as it is written. What is not finite is null."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")

    def read(self) -> list[Row]:
        """The whole rows there are; a line that a killed process left unfinished is not one."""
        rows: list[Row] = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    rows.append(row)
        return rows

    def truncate(self, step: int) -> int:
        """Drop the rows after `step` (and any unfinished line), at once. → how many rows went."""
        rows = self.read()
        kept = [row for row in rows if row["step"] <= step]
        if self.path.exists():
            temporary = self.path.with_name(f".{self.path.name}.partial")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            os.replace(temporary, self.path)
        return len(rows) - len(kept)


class Stopwatch:
    """Time of training: what runs within `left_out` does not count."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._mark: float | None = None

    def start(self) -> None:
        """Count from now."""
        self._seconds, self._mark = 0.0, time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        seconds, self._seconds = self._seconds + (now - (self._mark or now)), 0.0
        self._mark = now
        return seconds

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """What happens within is not training."""
        self.pause()
        try:
            yield
        finally:
            self.go_on()

    def pause(self) -> None:
        """Stop counting."""
        now = time.perf_counter()
        self._seconds += now - (self._mark or now)

    def go_on(self) -> None:
        """Count again."""
        self._mark = time.perf_counter()


class MetricsCallback(pl.Callback):
    """Makes the rows, and gives each to every sink (the file, the screen) and to the trainer's loggers.

    Rows come after the run's first step, every `trainer.log_every_n_steps`, and after the last step.
    """

    def __init__(
        self, engine: Engine, meter: Meter, watch: Stopwatch, sinks: list[Callable[[Row], None]]
    ) -> None:
        self.engine, self.meter, self.watch, self.sinks = engine, meter, watch, sinks
        self._pending: list[StepResult] = []
        self._began = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first step's time includes fetching its batch."""
        self.watch.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Collect the step; make a row when one is due."""
        assert isinstance(pl_module, MegalithModule)
        assert pl_module.result is not None
        self._pending.append(pl_module.result)
        step = self.engine.step
        if step == 1 or step % trainer.log_every_n_steps == 0 or step == trainer.max_steps:
            report = Report(self._pending, self.watch.lap())
            self._pending = []
            self._give(trainer, train_row(self.engine, report, self.meter), reduced(pl_module.result))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation is not training."""
        self.watch.pause()
        self._began = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The row of a validation."""
        self._evaluated(trainer, pl_module, "val")
        self.watch.go_on()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the time."""
        self._began = time.perf_counter()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The row of a test."""
        self._evaluated(trainer, pl_module, "test")

    def _evaluated(self, trainer: pl.Trainer, module: pl.LightningModule, kind: str) -> None:
        assert isinstance(module, MegalithModule)
        found = module.validation if kind == "val" else module.test
        if found is not None and not trainer.sanity_checking:
            row = evaluation_row(self.engine, kind, found, time.perf_counter() - self._began)
            self._give(trainer, row)

    def _give(self, trainer: pl.Trainer, row: Row, nemo: Mapping[str, float] | None = None) -> None:
        """`nemo`: the same losses under NeMo's names, for the loggers, where its users look for them."""
        for sink in self.sinks:
            sink(row)
        found = {**row, **(nemo or {})}
        numbers = {
            name: float(value) for name, value in found.items() if name != "step" and value is not None
        }
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=row["step"])
