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


@pytest.mark.parametrize(
    ("rank", "every"),
    [(0, 11), (1, 4), *(pytest.param(rank, 1, marks=pytest.mark.slow) for rank in (0, 1))],
)
def test_killed_while_saving_with_others(memory_folder, rank, every):
    """The first process's crashes and another's, of saves that training waits for and of those that it does not."""
    for way, result in run(memory_folder, "kill", str(rank), str(every)).items():
        assert result["crashes"] >= 2, way
        assert set(result["found"]) == {"2", "3"}, "crashes before and after the publication were among them"


def test_processes_end_after_the_save(memory_folder):
    assert run(memory_folder, "end") == {"step": 1}
