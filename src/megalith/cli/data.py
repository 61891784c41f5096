"""`megalith data preprocess|merge|inspect|verify`: text into token files, and what can be done with those."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from megalith.cli.tokenizer import MergeFile, TokenizerPath, TokenizerType, VocabFile

if TYPE_CHECKING:
    from rich.progress import Progress

    from megalith.data.inspect import Inspection

_ELSEWHERE = {"preprocess": ("megalith.cli.preprocess:app", "Turn text into token files.")}


class _Group(TyperGroup):
    """Commands of this module, and those that live in a module of their own, imported only to run."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The others first: they come first in use."""
        return [*_ELSEWHERE, *super().list_commands(ctx)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """For those elsewhere a stand-in with the line of help: enough to list it."""
        if cmd_name in _ELSEWHERE:
            return TyperCommand(cmd_name, help=_ELSEWHERE[cmd_name][1])
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command itself."""
        if args[0] not in _ELSEWHERE:
            return super().resolve_command(ctx, args)
        module, _, attribute = _ELSEWHERE[args[0]][0].partition(":")
        return args[0], typer.main.get_command(getattr(import_module(module), attribute)), args[1:]


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Turn text into token files; merge, inspect and verify them.",
)

Prefix = Annotated[str, typer.Argument(help="PREFIX of PREFIX.bin and PREFIX.idx", metavar="PREFIX")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object")]


@app.command()
def merge(
    output_prefix: Annotated[str, typer.Option("--output-prefix", help="PREFIX of the files to write")],
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input", help="a folder of token files, or a prefix; may be repeated, or followed by more"
        ),
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(help="more inputs", metavar="[INPUT]...")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="mix tokenizers or end-of-document settings")
    ] = False,
) -> None:
    """Joins token files: all documents, in the order of the inputs (those of a folder sorted by name).

    Example: megalith data merge --input parts/ --output-prefix corpus_text_document
    """
    from megalith.data.indexed.format import bin_path
    from megalith.data.merge import find_inputs
    from megalith.data.merge import merge as run
    from megalith.errors import DataError

    names = [*(inputs or []), *(more or [])]
    if not names:
        raise DataError(
            "no input is given", where="--input", fix="name a folder or the prefixes of token files"
        )
    total = sum(path.stat().st_size for path in map(bin_path, find_inputs(names)) if path.is_file())
    with _progress() as bar:
        task = bar.add_task("merging", total=total)
        merged = run(names, output_prefix, force=force, progress=lambda count: bar.advance(task, count))
    for notice in merged.notices:
        _notice(notice)
    written = merged.written
    _print_rows(
        {
            "inputs": f"{len(merged.inputs):,}",
            "written": f"{merged.prefix}.bin, .idx and .meta.json",
            "documents": f"{written.documents:,}",
            "tokens": f"{written.tokens:,}",
            "bytes": f"{written.bin_bytes + written.idx_bytes:,}",
        }
    )


@app.command()
def inspect(
    prefix: Prefix,
    tokenizer: TokenizerPath = None,
    tokenizer_type: TokenizerType = None,
    vocab_file: VocabFile = None,
    merge_file: MergeFile = None,
    document: Annotated[
        list[int] | None, typer.Option("--document", help="show this document whole; may be repeated")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Shows the header, counts and lengths of token files, and documents as text (by the tokenizer that made them).

    Example: megalith data inspect corpus_text_document --document 7
    """
    from megalith.cli.tokenizer import tokenizer_config
    from megalith.data.inspect import inspect as look

    config = tokenizer_config(tokenizer, tokenizer_type, vocab_file, merge_file)
    found = look(prefix, tokenizer=config, documents=document)
    if as_json:
        _print_json(found.as_dict())
        return
    _print_rows(_facts(found))
    for sample in found.samples:
        shown = " ".join(map(str, sample.ids)) if sample.text is None else sample.text
        if document is None and len(shown) > 400:
            shown = shown[:400] + " …"
        typer.echo(f"\n── document {sample.document}, {len(sample.ids):,} tokens")
        typer.echo(shown)
    for notice in found.notices:
        _notice(notice)


@app.command()
def verify(
    prefix: Prefix,
    vocab_size: Annotated[
        int | None,
        typer.Option("--vocab-size", min=1, help="every id must be below it; default: the side-car's"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Reads every byte of token files and lists everything that is wrong with them. Exit code 1 if anything is.

    Example: megalith data verify corpus_text_document
    """
    from megalith.data.indexed.format import as_prefix, bin_path
    from megalith.data.indexed.verify import verify as run
    from megalith.errors import EXIT_FAILURE

    binary = bin_path(as_prefix(prefix)) if as_prefix(prefix).name else None
    with _progress() as bar:
        task = bar.add_task("verifying", total=binary.stat().st_size if binary and binary.is_file() else None)
        report = run(prefix, vocab_size=vocab_size, progress=lambda count: bar.advance(task, count))
    if as_json:
        _print_json(
            {
                "prefix": str(report.prefix),
                "whole": not report.problems,
                "problems": report.problems,
                "notes": report.notes,
                "items": report.items,
                "documents": report.documents,
                "tokens": report.tokens,
            }
        )
    else:
        count = len(report.problems)
        state = f"{count} problem{'s' * (count != 1)}" if count else "whole"
        typer.echo(f"{report.prefix}: {state}, {report.documents:,} documents, {report.tokens:,} tokens")
        for problem in report.problems:
            typer.echo(f"  {problem}")
        for note in report.notes:
            _notice(note)
    if report.problems:
        raise typer.Exit(EXIT_FAILURE)


def _facts(found: Inspection) -> dict[str, str]:
    """Rows of the header table."""
    values, side_car = found.as_dict(), found.side_car
    rows = {
        "prefix": values["prefix"],
        "layout": f"{values['layout']}, {values['dtype']}" + (", with modes" if values["modes"] else ""),
        "documents": f"{values['documents']:,}",
        "items": f"{values['items']:,}",
        "tokens": f"{values['tokens']:,}",
        "bytes": f"{values['bin_bytes']:,} (.bin) + {values['idx_bytes']:,} (.idx)",
    }
    if found.lengths:
        rows["item lengths"] = ", ".join(f"{name} {value:,}" for name, value in found.lengths.items())
    if side_car is None:
        return {**rows, "side-car": "none"}
    if side_car.tokenizer is not None:
        record = side_car.tokenizer
        rows["tokenizer"] = f"{record.type}, {record.vocab_size:,} entries, hash {record.hash[:16]}…"
    rows["end of document"] = "appended" if side_car.append_eod else "not appended"
    rows["made by"] = side_car.created_by
    if side_car.sources:
        more = f" and {len(side_car.sources) - 3:,} more" if len(side_car.sources) > 3 else ""
        rows["made from"] = ", ".join(side_car.sources[:3]) + more
    return rows


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _notice(text: str) -> None:
    typer.echo(f"note: {text}", err=True)


def _print_rows(rows: dict[str, str]) -> None:
    from megalith.cli.output import print_rows

    print_rows(rows)


def _print_json(value: Any) -> None:
    import json

    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))
