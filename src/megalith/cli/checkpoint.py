"""`megalith checkpoint inspect|verify|scan|convert`: what a checkpoint holds, whether it is still what was saved, whether it is
safe, and what it is in another format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from megalith.cli.convert import convert
from megalith.cli.options import ConfigFile

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Look into checkpoints: what they hold, whether they are whole; convert them.",
)
Where = Annotated[
    Path,
    typer.Argument(help="a run folder, its checkpoints folder, a step folder, `latest` or a link to one"),
]
Anything = Annotated[
    Path, typer.Argument(help="a run or step folder, or what Hugging Face, Megatron or NeMo saved")
]


@app.command()
def inspect(
    path: Anything,
    as_json: Annotated[bool, typer.Option("--json", help="everything, as one JSON object")] = False,
    config_file: ConfigFile = None,
) -> None:
    """Shows step, counters, metrics, tensors, configuration, data plan and files of a checkpoint; of a run, its latest.
    Of another program's: tensors, architecture, and where each setting comes from. No weights are loaded.

    Example: megalith checkpoint inspect nemo_experiments/megatron_gpt
    """
    import json

    from rich.console import Console
    from rich.table import Table

    from megalith.checkpoint.open import resolve
    from megalith.checkpoint.summary import describe, summarise
    from megalith.errors import CheckpointError

    try:
        summary = summarise(resolve(path))
    except CheckpointError:
        lines, summary = _inspect_foreign(path, config_file)
    else:
        lines = describe(summary)
    if as_json:
        typer.echo(json.dumps(summary, indent=1, ensure_ascii=False))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    previous = ""
    for what, value in lines:
        table.add_row(what if what != previous else "", value)
        previous = what
    Console(highlight=False, markup=False).print(table)


def _inspect_foreign(path: Path, config_file: str | None) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Of another program's checkpoint. Our own and what is none raise as they did."""
    from megalith.checkpoint.foreign import find, open_foreign
    from megalith.checkpoint.foreign_summary import describe, summarise
    from megalith.checkpoint.summary import summarise as summarise_own

    found = find(path)
    summary = (
        summarise_own(found.folder)
        if found.is_native
        else summarise(open_foreign(found.folder, config_file=config_file))
    )
    return describe(summary), summary


@app.command()
def verify(path: Where) -> None:
    """Reads every byte of a checkpoint (of a run: of all its checkpoints; of a conversion: of its folder or archive) and compares it with
    what was saved.

    Exit code 1 when anything differs. Example: megalith checkpoint verify nemo_experiments/megatron_gpt
    """
    from megalith.cli.progress import bytes_progress
    from megalith.errors import EXIT_FAILURE

    sizes, problems_of = _whole(path)
    found = {}
    with bytes_progress() as bar:
        task = bar.add_task("verifying", total=sum(sizes.values()))
        for folder in sizes:
            bar.update(task, description=folder.name)
            found[folder] = problems_of(folder, progress=lambda count: bar.advance(task, count))
    for folder, problems in found.items():
        typer.echo(f"{folder}: " + ("damaged" if problems else "whole"))
        for problem in problems:
            typer.echo(f"  {problem}")
    if any(found.values()):
        raise typer.Exit(EXIT_FAILURE)


def _whole(path: Path) -> tuple[dict[Path, int], Callable[..., list[str]]]:
    """Folder → its bytes, of all that a path means, and the function that says what is wrong with one."""
    from megalith.checkpoint.convert.verify import is_converted, problems_of_conversion, recorded
    from megalith.checkpoint.manifest import quick_problems
    from megalith.checkpoint.manifest import verify as problems_of
    from megalith.checkpoint.open import resolve_all

    if is_converted(path):
        return {path: sum(file["bytes"] for file in recorded(path).values())}, problems_of_conversion
    manifests = {folder: quick_problems(folder)[0] for folder in resolve_all(path)}
    return {
        f: sum(file.size for file in m.files.values()) if m else 0 for f, m in manifests.items()
    }, problems_of


@app.command()
def scan(
    path: Annotated[
        Path, typer.Argument(help="a file (.pt, .bin, .ckpt, .nemo, …) or a folder of files from elsewhere")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="every name, as one JSON list")] = False,
) -> None:
    """Lists every name that the pickles of a file or folder mention, without loading them: what would run, and what is inert.

    Exit code 1 when anything would run code. Example: megalith checkpoint scan downloads/megatron_lm_345m
    """
    import json

    from rich.console import Console
    from rich.table import Table

    from megalith.checkpoint.pickles.names import Verdict
    from megalith.checkpoint.pickles.scan import scan as scan_files
    from megalith.errors import EXIT_FAILURE

    found = scan_files(path)
    if as_json:
        typer.echo(json.dumps([each.record() for each in found], indent=1, ensure_ascii=False))
    else:
        table = Table(box=None, pad_edge=False)
        for title in ("file", "verdict", "names that say so"):
            table.add_column(title, overflow="fold")
        for each in found:
            names = [
                name for name, verdict in each.names.items() if verdict is each.verdict is not Verdict.ALLOWED
            ]
            problem = [f"({each.problem})"] if each.problem else []
            table.add_row(each.file, each.verdict.value, ", ".join([*names[:20], *problem]))
        Console(highlight=False, markup=False).print(table)
    if any(each.verdict is Verdict.RUNS for each in found):
        raise typer.Exit(EXIT_FAILURE)


app.command()(convert)
