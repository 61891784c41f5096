"""Real launchers: each starts two processes that train one step as one run, and get the numbers of a single process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megalith.cli.main import main, without_local_rank
from megalith.topology.spawn import free_port

ROOT = Path(__file__).parents[2]
SCRIPT = str(Path(__file__).with_name("one_step.py"))
OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")
CLEAN = {name: value for name, value in os.environ.items() if name not in OURS}
ENVIRONMENT = {
    **CLEAN,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}",
    "PYTHONWARNINGS": "ignore",
}


def begin(*command, **variables):
    return subprocess.Popen(
        [sys.executable, *command], env={**ENVIRONMENT, **variables}, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def slurm(rank):
    task = {"SLURM_PROCID": rank, "SLURM_NTASKS": 2, "SLURM_LOCALID": rank, "SLURM_STEP_ID": 0}
    place = {"SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_ID": 12345, "MASTER_PORT": slurm.port}
    return {name: str(value) for name, value in {**task, **place}.items()}


@pytest.fixture(scope="module")
def said():
    """What the processes of each launcher wrote; all of them run at the same time."""
    two = ("--nproc-per-node=2", f"--master-port={free_port()}", SCRIPT)
    slurm.port = free_port()
    ours = f"import sys; from megalith.topology.spawn import spawn; sys.exit(spawn(2, [sys.executable, {SCRIPT!r}]))"
    running = {
        "alone": [begin(SCRIPT)],
        "torchrun": [begin("-m", "torch.distributed.run", *two)],
        "launch": [
            begin(
                "-m", "torch.distributed.launch", "--nproc-per-node=2", f"--master-port={free_port()}", SCRIPT
            )
        ],
        "slurm": [begin(SCRIPT, **slurm(0)), begin(SCRIPT, **slurm(1))],
        "spawn": [begin("-c", ours)],
    }
    found = {}
    for name, processes in running.items():
        outputs = [process.communicate(timeout=300) for process in processes]
        assert not any(process.returncode for process in processes), (name, outputs)
        found[name] = "".join(out + err for out, err in outputs)
    return found


def lines(text):
    found = re.findall(r"(\w+) (\d) of (\d): (\S+) (\S+)", text)
    return {(how, int(rank), int(world)): (loss, norm) for how, rank, world, loss, norm in found}


@pytest.mark.parametrize(
    ("name", "how"),
    [("torchrun", "torchrun"), ("launch", "torchrun"), ("slurm", "slurm"), ("spawn", "torchrun")],
)
def test_two_processes_are_one_run(said, name, how):
    alone = lines(said["alone"])["alone", 0, 1]
    assert lines(said[name]) == {(how, 0, 2): alone, (how, 1, 2): alone}


def test_the_first_process_speaks_plainly_and_the_others_say_who_they_are(said):
    first, second = sorted(said["spawn"].splitlines(), key=len)
    assert first.startswith("torchrun 0 of 2")
    assert second.startswith("[rank 1] torchrun 1 of 2")


@pytest.mark.parametrize("word", ["--local-rank=1", "--local_rank=1"])
@pytest.mark.parametrize("command", [["pretrain", "gpt"], ["evaluate", "perplexity"], ["generate"]])
def test_what_the_old_launcher_adds_is_swallowed(command, word, capsys):
    with pytest.raises(SystemExit) as end:
        main([word, *command, "--help"])
    assert end.value.code == 0
    assert "local" not in capsys.readouterr().err


def test_only_the_launchers_words_are_swallowed():
    assert without_local_rank(["pretrain", "--local_rank", "3", "a=1"]) == ["pretrain", "a=1"]
    assert without_local_rank(["pretrain", "--local-rank", "a=1"]) == ["pretrain", "a=1"]
    assert without_local_rank(["data", "--local-rank=3"]) == ["data", "--local-rank=3"]
