"""Puts the pieces around one run of Lightning's Trainer, and takes them away again.

    engine + saver + batches + settings ─▶ Trainer(strategy, callbacks, loggers).fit ─▶ how it ended

Knows which of Lightning's arguments must have one value here: the engine owns precision, devices, clipping, accumulation and
sampling, so none of these reaches the Trainer (`precision="bf16-mixed"` would silently wrap autocast around the engine's step).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler

from megalith.engine.engine import Engine
from megalith.engine.objective import Batch
from megalith.training.checkpointing import CheckpointCallback, SaveTimes
from megalith.training.metrics import Meter, MetricsCallback, Row, Stopwatch
from megalith.training.module import MegalithModule, Validation
from megalith.training.progress import ProgressCallback, ProgressDisplay
from megalith.training.quiet import quiet
from megalith.training.saving import Saver
from megalith.training.stopping import StopCallback, StopRequest
from megalith.training.strategy import MegalithStrategy

PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}


@dataclass(frozen=True)
class LoopSettings:
    """When things happen. `validate_every` None: never; `save` None: never; `max_seconds`: of this start, from its beginning."""

    max_steps: int
    log_every: int = 10
    validate_every: int | None = None
    save: SaveTimes | None = field(default_factory=SaveTimes)
    max_seconds: float | None = None
    profiler: str | None = None
    lightning: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of Lightning's Trainer, as they are."""


class Trainer(pl.Trainer):
    """Lightning's, which asks a model where to go on when `fit` is not told: the experiment manager's auto-resume."""

    def fit(self, model: pl.LightningModule, *data: Any, ckpt_path: Any = None, **more: Any) -> None:
        """As Lightning's; without `ckpt_path` from what `model.resumes_from()` names, if it has that method."""
        asked = getattr(model, "resumes_from", None)
        super().fit(model, *data, ckpt_path=ckpt_path or (asked() if asked else None), **more)


class Batches(Iterable[Batch]):
    """An iterable that starts anew, by `start()`, whenever someone iterates. It has no length, so Lightning's epoch has no end."""

    def __init__(self, start: Callable[[], Iterator[Batch]]) -> None:
        self._start = start

    def __iter__(self) -> Iterator[Batch]:
        return self._start()


@dataclass
class Run:
    """What is trained, on what, and where to. `train` starts at `engine.consumed_samples`, `validation` at the first sample."""

    engine: Engine
    saver: Saver
    meter: Meter
    train: Iterable[Batch]
    validation: Iterable[Batch] | None = None
    folder: Path | None = None
    loggers: Sequence[Logger] = ()
    sinks: Sequence[Callable[[Row], None]] = ()
    callbacks: Sequence[pl.Callback] = ()
    display: ProgressDisplay | None = None
    announce: Callable[[str], None] | None = None
    """Gets a line for each save."""
    test: Iterable[Batch] | None = None
    """Measured after the last step of a complete run."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: at its last step, or asked to stop by a signal (`stopped`) or by the clock (`out_of_time`)."""

    step: int
    stopped: str | None
    out_of_time: bool
    validation: Validation | None
    test: Validation | None
    trainer: pl.Trainer
    module: MegalithModule


def fit(
    run: Run, settings: LoopSettings, *, resume: Path | None = None, stop: StopRequest | None = None
) -> Outcome:
    """Train until `settings.max_steps`, from step folder `resume` when given.

    Errors: what the engine, the loader and the saver raise. While it runs, signals mean "save and stop".
    """
    stop = stop or StopRequest(settings.max_seconds)
    module = MegalithModule(run.engine)
    with ExitStack() as around:
        around.enter_context(quiet())
        trainer = make_trainer(run, settings, stop)
        around.enter_context(stop.listening())
        trainer.fit(module, run.train, run.validation, ckpt_path=resume)
        if run.test is not None and not stop.asked:
            trainer.test(module, run.test, verbose=False)
    return Outcome(
        step=run.engine.step,
        stopped=stop.signal.name if stop.signal else None,
        out_of_time=stop.out_of_time and run.engine.step < settings.max_steps,
        validation=module.validation,
        test=module.test,
        trainer=trainer,
        module=module,
    )


def make_trainer(run: Run, settings: LoopSettings, stop: StopRequest) -> pl.Trainer:
    """Lightning's Trainer with our strategy and callbacks; the arguments that the engine owns have the only value that works."""
    watch = Stopwatch()
    sinks = list(run.sinks) + ([run.display.show] if run.display else [])
    callbacks: list[pl.Callback] = [MetricsCallback(run.engine, run.meter, watch, sinks)]
    if run.display:
        callbacks.append(ProgressCallback(run.engine, run.display))
        stop.show = run.display.note
    callbacks += [StopCallback(run.engine, stop), *run.callbacks]
    if settings.save:
        callbacks.append(CheckpointCallback(run.saver, settings.save, watch, run.announce))
    return lightning_trainer(
        MegalithStrategy(run.engine, run.saver),
        settings,
        on_gpu=run.engine.topology.device.type == "cuda",
        validates=run.validation is not None,
        loggers=list(run.loggers),
        callbacks=callbacks,
        folder=run.folder,
    )


def lightning_trainer(
    strategy: MegalithStrategy,
    settings: LoopSettings,
    *,
    on_gpu: bool,
    validates: bool = True,
    loggers: Sequence[Logger] = (),
    callbacks: Sequence[pl.Callback] = (),
    folder: Path | None = None,
    saves: bool | None = None,
) -> pl.Trainer:
    """Lightning's Trainer around a strategy of ours. `saves`: do `callbacks` write checkpoints (default: by the settings)?"""
    return Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=1,
        strategy=strategy,
        # Else Lightning finds SLURM, checks its own idea of it, and takes our signals.
        plugins=[LightningEnvironment()],
        max_steps=settings.max_steps,
        max_epochs=-1,
        val_check_interval=settings.validate_every or settings.max_steps,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if settings.validate_every and validates else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=settings.log_every,
        logger=list(loggers) or False,
        callbacks=list(callbacks),
        enable_checkpointing=settings.save is not None if saves is None else saves,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        enable_autolog_hparams=False,
        default_root_dir=folder,
        profiler=_profiler(settings.profiler, folder),
        **settings.lightning,
    )


def silent_logger() -> Logger:
    """Logs nothing; with it, what is measured is returned by `trainer.test` without a warning that nobody logs it."""
    return DummyLogger()


def _profiler(name: str | None, folder: Path | None) -> Any:
    return PROFILERS[name](dirpath=folder, filename="profile") if name else None
