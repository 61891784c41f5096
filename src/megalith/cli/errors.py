"""How errors look on the terminal. Plain text where there is no terminal, so that logs can be searched."""

from __future__ import annotations

import platform
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from megalith import __version__
from megalith.errors import ConfigError, MegalithError, Problem

EXIT_BUG = 70
"""As BSD's sysexits.h has it: an internal software error."""


def show_error(error: MegalithError) -> None:
    """A user's mistake: what, where, and what to do, on stderr."""
    console = _console()
    if isinstance(error, ConfigError):
        count = len(error.problems)
        title = f"{count} problem{'s' if count != 1 else ''} in the configuration"
        _print(console, Text.assemble(("✗ ", "bold red"), (title, "bold")))
        for problem in error.problems:
            _print(console, _line(problem), indent=2)
            if problem.fix:
                _print(console, _fix(problem.fix), indent=6)
        return
    _print(console, Text.assemble(("✗ ", "bold red"), _line(error.problem)))
    if error.problem.fix:
        _print(console, _fix(error.problem.fix), indent=4)


def show_notices(notices: Sequence[str]) -> None:
    """What the user should know although nothing is wrong: one line each, on stderr."""
    console = _console()
    for notice in notices:
        _print(console, Text.assemble(("! ", "bold yellow"), notice))


def report_bug(bug: Exception, *, show: bool) -> int:
    """An error that is ours: one line, the traceback in a file (or on stderr when `show`). → the exit code."""
    console = _console()
    details = "".join(traceback.format_exception(bug))
    summary = " ".join(f"{type(bug).__name__}: {bug}".split())
    summary = summary if len(summary) <= 300 else summary[:299] + "…"
    _print(console, Text.assemble(("✗ ", "bold red"), ("This is a bug in Megalith. ", "bold"), summary))
    if show:
        console.print(details, highlight=False, markup=False, soft_wrap=True)
        return EXIT_BUG
    file = _write(details)
    where = (
        f"the traceback is in {file}; please send it"
        if file
        else "run it again with --traceback to see where"
    )
    _print(console, _fix(where), indent=4)
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


def _fix(fix: str) -> Text:
    return Text.assemble(("→ ", "green"), (fix, "green"))


def _print(console: Console, text: Text, *, indent: int = 0) -> None:
    if console.is_terminal:
        console.print(Padding(text, (0, 0, 0, indent)))
        return
    for line in text.plain.splitlines() or [""]:
        console.print(" " * indent + line, markup=False, soft_wrap=True)
