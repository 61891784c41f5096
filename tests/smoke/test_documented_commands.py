"""The README and every page of docs/ run as written: commands and Python, in the page's order, in one folder a page.

    ```yaml      with a first line `# NAME.yaml`: written to that file
    ```console   each line `$ megalith …`
    ```python    blocks with no other block between them are one script, as the cells of a notebook

`corpus.jsonl`, a small real corpus, lies in the folder from the start. A run of more than 50 steps is cut to 4, unless its
length stands in a YAML of the page; nothing else is changed. Each command and script has a process of its own, forked
from one that has imported everything: that takes milliseconds, importing torch and Lightning takes seconds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pytest

from megalith.cli.main import main
from megalith.tools import python_docs

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(console|python|yaml)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
SHORT = ["trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.limit_val_batches=1"]
LONGEST, TIMEOUT = 50, 300
RUNS = ("pretrain", "tune", "prompt-tune", "finetune")
"""Commands that train."""
HAVE_A_TEST = ("quickstart",)
"""Commands that a test of their own runs."""
PRELOAD = [
    "megalith.tasks.pretrain",
    "megalith.tasks.show_batch",
    "megalith.tasks.tuning",
    "megalith.evaluate.perplexity",
    "megalith.parallel.pipeline",
    "megalith.cli.pretrain",
]


@dataclass(frozen=True)
class Part:
    """What a block holds: a file to write, a command, or a script, with the line of the page where it begins."""

    kind: str
    text: str
    line: int


def blocks(page: Path) -> Iterator[Part]:
    text = page.read_text("utf-8")
    for found in BLOCK.finditer(text):
        yield Part(found[1], found[2], text.count("\n", 0, found.start(2)) + 1)


def parts(page: Path) -> Iterator[Part]:
    """Files, commands and scripts of a page in its order."""
    for kind, group in groupby(blocks(page), key=lambda block: block.kind):
        if kind == "python":
            script = ""
            for block in group:  # empty lines between, so that tracebacks name the page's lines
                script += "\n" * (block.line - 1 - script.count("\n")) + block.text
            yield Part("python", script, 1)
            continue
        for block in group:
            yield from commands(block) if kind == "console" else files(block)


def commands(block: Part) -> Iterator[Part]:
    """The `$ megalith …` lines, continuation lines joined."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.startswith("$ megalith "):
            yield Part("console", line.removeprefix("$ megalith "), block.line)


def files(block: Part) -> Iterator[Part]:
    if re.match(r"# \w+\.yaml\b", block.text):
        yield block


def shortened(arguments: list[str]) -> list[str]:
    """`arguments`, with a run cut short, unless the page itself says how short: on the command line, or in a file."""
    only_looks = {"--print-config", "--derived", "--show-batch"} & set(arguments)
    if arguments[0] not in RUNS or only_looks:
        return arguments
    steps = [int(word.partition("=")[2]) for word in arguments if word.startswith("trainer.max_steps=")]
    short = bool(steps) and steps[-1] <= LONGEST
    return arguments if short or "--config" in arguments else arguments + SHORT


# ---- one process a part ----


def in_folder(folder: str, log: str, work: Callable[[Any], None], what: Any) -> None:
    """In the new process: write to `log` alone, and work in `folder`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.chdir(folder)
    work(what)


def run_command(arguments: list[str]) -> None:
    sys.argv = ["megalith", *arguments]
    main(arguments)


def run_script(text: str) -> None:
    exec(compile(text, "the page", "exec"), {"__name__": "__main__"})


@pytest.fixture(scope="module")
def start():
    """A function: folder, work, what → (exit code, everything that was printed)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)

    def run(folder: Path, work: Callable[[Any], None], what: Any) -> tuple[int | None, str]:
        log = folder.with_suffix(".log")
        process = context.Process(target=in_folder, args=(str(folder), str(log), work, what))
        process.start()
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
            process.join()
        return process.exitcode, log.read_text("utf-8", errors="replace")

    return run


def write_corpus(path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for document in islice(python_docs.collect(), 120):
            file.write(json.dumps(document) + "\n")


@pytest.mark.parametrize("page", [p for p in PAGES if any(parts(p))], ids=lambda p: p.name)
def test_a_page_runs_as_written(page: Path, tmp_path: Path, start):
    folder = tmp_path / "page"
    folder.mkdir()
    write_corpus(folder / "corpus.jsonl")
    for part in parts(page):
        where = f"{page.name}:{part.line}"
        if part.kind == "yaml":
            name = part.text.split()[1].rstrip(":")
            (folder / name).write_text(part.text, "utf-8")
            continue
        if part.kind == "python":
            code, output = start(folder, run_script, part.text)
            assert code == 0, f"{where}: the Python of this page\n{output[-6000:]}"
            continue
        arguments = shortened(shlex.split(part.text))
        if arguments[0] not in HAVE_A_TEST:
            code, output = start(folder, run_command, arguments)
            assert code == 0, f"{where}: megalith {shlex.join(arguments)}\n{output[-6000:]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_of_a_page_lead_somewhere(page: Path):
    missing = [link for link in LINK.findall(page.read_text("utf-8")) if not (page.parent / link).exists()]
    assert not missing
