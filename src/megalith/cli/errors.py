"""How errors look on the terminal. Plain text where there is no terminal, so that logs can be searched."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megalith import __version__
from megalith.errors import ConfigError, MegalithError, Problem

EXIT_BUG = 70
"""As BSD's sysexits.h has it: an internal software error."""

LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")
"""Where launchers write the number of a process on its host."""

MARKS = {"✗": "bold red", "!": "bold yellow", "→": "green"}


def show_error(error: MegalithError) -> None:
    """A user's mistake: what, where, and what to do, on stderr. Of a host's processes, which all make it, one says it."""
    if any(os.environ.get(name, "0") not in ("", "0") for name in LOCAL_RANKS):
        return
    console = _console()
    problems = error.problems if isinstance(error, ConfigError) else (error.problem,)
    if len(problems) == 1:
        _show_problem(console, problems[0], mark="✗ ")
        return
    flags = not any("." in problem.where.partition(" ")[0] for problem in problems)  # keys have dots
    title = f"{len(problems)} problems {'on the command line' if flags else 'in the configuration'}"
    _print(console, Text(title, "bold"), mark="✗ ")
    for problem in problems:
        _show_problem(console, problem)


def _show_problem(console: Console, problem: Problem, *, mark: str = "  ") -> None:
    _print(console, _line(problem), mark=mark)
    if problem.fix:
        _print(console, Text(problem.fix, "green"), mark="    → " if mark.strip() else "      → ")


def show_failure(text: str) -> None:
    """A check that said no: one line on stderr."""
    _print(_console(), Text(text), mark="✗ ")


def show_notices(notices: Sequence[str]) -> None:
    """What the user should know although nothing is wrong: one line each, on stderr."""
    console = _console()
    for notice in notices:
        _print(console, Text(notice), mark="! ")


def report_bug(bug: Exception, *, show: bool) -> int:
    """An error that is ours: one line, the traceback in a file (or on stderr when `show`). → the exit code."""
    console = _console()
    details = "".join(traceback.format_exception(bug))
    summary = " ".join(f"{type(bug).__name__}: {bug}".split())
    summary = summary if len(summary) <= 300 else summary[:299] + "…"
    _print(console, Text.assemble(("This is a bug in Megalith. ", "bold"), summary), mark="✗ ")
    if show:
        console.print(details, highlight=False, markup=False, soft_wrap=True)
        return EXIT_BUG
    file = _write(details)
    where = (
        f"the traceback is in {file}; please send it"
        if file
        else "run it again with --traceback to see where"
    )
    _print(console, Text(where, "green"), mark="    → ")
    return EXIT_BUG


def _write(details: str) -> Path | None:
    head = (
        f"megalith {__version__}, Python {platform.python_version()}, {platform.platform()}\n{sys.argv}\n\n"
    )
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="megalith-bug-", suffix=".txt", delete=False, encoding="utf-8", errors="replace"
        ) as file:
            file.write(head + details)
    except OSError:
        return None
    return Path(file.name)


def _console() -> Console:
    return Console(stderr=True, highlight=False)


def _line(problem: Problem) -> Text:
    """**model.hiden_size** (command line): is not a key"""
    key, bracket, origin = problem.where.partition(" (")
    text = Text()
    if problem.where:
        text.append(key, "bold").append(bracket + origin, "dim").append(": ")
    return text.append(problem.what)


def _print(console: Console, text: Text, *, mark: str) -> None:
    """Behind a mark; what is too long for a terminal continues under the text, not under the mark."""
    if console.is_terminal:
        grid = Table.grid()
        grid.add_column(width=len(mark), no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row(Text(mark, MARKS.get(mark.strip(), "")), text)
        console.print(grid)
        return
    for i, line in enumerate(text.plain.splitlines() or [""]):
        console.print((mark if not i or not mark.strip() else "") + line, markup=False, soft_wrap=True)
