"""What a person sees of a run: a bar on a terminal, plain lines elsewhere, both made of the rows that the files get.

step 120/1000 | loss 4.812 | lr 2.0e-04 | norm 1.31 | 18.2k tokens/s | 0.31 TFLOP/s | MFU 41.2 % | ETA 0:07:12
"""

from __future__ import annotations

import re
import textwrap
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from megalith.engine.engine import Engine
from megalith.training.metrics import TERM, Row

REFRESH = 0.2
"""Seconds between redraws of the bar."""


def train_text(row: Row) -> str:
    """The measurements of a training row, for people."""
    parts = [
        f"loss {_number(row['train_loss'], '.3f')}{terms_text(_terms(row, '', TERM), '.3f')}",
        f"lr {row['lr']:.1e}",
        f"norm {_number(row['grad_norm'], '.2f')}",
    ]
    if row["loss_scale"] != 1.0:
        parts.append(f"scale {row['loss_scale']:g}")
    if row["skipped"]:
        parts.append(f"skipped {row['skipped']}")
    parts += [f"{thousands(row['tokens_per_second'])} tokens/s", f"{row['tflops_per_second']:.3g} TFLOP/s"]
    if row.get("mfu") is not None:
        parts.append(f"MFU {100 * row['mfu']:.1f} %")
    return " | ".join(parts)


def evaluation_text(row: Row) -> str:
    """The line of a validation or a test."""
    kind = "val" if "val_loss" in row else "test"
    name = {"val": "validation", "test": "test"}[kind]
    terms = terms_text(_terms(row, f"{kind}_", "_loss"), ".4f")
    return (
        f"step {row['step']} | {name} loss {row[f'{kind}_loss']:.4f}{terms} | perplexity {row[f'{kind}_perplexity']:.2f} "
        f"| {row[f'{kind}_targets']:,} targets in {row[f'{kind}_seconds']:.1f} s"
    )


def terms_text(terms: Mapping[str, float | None], spec: str) -> str:
    """` (lm 6.812, sop 0.693)` behind a loss; nothing where it is one term."""
    if len(terms) < 2:
        return ""
    return f" ({', '.join(f'{name} {_number(value, spec)}' for name, value in terms.items())})"


def _terms(row: Row, before: str, behind: str) -> dict[str, float | None]:
    """The row's terms, by what stands between `before` and `behind` in its keys."""
    return {
        key.removeprefix(before).removesuffix(behind): value
        for key, value in row.items()
        if key.startswith(before) and key.endswith(behind) and len(key) > len(before + behind)
    }


def thousands(value: float) -> str:
    """`18234` → `18.2k`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """`3:02:09`; days in front when there are any."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hour}:{minute:02d}:{second:02d}"


def say(console: Console, text: str) -> None:
    """A line of its own: whole where nobody looks, on a terminal wrapped between words, under what it says.

    `train      corpus: …` continues below `corpus`, any other line four spaces in.
    """
    if console.is_terminal:
        text = "\n".join(_wrapped(line, console.width) for line in text.splitlines())
    console.print(text, highlight=False, markup=False, soft_wrap=True)


_LABEL = re.compile(r"[a-z]+ +")
_NO_BREAK = "\N{NO-BREAK SPACE}"
_COLUMN = 11
"""Characters of the names before what the summary of a run says."""


def _wrapped(line: str, width: int) -> str:
    indent = " " * (_COLUMN if _LABEL.fullmatch(line[:_COLUMN]) else 4)
    if " | " in line:  # measurements: a number stays with its name and its unit
        line = " | ".join(part.replace(" ", _NO_BREAK) for part in line.split(" | "))
    wrapped = textwrap.fill(
        line, max(width, 40), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return wrapped.replace(_NO_BREAK, " ")


def _number(value: float | None, spec: str) -> str:
    return "not finite" if value is None else format(value, spec)


class ProgressDisplay:
    """A sink for rows (`show`), and the bar around the steps between them."""

    def __init__(self, *, total: int, console: Console | None = None, bar: bool = True) -> None:
        self.total, self.console, self.wanted = total, console or Console(), bar
        columns = (
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
        )
        self._bar = Progress(*columns, console=self.console)
        self._task = self._bar.add_task("", total=total)
        self._text = self._note = ""
        self._shown: Row | None = None
        self._live: Live | None = None
        self._step_seconds: float | None = None

    def start(self, step: int) -> None:
        """Draw the bar, on a terminal."""
        if self.wanted and self.console.is_terminal and self._live is None:
            self.advance(step)
            self._live = Live(
                get_renderable=lambda: Group(*self._lines()),
                console=self.console,
                refresh_per_second=1 / REFRESH,
                transient=True,
            )
            self._live.start()

    def stop(self) -> None:
        """Take the bar away; its last measurements stay, as a line."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            if self._shown is not None:
                self.say(f"step {self._shown['step']}/{self.total} | {self._text}")

    def note(self, text: str) -> bool:
        """Show a line below the bar; False where there is no bar. Does nothing but keep it: a signal handler may call this."""
        self._note = text
        return self._live is not None

    def say(self, text: str) -> None:
        """A line of its own."""
        say(self.console, text)

    def advance(self, step: int) -> None:
        """A step is done."""
        self._bar.update(self._task, completed=step)

    def show(self, row: Row) -> None:
        """A row: into the bar, or as a line. Validations are lines always."""
        if "train_loss" not in row:
            self.say(evaluation_text(row))
            return
        step, eta = row["step"], f"ETA {self._remaining(row)}"
        self._text, self._shown = train_text(row), row
        self._bar.update(self._task, completed=step, description=eta)
        if self._live is None:
            self.say(f"step {step}/{self.total} | {self._text} | {eta}")

    def _lines(self) -> list[Progress | Text]:
        return [self._bar, Text(self._text), *([Text(self._note, "bold yellow")] if self._note else [])]

    def _remaining(self, row: Row) -> str:
        """Steps left × a running mean of the time of a step, in which the first row (warm caches, compilation) fades."""
        seconds = row["step_seconds"]
        before = self._step_seconds
        self._step_seconds = seconds if before is None else 0.7 * before + 0.3 * seconds
        return duration(self._step_seconds * (self.total - row["step"]))


class ProgressCallback(pl.Callback):
    """Moves a display with the run."""

    def __init__(self, engine: Engine, display: ProgressDisplay) -> None:
        self.engine, self.display, self._drawn = engine, display, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start where the engine is."""
        self.display.start(self.engine.step)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Move, but not more often than an eye sees."""
        now = time.monotonic()
        if now - self._drawn >= REFRESH:
            self.display.advance(self.engine.step)
            self._drawn = now

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the terminal as it was."""
        self.display.stop()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leave the terminal as it was."""
        self.display.stop()
