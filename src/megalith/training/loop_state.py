"""Lightning's loop counters as a function of the step, so that a checkpoint needs none of them.

Lightning resumes from a nest of counters (ready, started, processed, completed × total, current × loops). Our training is one
endless epoch in which batch k ends with step k, so all of them follow from the step: a checkpoint that `engine.fit` or a
converter wrote resumes under Lightning, and one written under another Lightning does too.

The keys are those that `fit_loop.state_dict()` of the installed Lightning gives; a contract test resumes through them.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl


def fit_loop_state(trainer: pl.Trainer, step: int) -> dict[str, Any]:
    """What `fit_loop` would have saved right after step `step` and everything due at it (validation, saving)."""
    state = trainer.fit_loop.state_dict()
    epoch = _counters(ready=1, started=1, processed=0, completed=0)
    batches = _counters(ready=step, started=step, processed=step, completed=step)
    updates = {name: {"ready": step, "completed": step} for name in ("total", "current")}
    return {
        **state,
        "epoch_progress": epoch,
        "epoch_loop.state_dict": {"_batches_that_stepped": step},
        "epoch_loop.batch_progress": {**batches, "is_last_batch": False},
        "epoch_loop.manual_optimization.optim_step_progress": updates,
    }


def checkpoint_dict(trainer: pl.Trainer, step: int, callbacks: dict[str, Any]) -> dict[str, Any]:
    """The dictionary that Lightning wants back from a strategy's `load_checkpoint`."""
    loops = {
        "fit_loop": fit_loop_state(trainer, step),
        "validate_loop": trainer.validate_loop.state_dict(),
        "test_loop": trainer.test_loop.state_dict(),
        "predict_loop": trainer.predict_loop.state_dict(),
    }
    return {
        "pytorch-lightning_version": pl.__version__,
        "epoch": 0,
        "global_step": step,
        "state_dict": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        "loops": loops,
        "callbacks": callbacks,
    }


def _counters(**values: int) -> dict[str, dict[str, int]]:
    return {"total": dict(values), "current": dict(values)}
