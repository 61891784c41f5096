"""Training on two machines with torchrun: the losses of one process, and the same curve whatever dies, leaves or comes back."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tasks.nano import losses, make_corpus, overrides, pretrain, rows

from .hosts import Hosts, why_not

STEPS, TIMEOUT = 24, 12
EXACT = ("trainer.precision=64", "model.micro_batch_size=1", "trainer.val_check_interval=null")
SAVING = (
    "exp_manager.checkpoint_callback_params.every_n_train_steps=4",
    "exp_manager.checkpoint_callback_params.monitor=null",
)
TP2 = ("model.tensor_model_parallel_size=2",)
PP2 = ("model.pipeline_model_parallel_size=2",)
BOTH, ELASTIC = ("--nnodes=2", "--max-restarts=3"), ("--nnodes=1:2", "--max-restarts=3")
REPLACEABLE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Without it an agent that joins after a restart waits for an address that agents of the first hour do not repeat."""
QUICK = "--rdzv-conf=last_call_timeout=3,keep_alive_interval=2,keep_alive_max_attempt=6"


@pytest.fixture(scope="module", autouse=True)
def permitted():
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """The losses of a run that one process made without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    pretrain(corpus, folder, *EXACT, steps=STEPS)
    return losses(folder)


class Job:
    """One run on two hosts: its agents, what they said, and its folder."""

    def __init__(self, hosts: Hosts, corpus: Path, folder: Path) -> None:
        self.hosts, self.corpus, self.folder = hosts, corpus, folder
        self.agents: dict = {}

    def begin(
        self,
        names: str,
        *words: str,
        options: tuple[str, ...] = BOTH,
        steps: int = STEPS,
        each: int = 2,
        private=(),
        **variables: str,
    ) -> None:
        """Start the agents of these hosts, with `each` processes."""
        command = overrides(self.corpus, self.folder / "run", *EXACT, *SAVING, *words, steps=steps)
        command += ["trainer.enable_progress_bar=false"]
        for host in names:
            self.agents[host] = self.hosts.torchrun(
                host, "pretrain", "gpt", *command, options=(*options, QUICK), log=self.log(host),
                processes=each, private=private if host == "b" else (), **variables,
            )  # fmt: skip

    def log(self, host: str) -> Path:
        return self.folder / f"{host}.log"

    def said(self, host: str) -> str:
        return self.log(host).read_text("utf-8", errors="replace")

    @property
    def rows(self) -> int:
        return len(rows(self.folder / "run")) if (self.folder / "run/metrics.jsonl").exists() else 0

    def until(self, what: Callable[[], bool], seconds: float = 400.0) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, self.said("a") + self.said("b")
            time.sleep(0.05)

    def end(self, names: str) -> list[int]:
        """Exit codes of the agents, when they have ended."""
        self.until(lambda: all(self.agents[host].poll() is not None for host in names))
        return [self.agents[host].returncode for host in names]

    def check(self, whole: dict[int, float], limit: float = 1e-10) -> None:
        """Every step is there once, with the loss of the run that was not stopped."""
        found = losses(self.folder / "run")
        assert found.keys() == whole.keys()
        assert all(abs(found[step] - whole[step]) < limit for step in whole)


@pytest.fixture
def job(corpus, tmp_path):
    with Hosts() as hosts:
        yield Job(hosts, corpus, tmp_path)


@pytest.fixture
def job_of_strange_names(corpus, tmp_path):
    with Hosts(own_names=True) as hosts:
        yield Job(hosts, corpus, tmp_path)


@pytest.mark.parametrize("each", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_training_goes_on_when_a_host_loses_its_processes(job_of_strange_names, whole, each):
    job = job_of_strange_names
    job.begin("ab", *TP2, each=each)
    job.until(lambda: job.rows > 9)
    assert job.hosts.kill("b") == each
    assert job.end("ab") == [0, 0], job.said("a")
    job.check(whole)
    assert "going on from step" in job.said("a")


@pytest.mark.slow
def test_a_pipeline_of_two_hosts(job, whole):
    job.begin("ab", *PP2)
    assert job.end("ab") == [0, 0], job.said("a")
    job.check(whole)


@pytest.mark.slow
def test_a_host_that_dies_and_is_started_again(job, whole):
    job.begin("ab", *TP2, **REPLACEABLE)
    job.until(lambda: job.rows > 9)
    assert job.hosts.kill("b", agent=True) == 2
    job.end("b")
    job.begin("b", *TP2, **REPLACEABLE)
    assert job.end("ab") == [0, 0], job.said("a")
    job.check(whole)


@pytest.mark.slow
def test_a_run_grows_and_shrinks_with_its_hosts(job, corpus, tmp_path):
    steps = 300
    pretrain(corpus, tmp_path / "whole", *EXACT, steps=steps)
    whole = losses(tmp_path / "whole")
    job.begin("a", *TP2, options=ELASTIC, steps=steps, **REPLACEABLE)
    job.until(lambda: job.rows > 3)
    job.begin("b", *TP2, options=ELASTIC, steps=steps, **REPLACEABLE)
    job.until(lambda: "processes  4" in job.said("a"))
    begun = job.rows
    job.until(lambda: job.rows > begun + 2)
    assert job.rows < steps
    job.hosts.kill("b", agent=True)
    assert job.end("a") == [0], job.said("a")
    assert "processes  2: tensor 2" in job.said("a").partition("processes  4")[2]
    job.check(whole, 1e-6)  # rounding grows with the steps: 4e-8 in 300 of them without any stop


@pytest.mark.slow
def test_a_run_goes_on_by_hand_on_fewer_and_on_more_processes(job, whole):
    for names, steps in (("ab", 8), ("a", 16), ("ab", STEPS)):
        job.begin(names, *TP2, options=BOTH if names == "ab" else ("--nnodes=1",), steps=steps)
        assert job.end(names) == [0] * len(names), job.said("a")
    job.check(whole)


@pytest.mark.slow
def test_a_stop_reaches_both_hosts(job, whole):
    """SIGTERM to one agent, as a scheduler sends it to all: the run saves on both hosts and loses no step."""
    job.begin("ab", *TP2, options=("--nnodes=2", "--max-restarts=0"))
    job.until(lambda: job.rows > 5)
    for host in "ab":
        for pid, line in job.hosts.processes(host).items():
            if "torch.distributed.run" in line:
                os.kill(pid, signal.SIGTERM)
    job.end("ab")
    stopped = job.rows
    assert (job.folder / f"run/checkpoints/step_{stopped:07d}").exists()
    job.begin("ab", *TP2)
    assert job.end("ab") == [0, 0], job.said("a")
    assert f"going on from step {stopped}" in job.said("a")
    job.check(whole)


@pytest.mark.slow
def test_a_cable_that_is_cut(job, whole):
    job.begin("ab", *TP2, f"trainer.process_timeout={TIMEOUT}", options=("--nnodes=2", "--max-restarts=0"))
    job.until(lambda: job.rows > 9)
    job.hosts.cut()
    began = time.monotonic()

    def training() -> list[str]:
        lines = [line for host in "ab" for line in job.hosts.processes(host).values()]
        return [line for line in lines if "torch.distributed.run" not in line]

    job.until(lambda: not training(), TIMEOUT + 25)
    lasted = time.monotonic() - began
    for host in "ab":
        assert f"did not finish within {TIMEOUT} s" in job.said(host)
    assert lasted < TIMEOUT + 15
    for host in "ab":
        job.hosts.kill(host, agent=True)
    job.end("ab")
    job.hosts.mend()
    job.begin("ab", *TP2)
    assert job.end("ab") == [0, 0], job.said("a")
    job.check(whole)


@pytest.mark.slow
def test_hosts_without_a_common_folder_say_so(job):
    (job.folder / "run").mkdir()
    job.begin("ab", *TP2, options=("--nnodes=2", "--max-restarts=0"), private=(job.folder / "run",))
    assert job.end("ab") == [1, 1]
    assert "host-b does not see" in job.said("a"), job.said("a")
    assert not (job.folder / "run/checkpoints").exists()


@pytest.mark.slow
def test_hosts_with_other_configurations_say_so(job):
    job.begin("a", *TP2, options=("--nnodes=2", "--max-restarts=0"))
    job.begin("b", *TP2, "model.optim.lr=2e-2", options=("--nnodes=2", "--max-restarts=0"))
    assert job.end("ab") == [1, 1]
    assert "started with another configuration" in job.said("a"), job.said("a")
    assert "lr: 0.02" in job.said("a")
