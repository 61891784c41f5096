"""How a configuration looks on the terminal: YAML on stdout, notices and problems on stderr."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from megalith.cli.errors import show_notices
from megalith.config.compose import Gathered, preview, settle, to_yaml
from megalith.errors import ConfigError
from megalith.tasks.derived import Derived
from megalith.tasks.derived import derived as derive
from megalith.tasks.pretrain_config import PretrainConfig


def print_configuration(root: type[PretrainConfig], gathered: Gathered, *, derived: bool) -> None:
    """The whole configuration; one with problems is printed too, as far as it is known, and then raises `ConfigError`."""
    console = Console(highlight=False)
    try:
        composed = settle(root, gathered)
    except ConfigError:
        _print_yaml(console, to_yaml(preview(root, gathered)))
        raise
    show_notices(composed.notices)
    _print_yaml(console, composed.yaml())
    if derived:
        _print_derived(console, derive(composed.config))


def _print_yaml(console: Console, text: str) -> None:
    if console.is_terminal:
        console.print(Syntax(text.rstrip(), "yaml", background_color="default"))
    else:
        sys.stdout.write(text)


def _print_derived(console: Console, rows: list[Derived]) -> None:
    """A table on a terminal; YAML comments elsewhere, so that what was printed is still a configuration."""
    if not console.is_terminal:
        width = max(len(row.name) for row in rows)
        sys.stdout.write("\n# derived\n")
        for row in rows:
            sys.stdout.write(
                f"#   {row.name:<{width}}  {_number(row.value):>16}  {row.because}".rstrip() + "\n"
            )
        return
    table = Table(
        title="derived", title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False
    )
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True, style="bold")
    table.add_column(style="dim")
    for row in rows:
        table.add_row(row.name, _number(row.value), row.because)
    console.print()
    console.print(table)


def _number(value: int | float | str) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
