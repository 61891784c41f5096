"""`megalith evaluate`: what a checkpoint is worth, in numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Measure a checkpoint on held-out text.")


@app.callback()
def evaluate() -> None:
    """Measure a checkpoint on held-out text."""


@app.command()
def perplexity(
    checkpoint: Annotated[str, typer.Option(help="run or step folder")],
    split: Annotated[
        str, typer.Option(help="of the run's own data: validation, test or train")
    ] = "validation",
    data: Annotated[str | None, typer.Option(help="token files instead (PREFIX of .bin and .idx)")] = None,
    text_file: Annotated[str | None, typer.Option(help="a UTF-8 text instead")] = None,
    seq_length: Annotated[
        int | None, typer.Option(min=1, help="window; default: the length trained on")
    ] = None,
    overlapping_eval: Annotated[
        int | None, typer.Option(min=1, help="new targets of each later window; default: no overlap")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "--micro-batch-size", min=1)] = 8,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="score only the first so many tokens")] = None,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines", help="also the untrained model, unigrams and bigrams of the training split"
        ),
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="exit 1 unless the model is below every baseline")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the numbers to this file")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, 32, bf16-mixed, 64")] = "auto",
) -> None:
    """Perplexity on held-out tokens, every target counted once.

    Example: megalith evaluate perplexity --checkpoint quickstart/run --baselines
    """
    import json

    from rich.console import Console

    from megalith.errors import EXIT_FAILURE, ConfigError, Problem
    from megalith.evaluate.perplexity import Request, evaluate
    from megalith.generate.loading import load_model

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
    loaded = load_model(checkpoint, device=device, precision=precision)
    report = evaluate(loaded, request)
    Console().print(perplexity_table(report))
    if json_file:
        json_file.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    if check and not report.beats_baselines:
        raise typer.Exit(EXIT_FAILURE)


def perplexity_table(report):
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
    table.add_row(
        f"step {report.step}", f"{report.perplexity:.2f}", f"{report.loss:.4f}", bits, style="bold green"
    )

    for name in ("bigram", "unigram", "untrained"):
        value = getattr(report, f"{name}_perplexity")
        if value is not None:
            table.add_row(name, f"{value:.2f}", f"{math.log(value):.4f}", "")
    return table
