"""Notices that a run cannot go on, says on stderr who waited for what, and ends this process, so that all of them end.

    an error out of a collective ─┐
    an error of our own ──────────┼─▶ say it ─ tell the others through the store ─ leave the group ─ wait until all have spoken
    no beat for too long ─────────┘                     │
    another process told us ◀───────────────────────────┘  a short grace to fail by ourselves, then say where we are and exit

Two threads that sleep: one in a read of the store, one between looks at the clock. Changes nothing in torch. Where names of
operations and modules come from, `places` knows.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch import nn
from torch.distributed import Store  # type: ignore[attr-defined]

from megalith.errors import EXIT_FAILURE, EXIT_LOST, EXIT_STOPPED, MegalithError
from megalith.topology.places import Place, causes, module_names, of_error, of_process
from megalith.topology.sizes import AXES
from megalith.topology.topology import Topology

MARGIN = 2.0
"""Seconds after the timeout in which a collective may still raise by itself."""
GRACE = 2.0
"""Seconds that this process has to fail by itself after another one failed."""
HEARING = 3.0
"""Seconds that the others have to say where they are before we go."""
AGREEING = 1.0
"""Seconds in which rank 0 may make the same mistake as we do."""
LEAVING = 8.0
"""Seconds after which a process that failed ends, whatever still runs in it."""
LOOK = 2.0
"""Seconds between two looks at the clock, at most."""
PATIENCE = 600.0
"""Seconds without any progress after which a process ends that seems to wait for no other."""
IDLE = 0.1
"""Share of one core below which a process on the CPU is waiting, not computing."""
GONE = (
    "Connection closed",
    "Connection reset",
    "Connection refused",
    "Broken pipe",
    "Socket",
    "remote process exited",
)
LATE = ("Timed out", "timed out", "timeout", "Timeout")


class Watchdog:
    """The one of this process. `connect` opens a new connection to the store; `timeout` is what a collective may take.

    `of_groups`: the timeout that process groups are given; `computes_here`: a process that waits uses no CPU time.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        connect: Callable[[], Store],
        *,
        timeout: timedelta,
        of_groups: timedelta,
        computes_here: bool,
    ) -> None:
        self.rank, self.world, self.timeout = rank, world, timeout
        self._of_groups, self._computes_here = of_groups, computes_here
        _set_timeout(dist.group.WORLD, of_groups)
        self._store, self._ear = connect(), connect()
        self._who, self._names = f"rank {rank}", dict[int, str]()
        self._last_beat, self._beats = 0.0, 0
        self._leaving = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=target, name=f"megalith-{target.__name__[1:]}", daemon=True)
            for target in (self._listen, self._look_at_the_clock)
        ]
        for thread in self._threads:
            thread.start()

    def watch(self, topology: Topology, stages: Sequence[nn.Module] = ()) -> None:
        """Learn names; the groups of the mesh get our timeout. Starts the clock."""
        there = [f"{axis} {topology.rank(axis)}" for axis in reversed(AXES) if topology.size(axis) > 1]
        self._who = f"rank {self.rank} ({', '.join(there)})" if there else f"rank {self.rank}"
        self._names = module_names(stages)
        for mesh in (topology.mesh, topology.weights):
            for group in mesh.get_all_groups() if mesh is not None else ():
                _set_timeout(group, self._of_groups)
        self.beat()

    def beat(self) -> None:
        """We are getting on: the clock starts anew."""
        self._last_beat, self._beats = time.monotonic(), self._beats + 1

    # -- leaving -------------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """In order, all together: nobody takes a quiet connection for a death."""
        self._leaving.set()
        dist.barrier()
        self._store.set(f"failed-{self.rank}", "")  # wakes our own ear
        for thread in self._threads:
            thread.join(timeout=5)
        dist.barrier()  # rank 0 keeps the store until all have left

    def fail(self, error: BaseException) -> None:
        """Say what happened, tell the others, leave the group, and wait until they have spoken.

        Errors: `SystemExit` where all is said: an error out of a collective (`EXIT_LOST`), a `MegalithError` of another rank
        than 0 (its code), and what rank 0 says, too. Any other error is the caller's to raise.
        """
        if isinstance(error, SystemExit) and error.code in (None, 0, EXIT_STOPPED):
            return self.leave()
        with self._lock:  # from here on, this thread has the word
            self._leaving.set()
            lost, known = self._lost(error), isinstance(error, MegalithError)
            code = EXIT_LOST if lost else getattr(error, "exit_code", EXIT_FAILURE)
            _exit_after(LEAVING, code)
            text = lost or (str(error) if known else f"{type(error).__name__}: {error}")
            repeated = not lost and self._rank_0_says(text)
            quiet = repeated or (known and not self.rank) or isinstance(error, SystemExit | KeyboardInterrupt)
            self._say(text, quiet=quiet)
            with suppress(RuntimeError):
                dist.destroy_process_group()  # the others learn of it now
            self._hear()
        if lost or repeated or (known and self.rank):
            raise SystemExit(code) from error

    def _lost(self, error: BaseException) -> str:
        """What a collective that failed for want of another process waited for; "" for any other error."""
        text, place = str(causes(error)[-1]), of_error(error, self._names)
        if not place.operation or isinstance(error, MegalithError):
            return ""
        if any(word in text for word in LATE):
            return f"{place} did not finish within {self._seconds}"
        return (
            f"{place} lost its connection: another rank is gone" if any(word in text for word in GONE) else ""
        )

    @property
    def _seconds(self) -> str:
        return f"{self.timeout.total_seconds():g} s"

    # -- the two threads ---------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        key = f"failed-{self.rank}"
        try:
            self._ear.wait([key], timedelta(days=365))
            why = f"when rank {self._ear.get(key).decode()} failed"
        except RuntimeError:
            why = "when the store was gone with the process that kept it (rank 0, or the launcher)"
        if not self._leaving.wait(GRACE):
            self._end(f"was in {self._place()} {why}")

    def _look_at_the_clock(self) -> None:
        limit = self.timeout.total_seconds() + MARGIN
        moved = now = time.monotonic()
        used = time.process_time()
        while not self._leaving.wait(min(LOOK, limit / 4)):
            before, now, used_before, used = now, time.monotonic(), used, time.process_time()
            if self._computes_here and used - used_before > IDLE * (now - before):
                moved = now  # a long step, but it computes
            quiet = now - max(moved, self._last_beat)
            if self._beats and quiet > limit:
                self._look_around(quiet)

    def _look_around(self, quiet: float) -> None:
        """Ends a process that waits for another one. What else may take long (a compiler, a disk) gets more time; a GPU's
        collectives cannot be told from other work, so there any wait after the first step counts."""
        place = self._place()
        seen_from_here = self._computes_here or self._beats == 1
        if place.operation:
            self._end(f"{place} did not finish within {self._seconds}")
        elif not seen_from_here or quiet > PATIENCE:
            self._end(f"no progress for {quiet:.0f} s; it is in {place}")

    def _place(self) -> Place:
        return of_process(self._names, [thread.ident or 0 for thread in self._threads])

    def _end(self, text: str) -> None:
        """Say it, and end the process under its main thread, which cannot."""
        if not self._lock.acquire(blocking=False):
            return
        self._say(text)
        self._hear()
        sys.stdout.flush()
        os._exit(EXIT_LOST)

    # -- saying and hearing ------------------------------------------------------------------------------------------

    def _say(self, text: str, *, quiet: bool = False) -> None:
        """On stderr, and to the others."""
        if not quiet:
            print(f"{self._who}: {text}", file=sys.stderr, flush=True)
        with suppress(RuntimeError):  # the store is gone with rank 0
            self._store.set(f"said-{self.rank}", "")
            me = str(self.rank)
            if self._store.compare_set("first", "", me).decode() == me:
                for rank in range(self.world):
                    self._store.set(f"failed-{rank}", me)

    def _rank_0_says(self, text: str) -> bool:
        """A mistake that all processes make is rank 0's to tell: is it this one?"""
        if self.rank:
            return not self._await("error", [0], AGREEING) and self._read("error-0") == text
        with suppress(RuntimeError):
            self._store.set("error-0", text)
        return False

    def _read(self, key: str) -> str:
        try:
            return self._store.get(key).decode()
        except RuntimeError:
            return ""

    def _hear(self) -> None:
        """Wait until all have spoken, since a launcher may end them when we end; then the first of us names who did not."""
        others = [rank for rank in range(self.world) if rank != self.rank]
        silent = self._await("said", others)
        with suppress(RuntimeError):
            self._store.set(f"heard-{self.rank}", "")
        if self.rank == 0:  # our process keeps the store, so it goes last
            self._await("heard", [rank for rank in others if rank not in silent])
        if silent and self.rank == min({*range(self.world)} - {*silent}):
            names = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"
            print(f"{self._who}: {names} said nothing: gone, or hanging", file=sys.stderr, flush=True)

    def _await(self, what: str, ranks: Sequence[int], seconds: float = HEARING) -> list[int]:
        """→ the ranks whose key does not come in time; all of them when the store is gone."""
        left, end = list(ranks), time.monotonic() + seconds
        with suppress(RuntimeError):
            while left and time.monotonic() < end:
                left = [rank for rank in left if not self._store.check([f"{what}-{rank}"])]
                time.sleep(0.1 if left else 0.0)
        return left


def _set_timeout(group: dist.ProcessGroup | None, timeout: timedelta) -> None:
    """For collectives. A receive goes by what its group was made with: there our clock comes first."""
    if group is not None:
        group.set_timeout(timeout)


def _exit_after(seconds: float, code: int) -> None:
    """A process that must not outlive its run: whatever still blocks it, this does not."""
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()
