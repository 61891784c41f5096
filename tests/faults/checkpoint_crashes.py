"""Kills saving processes and looks at what is left. Run by test_checkpoint_faults.py in a process of its own:

    python checkpoint_crashes.py every sync|async FOLDER    a child for each change of the disk, killed right before (a write: halfway)
    python checkpoint_crashes.py random sync|async FOLDER   children killed after a random time, each going on where the last one was

Children are forked after torch is imported and before it has started a thread, so a crash costs milliseconds. Prints one JSON
object with what happened; any loss is an assertion that ends the script.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from checkpoint.helpers import TEMPLATE, blank, checkpointer, same, state_of, tensors_of
from megalith.checkpoint.layout import newest_verified, step_folders
from megalith.checkpoint.native import load, verify
from megalith.checkpoint.open import resolve
from megalith.checkpoint.retention import Policy

POLICY = Policy(save_top_k=1, keep_every_n_steps=2, filename=TEMPLATE, drop_optimizer=True)
EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link")
AGAIN = 1_000_000
"""Added to the seed of a step that is saved a second time, so that its two contents differ."""


def die_at(number: int, root: Path) -> None:
    """From now on, the `number`-th change of the disk kills this process."""
    count = 0

    def one(before_death=None) -> None:
        nonlocal count
        count += 1
        if count == number:
            if before_death is not None:
                before_death()
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

    def hook(event: str, arguments: tuple) -> None:
        creates = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
        if event in EVENTS or (creates and str(arguments[0]).startswith(str(root))):
            one()

    write, fsync = os.write, os.fsync
    sys.addaudithook(hook)
    os.write = lambda fd, data: (one(lambda: write(fd, data[: len(data) // 2])), write(fd, data))[1]
    os.fsync = lambda fd: (one(), fsync(fd))[1]


def save(saver, step: int, *, again: bool = False, loss: float = 1.0) -> None:
    seed = step + AGAIN * again
    state = state_of(step) | {"seed": seed}
    saver.save(step, tensors_of(seed), state, config_yaml="x", metrics={"val_loss": loss})


def judge(root: Path, acknowledged: int) -> int:
    """What a restarted run finds: whole, the numbers of its own step, and no older than what a save had returned for."""
    folder, _ = newest_verified(root)
    assert folder is not None, f"nothing whole is left: {sorted(p.name for p in root.iterdir())}"
    live = blank()
    state = load(folder, live)
    assert same(live, tensors_of(state["seed"])), f"{folder} holds the numbers of another step"
    assert state["step"] >= acknowledged, f"step {acknowledged} was saved, {folder} is what is found"
    assert resolve(root) is not None
    named = [str(p.readlink()) for p in root.iterdir() if p.is_symlink()] + [
        (root / "latest").read_text().strip()
    ]
    for name in named:
        assert (root / name).is_dir() or (root / f"{name}.old").is_dir(), f"{name} is named, and not there"
    return state["seed"]


def restart(root: Path, asynchronous: bool):
    """The next start of the run: every published folder is whole."""
    saver = checkpointer(root, asynchronous=asynchronous, policy=POLICY)
    for folder in step_folders(root):
        assert verify(folder) == [], folder
    return saver


def tidy(root: Path) -> None:
    """After one more save nothing reminds of the crash."""
    steps = {folder.name for folder in step_folders(root)}
    for path in root.iterdir():
        assert path.name in steps | {"latest"} or path.is_symlink(), f"{path} is left over"
        assert path.exists(), f"{path} leads nowhere"
        assert path.suffix != ".old", path


def every(asynchronous: bool, folder: Path) -> dict[str, object]:
    """One child for each event of: a save of step 3 (which removes step 1 and the optimizer of step 2), then of step 3 again."""
    base = folder / "base"
    saver = checkpointer(base, policy=POLICY)
    save(saver, 1, loss=1.2)
    save(saver, 2, loss=1.5)
    found: dict[int, int] = {}
    for number in range(1, 10_000):
        root = folder / f"crash{number}"
        shutil.copytree(base, root, symlinks=True)
        progress, report = os.pipe()
        pid = os.fork()
        if pid == 0:
            saver = checkpointer(root, asynchronous=asynchronous, policy=POLICY)
            die_at(number, root)
            for again in (False, True):
                save(saver, 3, again=again)
                saver.wait()
                real_report(report)
            os._exit(0)
        os.close(report)
        _, status = os.waitpid(pid, 0)
        acknowledged = len(os.read(progress, 100))
        os.close(progress)
        seed = judge(root, acknowledged=3 if acknowledged else 2)
        assert acknowledged < 2 or seed == 3 + AGAIN
        found[seed] = found.get(seed, 0) + 1
        saver = restart(root, asynchronous)
        assert judge(root, acknowledged=3 if acknowledged else 2) == seed, "cleaning up lost something"
        save(saver, 4)
        saver.wait()
        assert judge(root, acknowledged=4) == 4
        tidy(root)
        shutil.rmtree(root)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return {"crashes": number - 1, "found": found}
        assert os.WTERMSIG(status) == signal.SIGKILL
    raise AssertionError("the save never ended")


REAL_WRITE = os.write


def real_report(descriptor: int) -> None:
    REAL_WRITE(descriptor, b".")


def at_random(asynchronous: bool, folder: Path) -> dict[str, object]:
    """A run that is killed at random times and goes on from what it finds, 25 times."""
    root, draw, newest, lost = folder / "run", random.Random(0), 0, 0
    save(checkpointer(root, policy=POLICY), 0)
    for _ in range(25):
        progress, report = os.pipe()
        pid = os.fork()
        if pid == 0:
            saver = checkpointer(root, asynchronous=asynchronous, policy=POLICY)
            for step in range(newest + 1, newest + 1000):
                save(saver, step, loss=draw.random())
                if not asynchronous:
                    real_report(report)
                else:
                    REAL_WRITE(report, b"." if step > newest + 1 else b"")  # the one before is safe now
            os._exit(0)
        os.close(report)
        time.sleep(draw.uniform(0.002, 0.12))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        acknowledged = newest
        while got := os.read(progress, 4096):
            acknowledged += len(got)
        os.close(progress)
        seed = judge(root, acknowledged)
        lost += acknowledged > seed
        newest = seed
        restart(root, asynchronous)
    return {"steps": newest, "lost": lost}


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, mode, where = sys.argv[1:]
    result = {"every": every, "random": at_random}[kind](mode == "async", Path(where))
    print(json.dumps(result))
