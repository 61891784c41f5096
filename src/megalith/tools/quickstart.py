"""The whole road on the text that every Python ships: text, tokenizer, tokens, a GPT, a kill, a resume, numbers, text.

Runs the very commands that it prints, each in a process of its own, so that what a reader sees is what a reader can
type with a text of his own. Knows no model and no data format.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from megalith.errors import EXIT_SUCCESS, DataError, MegalithError
from megalith.tools import python_docs

PROMPTS = ("Return a list of", "The with statement", "Raises ValueError if")


LINE = 110
"""Characters of a line where nobody says how long one may be."""
ENOUGH = 560
"""Training steps after which the model must be better than the n-gram models; shorter walks only look."""


class StepFailed(MegalithError):
    """A command of the quickstart ended with an error; its own message stands above."""


@dataclass(frozen=True)
class Paths:
    """Where everything of one quickstart lies."""

    folder: Path

    @property
    def text(self) -> Path:
        return self.folder / "python_docs.jsonl"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def prefix(self) -> Path:
        return self.folder / "python_docs"

    @property
    def dataset(self) -> Path:
        return self.folder / "python_docs_text_document"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def metrics(self) -> Path:
        return self.run / "metrics.jsonl"


def run(folder: Path, *, steps: int, console: Console | None = None) -> int:
    """Walks the road in `folder` (must not hold another quickstart) with `steps` training steps; returns the exit code."""
    console = console or Console()
    paths = Paths(folder)
    if paths.run.exists():
        raise DataError(
            "an earlier quickstart lies there",
            where=str(folder),
            fix=f"remove it (rm -r {shlex.quote(str(folder))}) or choose another --folder",
        )
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    road = Road(console)
    collect_text(road, paths)
    tokenise(road, paths)
    train(road, paths, steps)
    measure(road, paths, steps)
    minutes = (time.monotonic() - started) / 60
    console.print()
    console.print(Rule(f"[bold green]done in {minutes:.1f} minutes[/]", style="green"))
    console.print(
        f"Everything lies in [bold]{folder}[/]; the commands above work on a text of your own.",
        highlight=False,
    )
    return EXIT_SUCCESS


class Road:
    """Prints numbered headings and runs the commands under them."""

    def __init__(self, console: Console) -> None:
        self.console, self.number = console, 0

    def step(self, title: str, note: str = "") -> None:
        self.number += 1
        self.console.print()
        self.console.print(Rule(f"[bold]{self.number}. {title}[/]", align="left", style="cyan"))
        if note:
            terminal = self.console.is_terminal  # whose lines may be shorter; a file keeps ours
            self.console.print(
                " ".join(note.split()) if terminal else note, highlight=False, soft_wrap=not terminal
            )

    def show(self, arguments: Sequence[str]) -> None:
        width = self.console.width if self.console.is_terminal else LINE
        self.console.print(Text(f"$ {command_line(arguments, width - 2)}", "bold yellow"), soft_wrap=True)
        self.console.file.flush()

    def command(self, arguments: Sequence[str]) -> None:
        """Prints and runs one command; raises `StepFailed` when it does not succeed."""
        self.show(arguments)
        code = subprocess.run(program(arguments), env=environment(), check=False).returncode
        if code != EXIT_SUCCESS:
            raise StepFailed(
                f"`megalith {arguments[0]}` ended with exit code {code}",
                where=f"step {self.number} of the quickstart",
                fix="its own message stands above; `megalith doctor` shows what this machine can do",
            )

    def killed(self, arguments: Sequence[str], ready: Callable[[], bool]) -> bool:
        """Runs a command and kills it without warning (SIGKILL) once `ready`; False when it ended before that."""
        self.show(arguments)
        process = subprocess.Popen(program(arguments), env=environment())
        try:
            while process.poll() is None:
                if ready():
                    os.kill(process.pid, signal.SIGKILL)
                    process.wait()
                    return True
                time.sleep(0.05)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode != EXIT_SUCCESS:
            raise StepFailed(
                f"`megalith {arguments[0]}` ended with exit code {process.returncode}", where="training"
            )
        return False


def program(arguments: Sequence[str]) -> list[str]:
    """The command line of a megalith command under the running interpreter."""
    return [sys.executable, "-m", "megalith", *arguments]


def command_line(arguments: Sequence[str], width: int = LINE) -> str:
    """What to type: a line that is too long goes on in the next one, as a shell reads it; a flag stays with its value."""
    lines, words = ["megalith"], []
    for argument in arguments:
        if words and words[-1].startswith("--") and " " not in words[-1] and not argument.startswith("-"):
            words[-1] += f" {shlex.quote(argument)}"
        else:
            words.append(shlex.quote(argument))
    for word in words:
        if len(lines[-1]) + len(word) + 3 > width and lines[-1].strip():
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {word}"
    return "\n".join(lines)


def environment() -> dict[str, str]:
    """The commands' environment: one thread each unless the user says otherwise.

    Matrices this small gain nothing from a second thread, and on a busy machine lose much: threads wait for each other.
    """
    return {"OMP_NUM_THREADS": "1", **os.environ}


def collect_text(road: Road, paths: Paths) -> None:
    road.step(
        "Text",
        "The running Python's own documentation: docstrings of the standard library, read from its sources\n"
        "without importing them, and the language reference's topics. One JSON object a document.",
    )
    documents, characters = python_docs.write_corpus(paths.text)
    road.console.print(
        f"{paths.text}: {documents} documents, {characters / 1e6:.1f} million characters", highlight=False
    )


def tokenise(road: Road, paths: Paths) -> None:
    road.step("Tokenizer", "A byte-level BPE vocabulary of this text.")
    road.command(
        [
            "tokenizer",
            "train",
            "--input",
            str(paths.text),
            "--vocab-size",
            "1024",
            "--output",
            str(paths.tokenizer),
        ]
    )
    road.step("Tokens", "The text as token ids, in Megatron's .bin/.idx format.")
    road.command(
        [
            "data",
            "preprocess",
            "--input",
            str(paths.text),
            "--output-prefix",
            str(paths.prefix),
            "--tokenizer-model",
            str(paths.tokenizer / "tokenizer.json"),
            "--append-eod",
            "--workers",
            "2",
        ]
    )


def train(road: Road, paths: Paths, steps: int) -> None:
    arguments = ["pretrain", "gpt", "--config-name", "gpt_quickstart"]
    arguments += [
        f"model.data.data_prefix=[{paths.dataset}]",
        f"model.tokenizer.file={paths.tokenizer}",
    ]
    arguments += [f"exp_manager.explicit_log_dir={paths.run}", f"trainer.max_steps={steps}"]
    half = steps // 2
    road.step("Pretraining", f"A small GPT. It will be killed (SIGKILL, no warning) soon after step {half}.")
    if road.killed(arguments, lambda: last_step(paths.metrics) >= half):
        road.console.print(f"[bold red]killed[/] after step {last_step(paths.metrics)}", highlight=False)
        road.step(
            "Resume",
            "The same command again: it goes on from the newest verified checkpoint, losing no sample.",
        )
        road.command(arguments)


def measure(road: Road, paths: Paths, steps: int) -> None:
    road.step(
        "Perplexity", "On the held-out documents: the model, the model before training, and n-gram models."
    )
    check = ["--check"] if steps >= ENOUGH else []
    road.command(["evaluate", "perplexity", "--checkpoint", str(paths.run), "--baselines", *check])
    road.step(
        "Text",
        "What it writes. A model of this size and age has learnt the look of documentation, not its sense.",
    )
    for prompt in PROMPTS:
        road.command(
            [
                "generate",
                "--checkpoint",
                str(paths.run),
                "--prompt",
                prompt,
                "--tokens-to-generate",
                "48",
                "--temperature",
                "0.7",
                "--top-p",
                "0.9",
                "--seed",
                "1",
            ]
        )


def last_step(metrics: Path) -> int:
    """The newest step in `metrics.jsonl`; 0 when there is none yet or its last line is not whole."""
    try:
        lines = metrics.read_text("utf-8").splitlines()
        return max((json.loads(line).get("step", 0) for line in lines[-3:]), default=0)
    except (OSError, ValueError):
        return 0
