"""What the environment says about the launcher: every form is read alike, and what does not fit is named."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megalith.errors import TopologyError
from megalith.topology.environment import Launched, environment, hosts

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29501",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "gpu[07-08,11],cpu5",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
}


def test_alone():
    assert environment({}) is None


def test_torchrun():
    assert environment(TORCHRUN) == Launched(5, 8, 1, "node1", 29501, "torchrun")


def test_one_process_needs_no_address():
    found = environment({"RANK": "0", "WORLD_SIZE": "1"})
    assert (found.rank, found.world, found.local_rank) == (0, 1, 0)


def test_slurm():
    found = environment(SLURM)
    assert found == Launched(5, 8, 1, "gpu07", 12000 + 47110 % 20000, "slurm")


def test_steps_of_one_slurm_job_get_different_ports_and_their_own_hosts():
    step = {**SLURM, "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NODELIST": "gpu08"}
    found = environment(step)
    assert (found.world, found.host) == (6, "gpu08")
    assert found.port != environment(SLURM).port


def test_an_address_that_somebody_chose_wins():
    found = environment({**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5000"})
    assert (found.host, found.port) == ("10.0.0.1", 5000)


def test_the_script_of_a_batch_job_is_one_process():
    assert environment({k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"}) is None


def test_torchrun_inside_slurm_wins():
    assert environment({**SLURM, **TORCHRUN}).launcher == "torchrun"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"WORLD_SIZE": None}, "WORLD_SIZE"),
        ({"RANK": None}, "RANK"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR"),
        ({"MASTER_PORT": None}, "MASTER_PORT"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT"),
        ({"RANK": "8"}, "RANK=8 does not fit WORLD_SIZE=8"),
        ({"RANK": "-1"}, "RANK"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4 does not fit LOCAL_WORLD_SIZE=4"),
    ],
)
def test_what_does_not_fit_is_named(change, named):
    variables = {name: value for name, value in {**TORCHRUN, **change}.items() if value is not None}
    with pytest.raises(TopologyError, match=named):
        environment(variables)


@pytest.mark.parametrize("missing", ["SLURM_LOCALID", "SLURM_NTASKS", "SLURM_JOB_NODELIST"])
def test_what_slurm_did_not_set_is_named(missing):
    with pytest.raises(TopologyError, match=missing):
        environment({name: value for name, value in SLURM.items() if name != missing})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("node1", ["node1"]),
        ("gpu[01-03,07],cpu5", ["gpu01", "gpu02", "gpu03", "gpu07", "cpu5"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("r[1-2]c[3,5]-ib", ["r1c3-ib", "r1c5-ib", "r2c3-ib", "r2c5-ib"]),
        ("a,b-1.cluster", ["a", "b-1.cluster"]),
    ],
)
def test_node_lists(text, expected):
    assert hosts(text) == expected


@pytest.mark.parametrize("text", ["", "gpu[1-", "gpu[a-b]", "gpu]1["])
def test_node_lists_that_are_none(text):
    with pytest.raises(TopologyError, match="SLURM_JOB_NODELIST"):
        hosts(text)


def test_reading_it_and_starting_processes_import_no_torch():
    code = (
        "import sys, megalith.topology.environment, megalith.topology.spawn; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
