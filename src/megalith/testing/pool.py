"""A pool of processes that talk over gloo, started once: a distributed test costs milliseconds, not imports.

    run(function, ranks, *args) ─▶ each rank: a process group of exactly these ranks ─ function(*args) ─▶ results, by rank

A rank that fails leaves its group at once, so that its peers learn of it instead of waiting; after an error or a timeout the
processes are replaced, so one broken test cannot spoil the next. Knows processes. Knows nothing of models.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megalith.topology.launch import forget_meshes

GRACE = 3.0
"""Seconds that the other ranks have to answer after the first error."""


class RankFailure(Exception):
    """What went wrong, by rank: tracebacks, or "no answer"."""

    def __init__(self, errors: dict[int, str]) -> None:
        self.errors = errors
        super().__init__("\n".join(f"rank {rank}: {text}" for rank, text in sorted(errors.items())))


class RankPool:
    """Up to `size` spawned processes; they start when first needed. Functions and arguments must be importable by name."""

    def __init__(
        self, size: int = 4, *, timeout: float = 120.0, method: Literal["spawn", "fork"] = "spawn"
    ) -> None:
        """`method` fork saves the ranks their imports, but only before the first backward of this process."""
        self.size, self.timeout = size, timeout
        self._context: Any = mp.get_context(method)
        self._folder = tempfile.TemporaryDirectory(prefix="megalith-ranks-")
        self._jobs = 0
        self._processes: list[Any] = []
        self._inboxes: list[Any] = []
        self._outbox = self._context.Queue()

    def run(
        self, function: Callable[..., Any], ranks: int, *args: Any, timeout: float | None = None
    ) -> list[Any]:
        """The results of `function(*args)` on ranks 0 … `ranks` − 1. Errors: `RankFailure`."""
        if ranks > self.size:
            raise ValueError(f"{ranks} ranks in a pool of {self.size}")
        self.start(ranks)
        self._jobs += 1
        wait = timeout or self.timeout
        store = os.path.join(self._folder.name, f"store-{self._jobs}")
        job = (function, ranks, store, args, list(sys.path), max(wait, 60.0))
        for inbox in self._inboxes[:ranks]:
            inbox.put(job)
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        try:
            while len(results) + len(errors) < ranks:
                rank, succeeded, value = self._outbox.get(timeout=GRACE if errors else wait)
                (results if succeeded else errors)[rank] = value
        except queue.Empty:
            silent = set(range(ranks)) - results.keys() - errors.keys()
            errors |= dict.fromkeys(silent, "no answer")
        if errors:
            self.close()
            raise RankFailure(errors)
        return [results[rank] for rank in range(ranks)]

    def close(self) -> None:
        """Ends the processes; the next `run` starts new ones."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._inboxes, self._outbox = [], [], self._context.Queue()

    def start(self, ranks: int) -> None:
        """Have this many processes, so that they get ready while the caller does something else."""
        for rank in range(len(self._processes), ranks):
            inbox = self._context.Queue()
            process = self._context.Process(target=_serve, args=(rank, inbox, self._outbox), daemon=True)
            process.start()
            self._processes.append(process)
            self._inboxes.append(inbox)


def _serve(rank: int, inbox: Any, outbox: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that owns the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    while True:
        function, ranks, store, args, path, timeout = inbox.get()
        sys.path[:] = path
        torch.set_default_dtype(torch.float32)  # nothing leaks from the job before
        try:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, ranks),
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=timeout),
            )
            outbox.put((rank, True, function(*args)))
        except BaseException:
            outbox.put((rank, False, traceback.format_exc()[-4000:]))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            torch._dynamo.reset()
            forget_meshes()


def _end_with_parent() -> None:
    """A process that was killed closes no pool."""
    if (parent := mp.parent_process()) is not None:
        parent.join()
        os._exit(1)
