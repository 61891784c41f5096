"""Start N processes of one command on this host: what torchrun does, for `trainer.devices=N` without a launcher.

    this process ─┬─ rank 0      its output is ours
                  ├─ rank 1 …    stderr with "[rank 1] " before each line, no stdout
    signals, once ─▶ all         the first to fail ends the rest; our death, too

Imports no torch: the process that waits holds no memory.
"""

from __future__ import annotations

import ctypes
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

from megalith.errors import EXIT_LOST

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE = 10.0
"""Seconds that the others have, after one failed, to say what they waited for and leave; and again after SIGTERM."""
PR_SET_PDEATHSIG = 1


def spawn(count: int, command: Sequence[str], *, grace: float = GRACE) -> int:
    """Run `count` processes of a command to their end. → 0, or the exit code of the one that failed.

    A process that a signal ended counts as 128 + its number. Call it from the main thread.
    """
    port, readers = free_port(), []
    ended: queue.Queue[int] = queue.Queue()
    with _Forwarding() as forwarding:
        running = {rank: _begin(rank, count, port, command) for rank in range(count)}
        for rank, process in running.items():
            _thread(_await, rank, process, ended)
            if process.stderr is not None:
                readers.append(_thread(_prefix, process.stderr, f"[rank {rank}] ".encode()))
        forwarding.to(list(running.values()))
        code = _collect(running, ended, grace)
    for reader in readers:  # what was said last; not for longer than a grandchild keeps the pipe
        reader.join(timeout=2)
    return code


def free_port() -> int:
    """A port of this host that nobody listens on, below those that the system gives to outgoing connections."""
    while True:
        port = random.randrange(12000, 32000)
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port


def variables(rank: int, count: int, port: int, known: Mapping[str, str]) -> dict[str, str]:
    """A child's environment: torchrun's variables, and a fair part of the cores where nobody said how many threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    numbers = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_PORT": port,
    }
    return {
        "OMP_NUM_THREADS": str(max(cores // count, 1)),
        **{name: value for name, value in known.items() if not name.startswith("TORCHELASTIC_")},
        **{name: str(value) for name, value in numbers.items()},
        "MASTER_ADDR": "127.0.0.1",
    }


def _begin(rank: int, count: int, port: int, command: Sequence[str]) -> subprocess.Popen[bytes]:
    quiet = rank > 0
    return subprocess.Popen(
        command,
        env=variables(rank, count, port, os.environ),
        stdin=subprocess.DEVNULL if quiet else None,
        stdout=subprocess.DEVNULL if quiet else None,
        stderr=subprocess.PIPE if quiet else None,
        start_new_session=True,  # a terminal's Ctrl-C reaches us alone, and we pass it on once
        preexec_fn=_die_with_parent(os.getpid()),
    )


def _die_with_parent(parent: int) -> Callable[[], None] | None:
    """For a child between fork and exec: Linux kills it when its parent is gone, however that died."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return ask


def _prefix(stream: IO[bytes], prefix: bytes) -> None:
    for line in stream:
        sys.stderr.buffer.write(prefix + line)
        sys.stderr.buffer.flush()


def _await(rank: int, process: subprocess.Popen[bytes], ended: queue.Queue[int]) -> None:
    process.wait()
    ended.put(rank)


def _thread(target: Callable[..., Any], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, daemon=True)
    thread.start()
    return thread


def _collect(running: dict[int, subprocess.Popen[bytes]], ended: queue.Queue[int], grace: float) -> int:
    """Wait for all; once one failed, only for so long: then SIGTERM, then SIGKILL. → the exit code of the first that failed,
    but of a cause before a consequence (`EXIT_LOST`), which may be the quicker one to leave."""
    left, code, forced = set(running), 0, False
    force = iter((signal.SIGTERM, signal.SIGKILL))
    while left:
        try:
            rank = ended.get(timeout=grace if code else None)
        except queue.Empty:
            forced = True
            send(next(force, signal.SIGKILL), [running[rank] for rank in left])
            continue
        left.discard(rank)
        status = running[rank].returncode
        if status and (not code or (code == EXIT_LOST and not forced)):
            code = status if status > 0 else 128 - status
            if status < 0:
                print(f"rank {rank} died of {signal.Signals(-status).name}", file=sys.stderr, flush=True)
    return code


def send(number: int, processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """A signal to each that still runs; SIGKILL also to what they started."""
    for process in processes:
        with suppress(ProcessLookupError):
            if process.poll() is None:
                (os.killpg if number == signal.SIGKILL else os.kill)(process.pid, number)


class _Forwarding:
    """While it lasts, each signal that we get goes to every child once; those that come too early wait for the children."""

    def __init__(self) -> None:
        self._children: Sequence[subprocess.Popen[bytes]] | None = None
        self._early: list[int] = []
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Forwarding:
        for number in FORWARDED:
            self._before[number] = signal.signal(number, self._forward)
        return self

    def to(self, children: Sequence[subprocess.Popen[bytes]]) -> None:
        """All that there will be."""
        self._children = children
        for number in self._early:
            send(number, children)

    def _forward(self, number: int, frame: Any) -> None:
        if self._children is None:
            self._early.append(number)
        else:
            send(number, self._children)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
