"""The plainest training loop: the oracle that the Lightning loop is compared with, and what notebooks use.

Knows an engine and an iterator of batches. Knows no files, no metrics and no signals: those are the callers' functions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from megalith.engine.engine import Engine, StepResult
from megalith.engine.objective import Batch
from megalith.errors import DataError

Call = TypeVar("Call", bound=Callable[..., None])


@dataclass(frozen=True)
class Every(Generic[Call]):
    """Call a function after every n-th step (counted by `engine.step`, so a resumed run keeps the rhythm)."""

    steps: int
    call: Call

    def due(self, step: int) -> bool:
        """Is it due after this many steps?"""
        return step % self.steps == 0


@dataclass(frozen=True)
class Report:
    """What `log` gets: the steps since its last call and the wall time they took, validation and saving left out."""

    results: list[StepResult]
    seconds: float


def fit(
    engine: Engine,
    batches: Iterator[Batch],
    *,
    max_steps: int,
    log: Every[Callable[[Engine, Report], None]] | None = None,
    validate: Every[Callable[[Engine], None]] | None = None,
    save: Every[Callable[[Engine], None]] | None = None,
) -> StepResult | None:
    """Train until `engine.step` is `max_steps`; after a step: log, validate, save, in this order. → the last step.

    `batches` starts at `engine.consumed_samples`. Whatever is not yet logged or saved at the end is then.
    Errors: `DataError` when the batches end early.
    """
    result: StepResult | None = None
    pending: list[StepResult] = []
    seconds, saved_at = 0.0, engine.step
    while engine.step < max_steps:
        start = time.perf_counter()
        try:
            batch = next(batches)
        except StopIteration as end:
            raise DataError(
                f"the batches end at step {engine.step} of {max_steps}", fix="lower max_steps"
            ) from end
        result = engine.train_step(batch)
        pending.append(result)
        seconds += time.perf_counter() - start
        last = engine.step == max_steps
        if log and (last or log.due(engine.step)):
            log.call(engine, Report(pending, seconds))
            pending, seconds = [], 0.0
        if validate and validate.due(engine.step):
            validate.call(engine)
        if save and save.due(engine.step):
            save.call(engine)
            saved_at = engine.step
    if save and saved_at != engine.step:
        save.call(engine)
    return result
