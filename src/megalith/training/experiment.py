"""Where a run lives on the disk, in NeMo's layout.

    <exp_dir>/<name>/<version>/       the version is left out when resume_if_exists: the same command then finds its run again
      checkpoints/                    step folders, `latest`, links with the metric in the name
      metrics.jsonl                   goes on over restarts, cut back to the step that the run resumes from
      config.yaml  hparams.yaml       the whole configuration of the last start
      cmd-args.log  git-info.log      the command line; commit and uncommitted changes of the folder it was started in
      megalith_log_globalrank-0_localrank-0.txt  megalith_error_log.txt  events.out.tfevents.*
      run_0/  run_1/ …                the loose files of earlier starts

Knows names and files. Knows neither engine nor trainer.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from megalith.errors import CheckpointError, ConfigError, Problem
from megalith.training.metrics import FILE as METRICS
from megalith.training.metrics import MetricsFile

if TYPE_CHECKING:
    from megalith.training.config import ExpManagerConfig

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

DEFAULT_FOLDER = "nemo_experiments"
HELD = ".running"
"""The file that a running start keeps locked; it says who that is."""
LOGGERS = ("megalith", "lightning.pytorch")


@dataclass(frozen=True)
class Experiment:
    """The folders of a run, and its name."""

    name: str
    folder: Path
    checkpoints: Path

    @property
    def metrics(self) -> MetricsFile:
        """`metrics.jsonl`."""
        return MetricsFile(self.folder / METRICS)


def choose_folder(config: ExpManagerConfig, *, now: datetime | None = None) -> Experiment:
    """Which folder the run has. Creates nothing.

    Errors: `CheckpointError` when the folder holds checkpoints of another run and `resume_if_exists` is off.
    """
    name = config.name or "default"
    if config.explicit_log_dir:
        folder = Path(config.explicit_log_dir).expanduser().absolute()
    else:
        base = Path(config.exp_dir or DEFAULT_FOLDER).expanduser().absolute() / name
        if config.version is not None:
            folder = base / str(config.version)
        elif config.resume_if_exists:
            folder = base
        elif config.use_datetime_version:
            folder = base / (now or datetime.now()).strftime("%Y-%m-%d_%H-%M-%S")
        else:
            folder = base / f"version_{_next_number(base, 'version')}"
    given = config.checkpoint_callback_params.dirpath
    checkpoints = Path(given).expanduser().absolute() if given else folder / "checkpoints"
    if not config.resume_if_exists and any(checkpoints.glob("step_*")):
        raise CheckpointError(
            "this folder holds the checkpoints of a run, and exp_manager.resume_if_exists is off",
            where=str(checkpoints),
            fix=f"exp_manager.resume_if_exists=true to go on with it, or another {_chosen_by(config)}",
        )
    return Experiment(name, folder, checkpoints)


def _chosen_by(config: ExpManagerConfig) -> str:
    """The key that decides where checkpoints go."""
    if config.checkpoint_callback_params.dirpath:
        return "exp_manager.checkpoint_callback_params.dirpath"
    if config.explicit_log_dir:
        return "exp_manager.explicit_log_dir"
    return "exp_manager.name" if config.version is None else "exp_manager.version"


def open_folder(experiment: Experiment, *, config_yaml: str, files: Sequence[str], step: int) -> list[str]:
    """Make the folder ready for a start at `step`. → notices.

    Files of earlier starts move to `run_N/`; `metrics.jsonl` stays, cut back to `step` (what is cut stays in `run_N/`, too).
    `files` are copied in. Errors: `ConfigError` when one of them is not there.
    """
    missing = [name for name in files if not Path(name).expanduser().is_file()]
    if missing:
        problems = [Problem("exp_manager.files_to_copy", f"{name} is not a file") for name in missing]
        raise ConfigError(problems)
    folder = experiment.folder
    folder.mkdir(parents=True, exist_ok=True)
    notices = _make_room(experiment, step)
    (folder / "config.yaml").write_text(config_yaml, encoding="utf-8")
    (folder / "cmd-args.log").write_text(shlex.join(sys.argv) + "\n", encoding="utf-8")
    git = git_info()
    if git:
        (folder / "git-info.log").write_text(git, encoding="utf-8")
    for name in files:
        shutil.copy(Path(name).expanduser(), folder)
    return notices


def _make_room(experiment: Experiment, step: int) -> list[str]:
    """Move the loose files of earlier starts away, and cut the metrics back."""
    folder, metrics = experiment.folder, experiment.metrics
    loose = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name != METRICS and p.name[0] != "."]
    later = sum(row["step"] > step for row in metrics.read())
    if not loose and not later:
        metrics.truncate(step)
        return []
    earlier = folder / f"run_{_next_number(folder, 'run')}"
    earlier.mkdir()
    for path in loose:
        path.rename(earlier / path.name)
    if not later:
        metrics.truncate(step)
        return []
    shutil.copy(metrics.path, earlier)
    metrics.truncate(step)
    return [f"{METRICS}: {later} rows after step {step} moved to {earlier.name}/"]


def _next_number(folder: Path, prefix: str) -> int:
    found = [re.fullmatch(rf"{prefix}_(\d+)", path.name) for path in folder.glob(f"{prefix}_*")]
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def git_info() -> str:
    """Commit and uncommitted changes of the repository around the current folder; empty where there is none."""
    try:
        commit, changes = (
            subprocess.run(["git", *words], capture_output=True, text=True, errors="replace", timeout=20)
            for words in (["rev-parse", "HEAD"], ["diff", "HEAD"])
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f"commit hash: {commit.stdout.strip()}\n{changes.stdout}" if commit.returncode == 0 else ""


class _Say(logging.Handler):
    """Warnings and errors as lines for the person in front of the screen."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "shown", False):  # the command line shows it
            return
        self._say(f"{record.levelname.lower()}: {record.getMessage()}")


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Within, the folder is this process's: a second start of the same run would move its files and cut its metrics.

    The lock goes with the process, however it ends. Errors: `CheckpointError` when another process has it.
    """
    if fcntl is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / HELD, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise CheckpointError(
                f"process {file.read().strip() or '?'} trains in this folder",
                where=str(folder),
                fix="wait for it or stop it; another run needs another exp_manager.name or explicit_log_dir",
            ) from error
        except OSError:
            pass  # a file system without locks
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}")
        file.flush()
        os.fsync(file.fileno())  # another host looks whether it sees this
        yield


def holder(folder: Path) -> str:
    """Who holds a folder, or held it last: "4711 on host-a"; empty where nobody says."""
    file = folder / HELD
    return file.read_text(encoding="utf-8") if file.is_file() else ""


@contextmanager
def log_files(folder: Path, *, rank: int = 0, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Within, what we and Lightning log also goes to files: everything, and warnings and errors by themselves.

    `say` gets our warnings too, since logging shows none of its own accord once there is a file.
    """
    names = [(f"megalith_log_globalrank-{rank}_localrank-{rank}.txt", logging.INFO)]
    if rank == 0:
        names.append(("megalith_error_log.txt", logging.WARNING))
    handlers: list[logging.Handler] = []
    for name, level in names:
        handler = logging.FileHandler(folder / name, encoding="utf-8", delay=True)
        handler.setLevel(level)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handlers.append(handler)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(min(logger.getEffectiveLevel(), logging.INFO))
        for handler in handlers:
            logger.addHandler(handler)
    ours = logging.getLogger(LOGGERS[0])
    if say is not None:
        handlers.append(_Say(say))
        ours.addHandler(handlers[-1])
    try:
        yield
    except Exception:
        ours.exception("the run ended with an error", extra={"shown": True})
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
            for handler in handlers:
                logger.removeHandler(handler)
        for handler in handlers:
            handler.close()
