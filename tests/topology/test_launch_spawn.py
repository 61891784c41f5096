"""Processes of our own: outputs, exit codes, signals, and the end of all when one of them or the parent ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalith.errors import EXIT_LOST
from megalith.topology.spawn import variables

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
PARENT = """
import sys
from megalith.topology.spawn import spawn
sys.exit(spawn(int(sys.argv[1]), [sys.executable, "-u", "-c", sys.argv[2]], grace=float(sys.argv[3])))
"""
BEGIN = "import os, signal, sys, time; rank = int(os.environ['RANK']);"
TELL = "open(os.environ['FOLDER'] + f'/{rank}', 'w').write(str(os.getpid()));"


def begin(child, folder, *, count=2, grace=0.5):
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, str(count), BEGIN + child, str(grace)],
        env={**os.environ, "FOLDER": str(folder)}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def pids(folder, count=2):
    """Of the children, once all have told."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        found = [path.read_text() for path in sorted(Path(folder).iterdir())]
        if len(found) == count and all(found):
            return [int(text) for text in found]
        time.sleep(0.02)
    raise AssertionError("the children did not start")


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_output(tmp_path):
    out, err = begin(
        "print('out', rank); print('err', rank, file=sys.stderr)", tmp_path, count=3
    ).communicate()
    assert out == "out 0\n"
    assert sorted(err.splitlines()) == ["[rank 1] err 1", "[rank 2] err 2", "err 0"]


def test_the_first_failure_is_the_exit_code_and_ends_the_others(tmp_path):
    process = begin("time.sleep(0.3 * (1 - rank)); rank or time.sleep(60); sys.exit(7)", tmp_path)
    started = time.monotonic()
    process.communicate()
    assert process.returncode == 7
    assert time.monotonic() - started < 20


def test_the_exit_code_is_the_causes_even_where_a_consequence_is_quicker(tmp_path):
    process = begin(f"rank and time.sleep(1); sys.exit(1 if rank else {EXIT_LOST})", tmp_path, grace=10)
    process.communicate()
    assert process.returncode == 1


def test_who_does_not_listen_is_killed_with_all_that_it_started(tmp_path):
    stubborn = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); import subprocess;"
        "inner = subprocess.Popen(['sleep', '60']);"
        "open(os.environ['FOLDER'] + '/inner', 'w').write(str(inner.pid)); time.sleep(60)"
    )
    child = f"exec({stubborn!r}) if rank == 0 else (time.sleep(1), sys.exit(3))"
    process = begin(child, tmp_path)
    (inner,) = pids(tmp_path, count=1)
    process.communicate(timeout=30)
    assert process.returncode == 3
    assert not runs(inner)


def test_a_killed_process_is_named(tmp_path):
    process = begin("rank or time.sleep(60); os.kill(os.getpid(), signal.SIGKILL)", tmp_path)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGKILL
    assert "rank 1 died of SIGKILL" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_each_once(tmp_path, number):
    child = f"got = []; signal.signal({int(number)}, lambda n, f: got.append(n));" + TELL + (
        "time.sleep(1.2);"  # a second copy would come within it
        "print('got', rank, len(got), file=sys.stderr); sys.exit(3)"
    )  # fmt: skip
    process = begin(child, tmp_path, grace=10)
    pids(tmp_path)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert sorted(err.splitlines()) == ["[rank 1] got 1 1", "got 0 1"]
    assert process.returncode == 3


def test_children_die_with_a_killed_parent(tmp_path):
    process = begin(TELL + "time.sleep(60)", tmp_path)
    children = pids(tmp_path)
    assert all(map(runs, children))
    process.kill()
    process.wait()
    end = time.monotonic() + 5
    while any(map(runs, children)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(runs, children))


def test_threads_are_shared_out_unless_somebody_chose():
    cores = len(os.sched_getaffinity(0))
    assert variables(0, 2, 1, {})["OMP_NUM_THREADS"] == str(max(cores // 2, 1))
    assert variables(0, 2, 1, {"OMP_NUM_THREADS": "5"})["OMP_NUM_THREADS"] == "5"


def test_a_child_of_a_torchrun_process_does_not_look_for_its_agent():
    found = variables(
        1, 2, 4000, {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "elsewhere", "RANK": "9"}
    )
    assert found["RANK"] == "1"
    assert found["MASTER_ADDR"] == "127.0.0.1"
    assert "TORCHELASTIC_USE_AGENT_STORE" not in found
