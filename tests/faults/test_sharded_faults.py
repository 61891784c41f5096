"""One of several saving processes is killed: the others say so instead of waiting, and nothing that was saved is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def memory_folder(tmp_path):
    """A folder that fsync costs nothing in, where there is one."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared, prefix="megalith-crashes-") as folder:
        yield Path(folder)


def run(folder: Path, *arguments: str) -> dict:
    script = Path(__file__).with_name("sharded_crashes.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *arguments, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(("rank", "every", "least"), [(0, 9, 6), (1, 3, 3)])
def test_killed_while_saving_with_others(memory_folder, rank, every, least, mode):
    result = run(memory_folder, "kill", str(rank), str(every), mode)
    assert result["crashes"] >= least
    assert set(result["found"]) == {"2", "3"}, "crashes before and after the publication were among them"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_at_every_change_of_the_disk(memory_folder, rank, mode):
    result = run(memory_folder, "kill", str(rank), "1", mode)
    assert set(result["found"]) == {"2", "3"}


def test_processes_end_after_the_save(memory_folder):
    assert run(memory_folder, "end") == {"step": 1}
