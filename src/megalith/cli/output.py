"""Tables on the terminal; the same words as plain lines where the output is not a terminal, whole and searchable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table


def print_rows(rows: Mapping[str, str]) -> None:
    """A name and a value a line."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    _print(table, [f"{name:<16} {value}" for name, value in rows.items()])


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns under a head."""
    kept = list(rows)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in head:
        table.add_column(name, overflow="fold")
    for row in kept:
        table.add_row(*row)
    _print(table, ["\t".join(row) for row in [head, *kept]])


def _print(table: Table, lines: Iterable[str]) -> None:
    console = Console(highlight=False, markup=False)
    if console.is_terminal:
        console.print(table)
        return
    for line in lines:
        console.print(line, soft_wrap=True)
