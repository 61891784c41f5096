"""`megalith parity`: exit codes, one message for all problems, and processes that always end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from megalith.cli.main import main
from megalith.testing import pool as pools
from megalith.testing.parity import KINDS, Difference
from megalith.testing.pool import RankFailure
from megalith.tools import parity

TENSOR = "model.tensor_model_parallel_size=2"


class Pool:
    """Starts nothing."""

    closed = 0

    def __init__(self, size: int, **_: object) -> None: ...

    def start(self, ranks: int) -> None: ...

    def close(self) -> None:
        Pool.closed += 1


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """A function: arguments → exit code, out, err. The ranks' answer is `found`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pools, "RankPool", Pool)
    monkeypatch.setattr(parity, "write_reference", lambda case, path: None)
    Pool.closed = 0

    def go(*arguments: str, found=()) -> tuple[int, str, str]:
        def compare(*_: object, **__: object):
            if isinstance(found, BaseException):
                raise found
            return [*(Difference(f"{kind} x 0", 1e-16) for kind in KINDS), *found]

        monkeypatch.setattr(parity, "compare", compare)
        with pytest.raises(SystemExit) as left:
            main(["parity", *arguments])
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return go


def test_agreement(run, tmp_path):
    code, out, err = run(TENSOR, "--json", "out/parity.json")
    assert (code, Pool.closed) == (0, 1)
    assert "tensor 2 against one process" in out
    assert "model.hidden_size 768 16" in " ".join(out.split())
    assert "greedy tokens" in out
    assert "The same: 2 processes compute what one computes" in out
    assert "running 2 processes" in err
    assert json.loads((tmp_path / "out/parity.json").read_text())["agrees"] is True


def test_a_difference(run, tmp_path):
    wrong = Difference("gradient blocks.1.norm_mlp.weight", 0.25, None)
    code, out, err = run(TENSOR, "model.sequence_parallel=true", "--json", "parity.json", found=[wrong])
    assert (code, Pool.closed) == (1, 1)
    assert "gradients 2 2.5e-01 blocks.1.norm_mlp.weight differs" in " ".join(out.split())
    assert "The same" not in out
    assert "first gradient blocks.1.norm_mlp.weight by 2.5e-01" in err
    assert "probably sequence parallelism" in err
    report = json.loads((tmp_path / "parity.json").read_text())
    assert report["first"] == {"name": "gradient blocks.1.norm_mlp.weight", "relative": 0.25}
    assert report["cause"]["name"] == "sequence"


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("bert", "model.num_layers 12 2"),
        ("t5", "model.data.seq_length_dec 128 8"),
        ("bart", "decoder_num_layers 12 2"),
    ],
)
def test_other_families(run, family, said):
    code, out, _ = run(TENSOR, "--config-name", f"megatron_{family}_config")
    assert (code, Pool.closed) == (0, 1)
    assert said in " ".join(out.split())


def test_ranks_that_fail(run):
    code, _, err = run(TENSOR, found=RankFailure({1: "Traceback\nValueError: 3 is not 4"}))
    assert (code, Pool.closed) == (1, 1)
    assert "✗ tensor 2 does not run: rank 1: ValueError: 3 is not 4" in err


def test_ranks_that_refuse(run):
    refusal = (
        "Traceback\nmegalith.errors.UnsupportedError: first backward: no gradient reached x\n  fix: use it"
    )
    code, _, err = run(TENSOR, found=RankFailure({0: refusal}))
    assert (code, Pool.closed) == (2, 1)
    assert "no gradient reached x\n    → use it" in err


def test_ctrl_c_closes_the_pool(run):
    code, _, err = run(TENSOR, found=KeyboardInterrupt())
    assert (code, Pool.closed) == (130, 1)
    assert "Interrupted" in err


def test_one_process_and_wrong_layouts(run):
    code, out, err = run()
    assert (code, out, Pool.closed) == (2, "", 0)
    assert "is one process, so there is nothing to compare it with" in err
    code, _, err = run(
        "model.tensor_model_parallel_size=5", "model.pipeline_model_parallel_size=16", "model.hiden_size=3"
    )
    assert code == 2
    assert "5 does not divide heads 12" in err
    assert "16 stages for 12 layers" in err
    assert "model.hiden_size" in err
    assert "data_prefix" not in err


def test_what_has_no_effect_on_the_layout_is_told(run):
    _, _, err = run(
        "model.pipeline_model_parallel_size=2", "model.sequence_parallel=true", "model.zero_shard_size=2"
    )
    assert "! model.sequence_parallel: has no effect" in err
    assert "! model.zero_shard_size: has no effect" in err


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_an_interrupt_leaves_no_process(tmp_path):
    """As a terminal does: the signal goes to the command and to its ranks alike."""
    command = [sys.executable, "-m", "megalith", "parity", TENSOR, "model.zero_stage=3"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=tmp_path,
    )
    for line in process.stderr:
        if "running 4 processes" in line:
            break
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "Interrupted."
    deadline = time.monotonic() + 10
    while members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not members(process.pid)


def members(group: int) -> list[str]:
    """Processes of a group that still run."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                state, _, leader = file.read().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(leader) == group and state != "Z":
            found.append(name)
    return found
