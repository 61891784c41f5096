"""Training runs that are killed, stopped and started again: every loss is, to the last bit, that of a run left alone."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalith.errors import EXIT_STOPPED, EXIT_SUCCESS
from tests.tasks.nano import FAMILIES, family_of, losses, make_corpus, overrides, steps_in

STEPS = 40
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
SAVE = "exp_manager.checkpoint_callback_params"
EVERY_STEP = [f"{SAVE}.every_n_train_steps=1", f"{SAVE}.save_top_k=2"]


class Zygote:
    """The process that forks runs."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.training_zygote"], cwd=ROOT, env=ENVIRONMENT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert json.loads(self.process.stdout.readline()) == {"ready": True}

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, arguments, log):
        return self.ask(run=arguments, log=str(log))["pid"]

    def wait(self, pid):
        return self.ask(wait=pid)["code"]

    def run(self, arguments, log):
        return self.wait(self.start(arguments, log))

    def close(self):
        self.process.kill()  # its interpreter takes seconds to wind down
        self.process.communicate()


@pytest.fixture(scope="module")
def zygote():
    made = Zygote()
    yield made
    made.close()


@pytest.fixture(scope="module")
def corpus(request, tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), getattr(request, "param", "gpt"))


def command(corpus, folder, *more):
    return ["pretrain", family_of(corpus), *overrides(corpus, folder, *more, steps=STEPS)]


@pytest.fixture(scope="module")
def truth(corpus, zygote, tmp_path_factory):
    """Losses of a run left alone, by kind."""
    folder, log = tmp_path_factory.mktemp("truth"), corpus / "truth.log"
    assert zygote.run(command(corpus, folder), log) == EXIT_SUCCESS, log.read_text()
    return losses(folder), losses(folder, "val_loss")


def assert_equal_to(truth, folder):
    assert losses(folder) == truth[0]
    assert losses(folder, "val_loss") == truth[1]
    assert max(truth[0]) == STEPS


def last_step(folder):
    """The last whole row's step; 0 before there is one."""
    try:
        lines = (folder / "metrics.jsonl").read_text().rsplit("\n", 2)
        return json.loads(lines[-2])["step"]
    except (OSError, IndexError):
        return 0


def wait_until(condition, *, alive, seconds=60.0):
    """→ did it come true before the run ended?"""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if not alive():
            return False
        time.sleep(0.001)
    raise AssertionError("neither came within the time")


def state(pid):
    """The kernel's letter for what the process does now (proc(5)): X, gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def running(pid):
    return state(pid) not in "ZX"


def test_kill_and_the_same_command_again(corpus, truth, tmp_path):
    """The real command line, killed without warning at a random step."""
    arguments = [
        sys.executable,
        "-m",
        "megalith",
        *command(corpus, tmp_path, f"{SAVE}.every_n_train_steps=3"),
    ]
    step = random.Random(os.environ.get("PYTEST_SEED", "7")).randrange(5, 30)
    process = subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert wait_until(lambda: last_step(tmp_path) >= step, alive=lambda: process.poll() is None)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    again = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert again.returncode == EXIT_SUCCESS, again.stdout + again.stderr
    assert "going on from step" in again.stdout
    assert "Traceback" not in again.stdout + again.stderr
    assert_equal_to(truth, tmp_path)


def stopped_in_a_save(pid, root, chance):
    """Whether the run ``pid`` now stands still with a save half done; it goes on, when not.

    A save of this model lasts a millisecond: a kill that is sent upon seeing one may well come after it.
    """
    if not any(root.glob("*.partial")):
        return False
    time.sleep(chance.random() * 0.001)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        while running(pid) and state(pid) != "T":
            time.sleep(0.0001)
        if running(pid) and any(root.glob("*.partial")):
            return True
        os.kill(pid, signal.SIGCONT)
    return False


@pytest.mark.parametrize("asynchronous", [False, True])
def test_kills_in_the_midst_of_saves(corpus, truth, zygote, tmp_path, asynchronous):
    more = [*EVERY_STEP, f"{SAVE}.asynchronous={str(asynchronous).lower()}"]
    root, log = tmp_path / "checkpoints", tmp_path.parent / f"{tmp_path.name}.log"
    chance, half_done = random.Random(3), 0
    for _ in range(5):
        goal = last_step(tmp_path) + chance.randrange(1, 5)
        pid = zygote.start(command(corpus, tmp_path, *more), log)

        def saving(pid=pid, goal=goal):
            return last_step(tmp_path) >= goal and stopped_in_a_save(pid, root, chance)

        if wait_until(saving, alive=lambda pid=pid: running(pid)):
            os.kill(pid, signal.SIGKILL)
        assert zygote.wait(pid) in (-signal.SIGKILL, EXIT_SUCCESS)
        half_done += any(root.glob("*.partial")) or any(root.glob("*.old"))
    assert half_done, "no kill hit a save"
    assert zygote.run(command(corpus, tmp_path, *more), log) == EXIT_SUCCESS, log.read_text()
    assert_equal_to(truth, tmp_path)
    assert not any(root.glob("*.partial"))


@pytest.mark.parametrize("corpus", FAMILIES, indirect=True)
def test_kills_at_random_moments(corpus, truth, zygote, tmp_path):
    """From before the first step on: whatever has been saved by then, the end is the same."""
    log, chance = tmp_path.parent / f"{tmp_path.name}.log", random.Random(11)
    for _ in range(5):
        pid = zygote.start(command(corpus, tmp_path, f"{SAVE}.every_n_train_steps=4"), log)
        time.sleep(chance.random() * 0.8)
        os.kill(pid, signal.SIGKILL)
        zygote.wait(pid)
    assert zygote.run(command(corpus, tmp_path), log) == EXIT_SUCCESS, log.read_text()
    assert_equal_to(truth, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_exits_with_3_and_the_run_goes_on(corpus, truth, zygote, tmp_path, number):
    log = tmp_path.parent / f"{tmp_path.name}.log"
    pid = zygote.start(command(corpus, tmp_path, f"{SAVE}.every_n_train_steps=1000"), log)
    assert wait_until(lambda: last_step(tmp_path) >= 6, alive=lambda: running(pid))
    os.kill(pid, number)
    assert zygote.wait(pid) == EXIT_STOPPED, log.read_text()
    (step,) = steps_in(tmp_path)
    assert step == last_step(tmp_path) >= 6
    assert f"{number.name}: stopped after saving at step {step} of {STEPS}" in log.read_text()
    assert zygote.run(command(corpus, tmp_path), log) == EXIT_SUCCESS
    assert losses(tmp_path) == truth[0]
    # A validation that was due at the very step of the signal is left out: saving comes first.
    assert losses(tmp_path, "val_loss").items() >= {k: v for k, v in truth[1].items() if k != step}.items()


def test_the_second_signal_ends_it_at_once(corpus, zygote, tmp_path):
    """Here while a step takes long: nothing waits for it."""
    log = tmp_path.parent / f"{tmp_path.name}.log"
    slow = ["model.global_batch_size=1024", "trainer.val_check_interval=null"]
    pid = zygote.start(command(corpus, tmp_path, *slow), log)
    assert wait_until(lambda: last_step(tmp_path) >= 1, alive=lambda: running(pid))
    os.kill(pid, signal.SIGTERM)
    assert wait_until(lambda: "saving after this step" in log.read_text(), alive=lambda: running(pid))
    began = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    assert zygote.wait(pid) == -signal.SIGTERM
    assert time.monotonic() - began < 2
    assert steps_in(tmp_path) == []
