"""`megalith data preprocess`: Megatron's flags over `megalith.data.preprocess`.

The parser is argparse, as Megatron's is: a flag may take several values and be abbreviated. It also starts 0.1 s before
typer's does, which counts where 200 MB take little more than a second; hence `main.DIRECT` comes here without typer.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from megalith.errors import DataError

if TYPE_CHECKING:
    from megalith.data.preprocess.options import Options
    from megalith.data.preprocess.pipeline import Progress
    from megalith.data.preprocess.report import Meter, Summary
    from megalith.data.preprocess.wire import Job
    from megalith.data.sentences import Sentences

_ABOUT = """Turns text into token files that training reads, the same bytes as Megatron's tools.

Bad lines go to PREFIX.rejected.jsonl. A stopped run goes on where it was when the same command is given again: finished
parts wait in PREFIX.parts."""
_EXAMPLE = """Example:
  megalith data preprocess --input corpus.jsonl --output-prefix my-gpt2 --vocab-file vocab.json \\
      --merge-file merges.txt --append-eod --workers 2
  megalith data preprocess --input corpus.jsonl --output-prefix my-bert --vocab-file vocab.txt \\
      --tokenizer-type BertWordPieceLowerCase --split-sentences --workers 2

Exit codes: 0 published, 1 more bad lines than --max-rejected, 2 something to be mended, 3 stopped by a signal."""

app = typer.Typer(add_completion=False)


@app.command(
    "preprocess",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
)
def preprocess(context: typer.Context) -> None:
    """Turns text into token files."""
    main(context.args)


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are ours: what, where, and the nearest flag."""

    def error(self, message: str) -> NoReturn:
        raise DataError(message, where="megalith data preprocess", fix="--help lists the flags")


def _parser() -> _Parser:
    parser = _Parser(
        prog="megalith data preprocess",
        usage="megalith data preprocess --input PATH... --output-prefix PREFIX [options]",
        description=_ABOUT,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_input(parser.add_argument_group("input"))
    _add_tokenizer(parser.add_argument_group("tokenizer"))
    _add_sentences(parser.add_argument_group("sentences, for BERT and T5"))
    _add_output(parser.add_argument_group("output"))
    _add_running(parser.add_argument_group("running"))
    _add_accepted(parser.add_argument_group("accepted for Megatron's sake"))
    return parser


def _add_input(group: Any) -> None:
    group.add_argument(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        metavar="PATH",
        help="files, folders or quoted patterns: one JSON object a line (.jsonl, .json), or text (.txt); plain, .gz or "
        ".zst; read in the order given",
    )
    group.add_argument(
        "--json-keys",
        "--json-key",
        nargs="+",
        action="extend",
        metavar="KEY",
        help="where a line has its text; each key becomes a pair of files [text]",
    )
    group.add_argument(
        "--txt-documents",
        default="file",
        metavar="UNIT",
        help="what is one document of a .txt file: file, line, or paragraph (between blank lines) [file]",
    )
    group.add_argument(
        "--max-rejected",
        type=float,
        default=0.001,
        metavar="SHARE",
        help="share of bad lines above which nothing is published [0.001]",
    )


def _add_tokenizer(group: Any) -> None:
    group.add_argument(
        "--tokenizer-type",
        metavar="NAME",
        help="as Megatron names them: GPT2BPETokenizer (default), BertWordPieceLowerCase, BertWordPieceCase, "
        "SentencePieceTokenizer, GPTSentencePieceTokenizer, HFTokenizer; or a published name, fetched if need be: "
        "megatron-gpt-345m, megatron-bert-uncased, megatron-bert-cased",
    )
    group.add_argument(
        "--vocab-file", "--vocab", metavar="FILE", help="GPT-2's vocab.json, or BERT's vocab.txt"
    )
    group.add_argument("--merge-file", metavar="FILE", help="GPT-2's merges.txt")
    group.add_argument(
        "--tokenizer",
        "--tokenizer-model",
        metavar="PATH",
        help="a SentencePiece .model, a tokenizer.json, or a folder with one",
    )
    group.add_argument(
        "--vocab-extra-ids",
        type=int,
        default=0,
        metavar="N",
        help="T5's <extra_id_0> to <extra_id_N-1> follow the vocabulary; changes no id of a text [0]",
    )
    group.add_argument(
        "--append-eod", action="store_true", help="end every document with the end-of-document token"
    )


def _add_sentences(group: Any) -> None:
    group.add_argument(
        "--split-sentences", action="store_true", help="make every sentence of a document an item of its own"
    )
    group.add_argument(
        "--keep-newlines",
        action="store_true",
        help="leave the white space behind a sentence with it, rather than dropping it",
    )
    group.add_argument(
        "--lang", default="english", metavar="NAME", help="language of the sentences, or its code [english]"
    )


def _add_output(group: Any) -> None:
    group.add_argument(
        "--output-prefix",
        type=Path,
        required=True,
        metavar="PREFIX",
        help="writes PREFIX_KEY_document.bin, .idx and .meta.json for each key (PREFIX_KEY_sentence with "
        "--split-sentences)",
    )
    group.add_argument(
        "--dataset-impl",
        default="mmap",
        metavar="NAME",
        help="layout: mmap; cached or lazy for Megatron's old one [mmap]",
    )


def _add_running(group: Any) -> None:
    group.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes that tokenize; never changes the output [1]",
    )
    group.add_argument(
        "--max-memory", default="1G", metavar="SIZE", help="of all processes together; limits --workers [1G]"
    )
    group.add_argument(
        "--restart", action="store_true", help="throw away the finished parts of a stopped run"
    )
    group.add_argument(
        "--log-interval",
        type=int,
        default=1000,
        metavar="N",
        help="documents between progress lines in a log [1000]",
    )


def _add_accepted(group: Any) -> None:
    group.add_argument(
        "--partitions",
        type=int,
        default=1,
        metavar="N",
        help="no effect: the output is one dataset in input order",
    )
    group.add_argument(
        "--keep-sequential-samples", action="store_true", help="no effect: the order is always kept"
    )
    group.add_argument("--chunk-size", type=int, metavar="N", help="no effect")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    _check_flags(parser, arguments)
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"{unknown[0]!r} belongs to no flag")
    return given


def _check_flags(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """A misspelt flag, before argparse misses the flag that it should have been."""
    known = list(parser._option_string_actions)
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and not any(name.startswith(flag) for name in known):
            near = get_close_matches(flag, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
            raise DataError("there is no such flag", where=flag, fix=hint)


def main(arguments: Sequence[str]) -> None:
    """Run the command. Errors are `MegalithError`s; help leaves by SystemExit."""
    started = time.monotonic()
    given = _parse(arguments)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads would only be forked around
    gc.disable()  # a vocabulary is many small objects and no garbage; workers switch it on again
    from megalith.cli.hub import fetch_vocabulary
    from megalith.data.preprocess.options import Options, parse_bytes
    from megalith.data.preprocess.run import preprocess as run
    from megalith.tokenizers.names import TokenizerFiles

    if given.partitions > 1:
        _notice(f"--partitions {given.partitions} changes nothing: --workers says how many processes work")
    options = Options(
        inputs=tuple(given.input),
        output_prefix=given.output_prefix,
        tokenizer=TokenizerFiles(
            type=given.tokenizer_type,
            vocab_file=given.vocab_file,
            merge_file=given.merge_file,
            file=given.tokenizer,
            num_sentinel_tokens=_extra_ids(given.vocab_extra_ids),
        ),
        keys=tuple(given.json_keys or ("text",)),
        append_eod=given.append_eod,
        sentences=_sentences(given),
        workers=given.workers,
        implementation=given.dataset_impl,
        txt_documents=given.txt_documents,
        max_rejected=given.max_rejected,
        max_memory=parse_bytes(given.max_memory, "--max-memory"),
        log_interval=given.log_interval,
        restart=given.restart,
    )
    fetch_vocabulary(options.tokenizer)
    with ExitStack() as bars:  # gone before anything else is said, an error too

        def show(meter: Meter) -> Progress:
            bar = _Bar(meter)
            bars.callback(bar.stop)
            return bar

        summary = run(options, notify=_notice, show=show if sys.stderr.isatty() else None, started=started)
    _report(summary, options)


def _sentences(given: argparse.Namespace) -> Sentences | None:
    from megalith.data.sentences import Sentences, language_code

    if given.split_sentences:
        return Sentences(language_code(given.lang), keep_spaces=given.keep_newlines)
    if given.keep_newlines:
        raise DataError(
            "without --split-sentences there is nothing to keep them from",
            where="--keep-newlines",
            fix="add --split-sentences, or leave it out: a whole document keeps every character",
        )
    return None


def _extra_ids(count: int) -> int | None:
    if count < 0:
        raise DataError(f"{count} extra ids", where="--vocab-extra-ids", fix="0 or more; T5 has 100")
    return count or None


def _report(summary: Summary, options: Options) -> None:
    from megalith.data.preprocess.report import describe

    print("\n".join(describe(summary)))
    if summary.rejected:
        _notice(f"{summary.rejected:,} bad lines are in {options.rejected}, each with its reason")


def _notice(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


class _Bar:
    """A bar that appears once a run takes longer than two seconds."""

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

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _start(self) -> None:
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
