"""`megalith data preprocess`: Megatron's flags over `megalith.data.preprocess`."""

from __future__ import annotations

import gc
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from megalith.data.preprocess.options import Options
    from megalith.data.preprocess.pipeline import Progress
    from megalith.data.preprocess.report import Meter, Summary
    from megalith.data.preprocess.wire import Job

_SEVERAL = ("--input", "--json-keys", "--json-key")


class _Command(TyperCommand):
    """Lets `--input` and `--json-keys` take several values, as Megatron's parser does: `--json-keys text title`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat such a flag before each of its values, then parse as usual."""
        return super().parse_args(ctx, _repeated(args))


def _repeated(args: list[str]) -> list[str]:
    out: list[str] = []
    flag = ""
    for arg, following in zip(args, [*args[1:], "--"], strict=True):
        if not arg.startswith("--"):
            out += [flag, arg] if flag else [arg]
            continue
        flag = arg if arg in _SEVERAL and not following.startswith("--") else ""
        if not flag:
            out.append(arg)
    return out


app = typer.Typer(add_completion=False)


@app.command("preprocess", cls=_Command)
def preprocess(
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input",
            metavar="PATH...",
            help="files, folders or quoted patterns: one JSON object a line (.jsonl, .json), or text (.txt); "
            "plain, .gz or .zst; read in the order given",
        ),
    ],
    output_prefix: Annotated[
        Path, typer.Option(help="writes PREFIX_KEY_document.bin, .idx and .meta.json for each key")
    ],
    json_keys: Annotated[
        list[str] | None,
        typer.Option(
            "--json-keys", "--json-key", metavar="KEY...", help="where a line has its text; default: text"
        ),
    ] = None,
    tokenizer_type: Annotated[
        str | None, typer.Option(help="GPT2BPETokenizer (default), HFTokenizer")
    ] = None,
    vocab_file: Annotated[
        str | None, typer.Option("--vocab-file", "--vocab", help="GPT-2's vocab.json")
    ] = None,
    merge_file: Annotated[str | None, typer.Option(help="GPT-2's merges.txt")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", "--tokenizer-model", help="a tokenizer.json, or a folder with one"),
    ] = None,
    append_eod: Annotated[
        bool, typer.Option("--append-eod", help="end every document with the end-of-document token")
    ] = False,
    workers: Annotated[int, typer.Option(help="processes that tokenize; never changes the output")] = 1,
    dataset_impl: Annotated[
        str, typer.Option(help="layout: mmap; cached or lazy for Megatron's old one")
    ] = "mmap",
    txt_documents: Annotated[
        str,
        typer.Option(
            help="what is one document of a .txt file: file, line, or paragraph (between blank lines)"
        ),
    ] = "file",
    max_rejected: Annotated[
        float, typer.Option(help="share of bad lines above which nothing is published (exit code 1)")
    ] = 0.001,
    max_memory: Annotated[str, typer.Option(help="of all processes together; limits --workers")] = "1G",
    restart: Annotated[
        bool, typer.Option("--restart", help="throw away the finished parts of a stopped run")
    ] = False,
    log_interval: Annotated[int, typer.Option(help="documents between progress lines in a log")] = 1000,
    partitions: Annotated[
        int, typer.Option(help="accepted; the output is one dataset in input order whatever it is")
    ] = 1,
    keep_sequential_samples: Annotated[
        bool, typer.Option("--keep-sequential-samples", help="accepted; the order is always kept")
    ] = False,
    chunk_size: Annotated[int, typer.Option(help="accepted; has no effect")] = 25,
    split_sentences: Annotated[
        bool, typer.Option("--split-sentences", help="not built yet (BERT, T5)")
    ] = False,
    keep_newlines: Annotated[bool, typer.Option("--keep-newlines", help="not built yet (BERT, T5)")] = False,
) -> None:
    """Turns text into token files that training reads, the same bytes as Megatron's tools.

    Bad lines go to PREFIX.rejected.jsonl. A stopped run goes on where it was when it is started again: finished parts
    wait in PREFIX.parts.

    Example: megalith data preprocess --input corpus.jsonl --output-prefix my-gpt2 --vocab-file vocab.json
    --merge-file merges.txt --append-eod --workers 2
    """
    started = time.monotonic()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads would only be forked around
    gc.disable()  # a vocabulary is many small objects and no garbage; workers switch it on again
    from megalith.data.preprocess.options import Options, parse_bytes, refuse_sentences
    from megalith.data.preprocess.run import preprocess as run
    from megalith.tokenizers.names import TokenizerFiles

    refuse_sentences(split_sentences, keep_newlines)
    if partitions > 1:
        _notice(f"--partitions {partitions} changes nothing: --workers says how many processes work")
    files = TokenizerFiles(type=tokenizer_type, vocab_file=vocab_file, merge_file=merge_file, file=tokenizer)
    options = Options(
        inputs=tuple(inputs),
        output_prefix=output_prefix,
        tokenizer=files,
        keys=tuple(json_keys or ("text",)),
        append_eod=append_eod,
        workers=workers,
        implementation=dataset_impl,
        txt_documents=txt_documents,
        max_rejected=max_rejected,
        max_memory=parse_bytes(max_memory, "--max-memory"),
        log_interval=log_interval,
        restart=restart,
    )
    show = _terminal_progress if sys.stderr.isatty() else None
    _report(run(options, notify=_notice, show=show, started=started), options)


def _report(summary: Summary, options: Options) -> None:
    from megalith.data.preprocess.report import describe

    for line in describe(summary):
        typer.echo(line)
    if summary.rejected:
        _notice(f"{summary.rejected:,} bad lines are in {options.rejected}, each with its reason")


def _notice(text: str) -> None:
    typer.echo(f"note: {text}", err=True)


def _terminal_progress(meter: Meter) -> Progress:
    """A bar that appears once a run takes longer than two seconds."""
    return _Bar(meter)


class _Bar:
    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._progress: Any = None
        self._task: Any = None

    def update(self, job: Job, documents: int) -> None:
        self._meter.update(job, documents)
        if self._progress is None:
            if self._meter.seconds < 2:
                return
            self._start()
        speed = f"{self._meter.megabytes_per_second:.0f} MB/s, {documents:,} documents"
        self._progress.update(self._task, completed=self._meter.done, speed=speed)
        if self._meter.done >= self._meter.total:
            self._progress.stop()

    def _start(self) -> None:
        import atexit

        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("tokenizing"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task("", total=self._meter.total, speed="")
        self._progress.start()
        atexit.register(self._progress.stop)
