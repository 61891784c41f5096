"""Every `megalith` command in the README and in docs/ runs as written, page by page, in one folder a page.

A page's commands see the files that its earlier commands made, and `corpus.jsonl`, a small real corpus. Training runs
are cut short by overrides at their end; nothing else is changed.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from megalith.tools import python_docs

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)
SHORT = {
    "pretrain": ["trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.limit_val_batches=1"],
    "quickstart": None,  # has a test of its own
}


def commands(page: Path) -> list[list[str]]:
    """The `$ megalith …` lines of a page's console blocks, continuation lines joined."""
    found = []
    for block in BLOCK.findall(page.read_text("utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("$ megalith "):
                found.append(shlex.split(line.removeprefix("$ megalith ")))
    return found


def shortened(arguments: list[str]) -> list[str] | None:
    extra = SHORT.get(arguments[0], [])
    return None if extra is None else arguments + extra


def write_corpus(path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for document in islice(python_docs.collect(), 120):
            file.write(json.dumps(document) + "\n")


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda p: p.name)
def test_commands_of_a_page(page, tmp_path):
    write_corpus(tmp_path / "corpus.jsonl")
    for arguments in commands(page):
        arguments = shortened(arguments)
        if arguments is None:
            continue
        run = subprocess.run(
            [sys.executable, "-m", "megalith", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert run.returncode == 0, (
            f"megalith {shlex.join(arguments)}\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"
        )
