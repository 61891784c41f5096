"""`megalith doctor`: what this machine will use and why, and what is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megalith.tools.doctor import Line, Report

MARKS = {"good": ("✓", "green"), "note": ("!", "yellow"), "bad": ("✗", "red")}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False) -> None:
    """What this machine will use, why, and what is missing.

    Devices, precision, attention, compilation, versions, memory, disk; packages that are not installed and what each would
    enable. Changes nothing, and always ends with exit code 0. Example: megalith doctor --json
    """
    import json

    from megalith.tools.doctor import examine

    report = examine()
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=1, ensure_ascii=False))
        return
    _show(report)


def _show(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False)
    for title, lines in report.sections.items():
        if not lines:
            continue
        if title == "versions" and all(line.mark == "good" for line in lines):
            console.print(Text(title, "bold"))
            console.print(
                "  " + ", ".join(f"{line.name} {line.value}" for line in lines),
                soft_wrap=not console.is_terminal,
            )
            continue
        console.print(Text(title, "bold"))
        if not console.is_terminal:
            for line in lines:
                console.print(_plain(line), soft_wrap=True)
            continue
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True, min_width=3, justify="right")
        table.add_column(style="bold", no_wrap=True, min_width=11)
        table.add_column(overflow="fold")
        table.add_column(style="dim", overflow="fold")
        for line in lines:
            mark, colour = MARKS[line.mark] if title != "not installed" else ("·", "dim")
            table.add_row(Text(mark, colour), line.name, line.value, line.reason)
        console.print(table)
    bad = [line for line in report.advice if line.mark == "bad"]
    verdict = (
        "Something does not work: see ✗ above."
        if bad
        else "Ready. `megalith quickstart` trains a model in a few minutes."
    )
    console.print(Text(verdict, "bold red" if bad else "bold green"))


def _plain(line: Line) -> str:
    mark = {"good": " ", "note": "!", "bad": "x"}[line.mark]
    return f" {mark} {line.name:<12} {line.value}" + (f"  ({line.reason})" if line.reason else "")
