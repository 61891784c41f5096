"""A process that dies, hangs or leaves out a call: in time all of the run end, and say who waited for what, and where."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megalith.errors import EXIT_FAILURE, EXIT_LOST, EXIT_USER_ERROR

ROOT = Path(__file__).parents[2]
TIMEOUT, MORE = 4.0, 10.0
NAMES = (
    "all_reduce",
    "all_gather",
    "receive",
    "receive_of_4",
    "killed",
    "own_error",
    "user_error",
    "killed_writing",
)


class Run:
    """What became of one run: exit codes and when, and stderr, by rank; when the fault was."""

    def __init__(self, folder, name, results):
        self.codes = [code for code, _ in results[name]]
        self.errors = [(folder / f"{name}-{rank}.err").read_text() for rank in range(len(self.codes))]
        self.steps = [(folder / f"{name}-{rank}.out").read_text().split() for rank in range(len(self.codes))]
        marks = [
            line.split()[1] for text in self.errors for line in text.splitlines() if line.startswith("FAULT")
        ]
        self.lasted = max(end for _, end in results[name]) - max(map(float, marks), default=0.0)
        self.marks = len(marks)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All faults at the same time: they mostly wait."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
    command = [sys.executable, "-m", "tests.faults.ranks_zygote", str(folder), str(TIMEOUT), *NAMES]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=300)
    results = json.loads((folder / "results.json").read_text())
    return {name: Run(folder, name, results) for name in NAMES}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "user_error"])
def test_all_end_in_time(runs, name):
    run = runs[name]
    assert run.marks == 1, "the fault did not happen"
    assert run.lasted <= TIMEOUT + MORE
    assert all(run.codes)
    assert all(steps == ["0", "1"] for steps in run.steps), "two steps went well before"


def test_a_call_left_out_of_our_all_reduce(runs):
    assert runs["all_reduce"].codes[0] == EXIT_LOST
    assert "rank 0 (tensor 0): all_reduce in blocks.3.mlp.down" in runs["all_reduce"].errors[0]


def test_a_rank_that_does_not_come_to_the_gather_of_weights(runs):
    waiting, sleeping = runs["all_gather"].errors
    assert runs["all_gather"].codes == [EXIT_LOST, EXIT_LOST]
    assert (
        "rank 0 (shard 0): the all_gather of weights (FSDP2) in blocks.2 did not finish within 4 s" in waiting
    )
    assert "rank 1 (shard 1): was in sleep_for_ever" in sleeping
    assert "in blocks.2 when rank 0 failed" in sleeping


def test_a_receive_left_out_of_the_pipeline(runs):
    first, second = runs["receive"].errors
    assert runs["receive"].codes == [EXIT_LOST, EXIT_LOST]
    assert "rank 0 (pipeline 0): the receive of gradients in the stage of blocks 0 to 1" in first
    assert "rank 1 (pipeline 1): a send to another stage in the stage of blocks 2 to 3" in second
    assert "did not finish within 4 s" in first + second


def test_a_receive_left_out_where_there_are_data_ranks_too(runs):
    run = runs["receive_of_4"]
    assert run.codes == [EXIT_LOST] * 4
    assert "rank 1 (replicate 1, pipeline 0): " in run.errors[1]
    assert "the receive of gradients in the stage of blocks 0 to 1" in run.errors[1]
    assert "rank 3 (replicate 1, pipeline 1): " in run.errors[3]
    assert "a send to another stage in the stage of blocks 2 to 3" in run.errors[3]


def test_a_killed_rank(runs):
    run = runs["killed"]
    assert run.codes == [EXIT_LOST, -signal.SIGKILL]
    assert "rank 0 (tensor 0): all_reduce in blocks.2.attention.out lost its connection" in run.errors[0]
    assert "rank 1 said nothing: gone, or hanging" in run.errors[0]


def test_a_killed_stage_of_a_model_that_writes(runs):
    run = runs["killed_writing"]
    assert run.codes == [EXIT_LOST, -signal.SIGKILL]
    lost = [
        line for line in run.errors[0].splitlines() if "lost its connection: another rank is gone" in line
    ]
    assert len(lost) == 1
    assert lost[0].startswith("rank 0 (pipeline 0): ")
    assert "Traceback" not in run.errors[0]


def test_an_error_of_one_rank_comes_before_what_follows_from_it(runs):
    waiting, failing = runs["own_error"].errors
    assert runs["own_error"].codes == [EXIT_LOST, EXIT_FAILURE]
    said = [line for line in failing.splitlines() if not line.startswith("FAULT")]
    assert said[0] == "rank 1 (shard 1): ValueError: a mistake of ours"
    assert "when rank 1 failed" in waiting
    assert runs["own_error"].lasted < TIMEOUT, "nobody sat out the timeout"


def test_a_mistake_that_all_ranks_make_is_said_once(runs):
    first, second = runs["user_error"].errors
    assert runs["user_error"].codes == [EXIT_FAILURE, EXIT_USER_ERROR]
    assert first.count("DataError: corpus.bin: a file is missing") == 1
    assert second == ""
