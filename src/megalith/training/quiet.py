"""Lightning's remarks that are wrong or of no use here, by their words; all others pass.

Its tips advertise, and some of its notices speak of things that the engine owns (devices, resuming) or say twice what the run
says itself.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

NOTICES = (
    "💡 Tip:",
    "GPU available:",
    "TPU available:",
    "HPU available:",
    "Restoring states from the checkpoint path at",
    "Restored all states from the checkpoint at",
    "`Trainer.fit` stopped:",
    "`weights_only` was not set",
    "was configured so",
)
WARNINGS = (
    r".*You defined a `validation_step` but have no `val_dataloader`",
    r".*does not have many workers which may be a bottleneck",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated",
    r".*It is recommended to use `self.log\(.*sync_dist=True\)`",
    r".*Total length of `.*` across ranks is zero",
)


class _Unwanted(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not any(words in record.getMessage() for words in NOTICES)


@contextmanager
def quiet() -> Iterator[None]:
    """Within, those remarks are not made."""
    unwanted = _Unwanted()
    # A filter on a logger does not see what its children log, so it goes on the handlers.
    handlers = [h for name in ("lightning.pytorch", "lightning") for h in logging.getLogger(name).handlers]
    for handler in handlers:
        handler.addFilter(unwanted)
    with warnings.catch_warnings():
        for words in WARNINGS:
            warnings.filterwarnings("ignore", message=words)
        try:
            yield
        finally:
            for handler in handlers:
                handler.removeFilter(unwanted)
