"""`megalith explain KEY`: what a configuration key means, and where its value comes from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megalith.cli.pretrain import ConfigFile, ConfigName, ConfigPath, root_of

if TYPE_CHECKING:
    from rich.console import Console

    from megalith.config.explain import Explanation, KeyHelp
    from megalith.config.schema import Section


def explain(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY [KEY=VALUE]…", help="a key, a section or a word; then overrides", show_default=False
        ),
    ] = None,
    config_name: ConfigName = None,
    config_path: ConfigPath = None,
    config: ConfigFile = None,
) -> None:
    """What a key means: unit, type, default, its value and where that came from. A section: its keys. A word: a search.

    Examples: megalith explain model.optim.lr · megalith explain exp_manager · megalith explain dropout ·
    megalith explain model.hidden_size model.preset=gpt2-345m · megalith explain masked_lm_prob
    --config-name megatron_bert_config
    """
    from rich.console import Console

    from megalith.config.compose import gather
    from megalith.config.explain import explain as answer

    questions = [word for word in words or [] if _is_question(word)] or [""]
    overrides = [word for word in words or [] if not _is_question(word)]
    names = {"config_name": config_name, "config_path": config_path, "config_file": config}

    def answered(root: type[Section], files: dict[str, Any]) -> list[Explanation]:
        gathered = gather(root, overrides=overrides, **files)
        return [answer(root, question, gathered) for question in questions]

    console = Console(highlight=False, markup=False)
    answers = answered(_root(config_name, config_path, config), names)
    if not any(names.values()) and not all(map(_useful, answers)):  # is it a key of tuning?
        answers = [
            known if _useful(known) else other
            for known, other in zip(answers, answered(_tuning(), {}), strict=True)
        ]
    for i, (question, found) in enumerate(zip(questions, answers, strict=True)):
        if i:
            console.print()
        _show(console, question, found)
    if not all(_useful(found) for found in answers):
        raise typer.Exit(2)


def _root(config_name: str | None, config_path: Path | None, config_file: Path | None) -> type[Section]:
    """The root of a file: of tuning, where it is one of those or names rows to learn from."""
    from megalith.config.sources import load_yaml, locate
    from megalith.config.tree import get
    from megalith.tasks.tuning_config import PACKAGED, TWO_SIDES

    file = locate(config_name, config_path, config_file)
    tunes = file.stem in (*PACKAGED.values(), TWO_SIDES) or get(
        load_yaml(file), ("model", "data", "train_ds")
    )
    return _tuning() if tunes else root_of(config_name, config_path, config_file)


def _tuning() -> type[Section]:
    from megalith.tasks.tuning_config import TUNE_ROOTS

    return TUNE_ROOTS["gpt"]


def _is_question(word: str) -> bool:
    return "=" not in word and not word.startswith("~")


def _useful(found: Explanation) -> bool:
    return bool(found.found or found.foreign or found.containing)


def _show(console: Console, question: str, found: Explanation) -> None:
    if found.found:
        _show_key(console, found.found)
        return
    if found.foreign:
        console.print(found.foreign)
        return
    if found.containing:
        console.print(f'No key is called "{question}". It occurs in:')
        _table(console, [(key.key, key.value, key.meaning) for key in found.containing])
    else:
        console.print(f'No key is called "{question}", and no key\'s meaning mentions it.')
    if found.nearest:
        console.print(f"Did you mean {' or '.join(found.nearest)}?")


def _show_key(console: Console, key: KeyHelp) -> None:
    from rich.padding import Padding
    from rich.text import Text

    console.print(Text(key.key or "The whole configuration", "bold"))
    console.print(Padding(key.meaning, (0, 0, 0, 2)) if console.is_terminal else f"  {key.meaning}")
    if key.keys or key.type == "a section":
        _table(console, list(key.keys))
        return
    same = key.value == key.default
    rows = [
        ("type", key.type),
        ("unit", key.unit),
        ("default", key.default),
        (
            "value",
            key.value
            + (f"   (from: {key.origin})" if key.origin != "default" else "   (the default)" * same),
        ),
        ("for example", ", ".join(key.examples)),
    ]
    for name, text in rows:
        if text:
            line = Text(f"  {name:<12}", "dim").append(text, "not dim")
            console.print(line, soft_wrap=not console.is_terminal)


def _table(console: Console, rows: list[tuple[str, str, str]]) -> None:
    """Name, value, meaning; plain lines where there is no terminal."""
    from rich.table import Table

    shown = [
        (name, value if len(value) <= 32 else value[:31] + "…", meaning) for name, value, meaning in rows
    ]
    if not console.is_terminal:
        wide, narrow = (max((len(row[i]) for row in shown), default=0) for i in (0, 1))
        for name, value, meaning in shown:
            console.print(f"  {name:<{wide}}  {value:<{narrow}}  {meaning}".rstrip(), soft_wrap=True)
        return
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True, min_width=4)
    table.add_column(style="cyan", overflow="fold")
    table.add_column(style="dim", ratio=1)
    for row in shown:
        table.add_row(*row)
    console.print(table)
