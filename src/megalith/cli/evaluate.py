"""`megalith evaluate`: what a checkpoint is worth, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megalith.cli.options import (
    BatchSize,
    Checkpoint,
    ConfigFile,
    Device,
    JsonFile,
    PrecisionName,
    TokenizerPath,
)
from megalith.cli.reading import Keys, begin, load, progress, reading

if TYPE_CHECKING:
    from megalith.evaluate import lambada as lambada_task
    from megalith.evaluate import wikitext as wikitext_task
    from megalith.evaluate.perplexity import Report

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Measure a checkpoint on held-out text.",
)

DataFile = Annotated[str, typer.Option("--data", "--valid-data", help="the benchmark's file")]
SeqLength = Annotated[int | None, typer.Option(min=1, help="window; default: the length trained on")]
Overlap = Annotated[
    int | None, typer.Option(min=1, help="new targets of each later window; default: no overlap")
]
WikiOverlap = Annotated[int | None, typer.Option(min=1, help="new targets of each later window [32]")]
Split = Annotated[str, typer.Option(help="of the run's own data: validation, test or train")]
TokenFiles = Annotated[str | None, typer.Option(help="token files instead (PREFIX of .bin and .idx)")]
TextFile = Annotated[str | None, typer.Option(help="a UTF-8 text instead")]
MaxTokens = Annotated[int | None, typer.Option(min=2, help="score only the first so many tokens")]
Baselines = Annotated[
    bool,
    typer.Option("--baselines", help="also the untrained model, unigrams and bigrams of the training split"),
]
Check = Annotated[bool, typer.Option("--check", help="exit 1 unless the model is below every baseline")]
Detokenizer = Annotated[
    str, typer.Option(help="wiki, ptb, ptb-fixed, lambada, none; auto: by ptb, wiki or lambada in the path")
]
Strict = Annotated[
    bool, typer.Option("--strict-lambada", help="the last word, all its tokens, instead of the last token")
]


@app.callback()
def evaluate() -> None:
    """Measure a checkpoint on held-out text."""


@app.command()
def perplexity(
    checkpoint: Checkpoint,
    split: Split = "validation",
    data: TokenFiles = None,
    text_file: TextFile = None,
    seq_length: SeqLength = None,
    overlapping_eval: Overlap = None,
    batch_size: BatchSize = 8,
    max_tokens: MaxTokens = None,
    baselines: Baselines = False,
    check: Check = False,
    json_file: JsonFile = None,
    tokenizer: TokenizerPath = None,
    config_file: ConfigFile = None,
    device: Device = "auto",
    precision: PrecisionName = "auto",
    keys: Keys = None,
) -> None:
    """Perplexity on held-out tokens, every target counted once.

    Example: megalith evaluate perplexity --checkpoint quickstart/run --baselines
    """
    from rich.console import Console

    from megalith.cli.errors import show_failure
    from megalith.errors import EXIT_FAILURE, ConfigError, Problem
    from megalith.evaluate.perplexity import Request, evaluate

    if data and text_file:
        raise ConfigError([Problem("--data, --text-file", "both are given", "keep one")])
    request = Request(
        split=split,
        data=data,
        text_file=text_file,
        seq_length=seq_length,
        overlapping_eval=overlapping_eval,
        batch_size=batch_size,
        max_tokens=max_tokens,
        baselines=baselines or check,
    )
    layout = begin(keys, device=device, precision=precision)
    with reading(layout) as crew, progress(crew, "windows") as report_progress:
        loaded = load(checkpoint, layout, crew, tokenizer=tokenizer, config_file=config_file)
        report = evaluate(loaded, request, report_progress)
        speaks = crew.is_main
    if not speaks:
        return
    Console().print(perplexity_table(report))
    write_json(json_file, report.to_json())
    if check and not report.beats_baselines:
        show_failure(f"--check: step {report.step} is not below every baseline")
        raise typer.Exit(EXIT_FAILURE)


@app.command()
def wikitext(
    checkpoint: Checkpoint,
    data: DataFile,
    detokenizer: Detokenizer = "auto",
    seq_length: SeqLength = None,
    overlapping_eval: WikiOverlap = None,
    batch_size: BatchSize = 8,
    json_file: JsonFile = None,
    tokenizer: TokenizerPath = None,
    config_file: ConfigFile = None,
    device: Device = "auto",
    precision: PrecisionName = "auto",
    keys: Keys = None,
) -> None:
    """WikiText-103: perplexity a token, and a word of the original text (the adjusted one, which papers quote).

    Example: megalith evaluate wikitext --checkpoint run --data wikitext-103/wiki.test.tokens
    """
    from megalith.evaluate.wikitext import Request, evaluate

    request = Request(data, detokenizer, seq_length, overlapping_eval, batch_size)
    layout = begin(keys, device=device, precision=precision)
    with reading(layout) as crew, progress(crew, "windows") as report_progress:
        loaded = load(checkpoint, layout, crew, tokenizer=tokenizer, config_file=config_file)
        report = evaluate(loaded, request, report_progress)
        speaks = crew.is_main
    if not speaks:
        return
    show(wikitext_rows(report), report.line)
    write_json(json_file, report.to_json())


@app.command()
def lambada(
    checkpoint: Checkpoint,
    data: DataFile,
    strict_lambada: Strict = False,
    seq_length: SeqLength = None,
    batch_size: BatchSize = 8,
    json_file: JsonFile = None,
    tokenizer: TokenizerPath = None,
    config_file: ConfigFile = None,
    device: Device = "auto",
    precision: PrecisionName = "auto",
    keys: Keys = None,
) -> None:
    """LAMBADA: how often the last word of a passage is the model's own guess. Papers quote --strict-lambada.

    Example: megalith evaluate lambada --checkpoint run --data lambada_test.jsonl --strict-lambada
    """
    from megalith.evaluate.lambada import Request, evaluate

    request = Request(data, strict_lambada, seq_length, batch_size)
    layout = begin(keys, device=device, precision=precision)
    with reading(layout) as crew, progress(crew, "passages") as report_progress:
        loaded = load(checkpoint, layout, crew, tokenizer=tokenizer, config_file=config_file)
        report = evaluate(loaded, request, report_progress)
        speaks = crew.is_main
    if not speaks:
        return
    show(lambada_rows(report), report.line)
    write_json(json_file, report.to_json())


def show(rows: Mapping[str, str], line: str) -> None:
    """The numbers by name, and the reference's line between its rules."""
    from megalith.cli.output import print_rows

    print_rows(rows)
    rule = "-" * (len(line) + 1)
    typer.echo(f"{rule}\n{line}\n{rule}\ndone :-)")


def write_json(file: Path | None, numbers: Mapping[str, Any]) -> None:
    """Errors: `DataError` when the file cannot be written."""
    import json

    from megalith.errors import DataError

    if file is None:
        return
    try:
        file.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        fix = "the numbers stand above; name another file"
        raise DataError(f"cannot be written ({error.strerror})", where=str(file), fix=fix) from None


def wikitext_rows(report: wikitext_task.Report) -> dict[str, str]:
    """What a person reads."""
    return {
        "model": f"step {report.step}",
        "text": f"{report.source}, detokenizer {report.detokenizer}",
        "words, tokens": f"{report.original_tokens:,}, {report.tokens:,} (ratio {report.token_ratio:.4f})",
        "windows": f"{report.seq_length} tokens, {report.overlapping_eval} new ones each",
        "nats a token": f"{report.loss:.4f}",
        "perplexity": f"{report.perplexity:.2f} a token, {report.adjusted_perplexity:.2f} a word (adjusted)",
        "bits a byte": f"{report.bits_per_byte:.3f}",
    }


def lambada_rows(report: lambada_task.Report) -> dict[str, str]:
    """What a person reads."""
    rows = {
        "model": f"step {report.step}",
        "passages": f"{report.source}, {report.examples:,}",
        "label": "the last word (strict)" if report.strict else "the last token (loose)",
        "right": f"{report.correct:,} ({report.accuracy:.2%})",
        "perplexity": f"{report.perplexity:.2f} a label",
    }
    if report.cut:
        rows["cut short"] = f"{report.cut:,}: longer than the model reads, so without their beginnings"
    return rows


def perplexity_table(report: Report) -> Any:
    """One row a model, the checkpoint first."""
    import math

    from rich.table import Table

    table = Table(
        title=f"{report.source}: {report.tokens:,} tokens, windows of {report.seq_length}",
        title_justify="left",
    )
    table.add_column("model")
    table.add_column("perplexity", justify="right")
    table.add_column("nats a token", justify="right")
    table.add_column("bits a byte", justify="right")
    bits = f"{report.bits_per_byte:.3f}" if report.bits_per_byte is not None else ""
    known = report.bigram_perplexity is not None or report.untrained_perplexity is not None
    style = "bold" if not known else "bold green" if report.beats_baselines else "bold red"
    table.add_row(f"step {report.step}", f"{report.perplexity:.2f}", f"{report.loss:.4f}", bits, style=style)
    for name in ("bigram", "unigram", "untrained"):
        value = getattr(report, f"{name}_perplexity")
        if value is not None:
            table.add_row(name, f"{value:.2f}", f"{math.log(value):.4f}", "")
    return table
