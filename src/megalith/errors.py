"""Errors that teach: what happened, where, what to do. Every user's mistake is one of these, and exits with its code.

Knows no other module. The command line prints `MegalithError`s as one message without a traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

EXIT_SUCCESS = 0
EXIT_FAILURE = 1
"""A check ran and said no: a difference, a corrupt file found by `verify`, too many rejected lines."""
EXIT_USER_ERROR = 2
EXIT_STOPPED = 3
"""Stopped by a signal after saving: run the same command again to go on."""
EXIT_LOST = 4
"""Another process of the run died or hung, and this one could not go on without it."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `where` (a key path, a file, a line), `what`, and `fix` (what to do about it)."""

    where: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f"\n    fix: {self.fix}" if self.fix else "")


class MegalithError(Exception):
    """Base of every error that a user can mend. `exit_code` is what the process ends with."""

    exit_code = EXIT_USER_ERROR

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.problem = Problem(where, what, fix)
        head = f"{where}: {what}" if where else what
        super().__init__(head + (f"\n  fix: {fix}" if fix else ""))


class ConfigError(MegalithError):
    """The configuration is wrong. Holds every problem at once, not the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        title = f"{count} problem{'s' if count != 1 else ''} in the configuration"
        Exception.__init__(self, "\n  ".join([title, *(str(p) for p in self.problems)]))


class TopologyError(MegalithError):
    """Sizes of the parallel axes do not fit each other, the model or the number of processes."""


class DataError(MegalithError):
    """A data file is missing, truncated, corrupt or not of the expected kind."""


class CheckpointError(MegalithError):
    """A checkpoint is missing, damaged, or does not belong to this model."""


class TrainingStopped(MegalithError):
    """Training cannot go on (too many skipped steps in a row, say)."""

    exit_code = EXIT_FAILURE


class UnsupportedError(MegalithError):
    """A combination that Megalith refuses by name, because it would silently compute something else."""
