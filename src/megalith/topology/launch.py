"""From started processes to one process group, and out of it again, in order or after a failure.

    environment() ─▶ None: one process, no group
                  ─▶ Launched ─ start ─ store ─ process group ─ watchdog ─▶ Member ─ … ─ leave together

Knows processes and devices. Knows no model: names for messages come through `Member.watch`. Starting processes is `spawn`'s.
"""

from __future__ import annotations

import faulthandler
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from megalith.errors import TopologyError
from megalith.topology.environment import Launched, environment
from megalith.topology.topology import Topology, choose_device
from megalith.topology.watchdog import Watchdog

__all__ = ["Launched", "Member", "environment", "start"]

DEFAULT_TIMEOUT = timedelta(minutes=30)
JOINING = timedelta(minutes=2)
"""What processes have at least to find each other: importing torch may take one host longer than another."""
NCCL_MARGIN = timedelta(seconds=8)
"""NCCL aborts a process without a word that a person would understand, so our watchdog, which has more to say, goes first."""


@dataclass(frozen=True)
class Member:
    """This process among `world`: its number, its device, and its watchdog (None with one process)."""

    device: torch.device
    rank: int = 0
    world: int = 1
    launched: Launched | None = None
    watchdog: Watchdog | None = None

    def watch(self, topology: Topology, stages: Sequence[nn.Module] = ()) -> None:
        """Give the groups of a mesh the timeout, and messages the names of coordinates and modules. Starts the clock."""
        if self.watchdog is not None:
            self.watchdog.watch(topology, stages)

    def beat(self) -> None:
        """A step is done, a batch evaluated, a checkpoint saved: we are not hanging."""
        if self.watchdog is not None:
            self.watchdog.beat()


@contextmanager
def start(
    device: str | torch.device = "auto",
    *,
    backend: str | None = None,
    timeout: timedelta | float = DEFAULT_TIMEOUT,
    launched: Launched | None = None,
) -> Iterator[Member]:
    """Make this process a member of its run: device, process group, watchdog; on leaving they are gone.

    One process: no group at all. `device`: "auto", "cpu", "cuda" (this host's GPU number `local_rank`) or "cuda:N";
    `backend`: default gloo for the CPU, and nccl besides for GPUs; `timeout`: seconds that anything between processes may
    take; `launched`: default what the environment says.
    Errors: `TopologyError` when processes do not find each other; with several processes, what `Watchdog.fail` raises.
    """
    launched = launched or environment()
    limit = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
    here = own_device(device, launched)
    if here.type == "cuda":
        torch.cuda.set_device(here)
    if launched is None or launched.world == 1:
        yield Member(here, launched=launched)
        return
    faulthandler.enable()  # gloo ends a process from C++ when sizes do not match; at least its stack is shown
    store = _join(launched, backend or ("cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo"), limit)
    watchdog = Watchdog(
        launched.rank,
        launched.world,
        lambda: _client(launched),
        timeout=limit,
        of_groups=limit + NCCL_MARGIN if here.type == "cuda" else limit,
        computes_here=here.type == "cpu",
    )
    try:
        yield Member(here, launched.rank, launched.world, launched, watchdog)
        watchdog.leave()
    except BaseException as error:
        watchdog.fail(error)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        del store  # rank 0's serves the others: not before the end


def own_device(name: str | torch.device, launched: Launched | None) -> torch.device:
    """The device of this process. Several processes of a host take a GPU each, in the order of `local_rank`."""
    chosen = choose_device(name)
    if chosen.type != "cuda" or chosen.index is not None:
        return chosen
    seen = torch.cuda.device_count()
    local = launched.local_rank if launched else 0
    if local >= seen > 1:
        what = f"process {local + 1} of this host, but it has {seen} GPUs"
        raise TopologyError(what, where="device", fix=f"at most {seen} processes a host")
    return torch.device("cuda", local if seen > 1 else 0)  # a launcher may show each process its own GPU only


# -- meeting, around a store: a small table that all processes share ----------------------------------------------------


def _join(launched: Launched, backend: str, limit: timedelta) -> Store:
    """The default process group. → its store. Errors: `TopologyError` when not all come, or when rank 0 cannot listen.

    A group is made with time enough for a loaded machine to make it; what it may take at work is set afterwards.
    """
    timeout = max(limit, JOINING)
    place = f"{launched.host}:{launched.port}"
    try:
        store = _store(launched, timeout)
        dist.init_process_group(
            backend, store=store, rank=launched.rank, world_size=launched.world, timeout=timeout
        )
    except (RuntimeError, socket.gaierror) as error:
        said = str(error).splitlines()[0][:200]
        if "address already in use" in str(error).lower():
            fix = "another MASTER_PORT"
            raise TopologyError("another program listens there", where=place, fix=fix) from error
        raise TopologyError(
            f"rank {launched.rank}: not all of {launched.world} processes met within {timeout.total_seconds():g} s: {said}",
            where=place,
            fix="look for a process that ended, for a wrong MASTER_ADDR or SLURM_JOB_NODELIST, and for a firewall",
        ) from error
    return store


def _store(launched: Launched, timeout: timedelta) -> Store:
    """Rank 0 serves it, unless torchrun does."""
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true"
    world = None if served else launched.world
    first = launched.rank == 0 and not served
    return _prefixed(TCPStore(launched.host, launched.port, world, first, timeout=timeout, multi_tenant=True))


def _client(launched: Launched) -> Store:
    """Another connection to the store, for a thread that must not wait for the first; answers within 5 s or raises."""
    store = TCPStore(launched.host, launched.port, None, False, timeout=JOINING, wait_for_workers=False)
    store.set_timeout(timedelta(seconds=5))
    return _prefixed(store)


def _prefixed(store: Store) -> Store:
    """torchrun keeps its store over restarts: each attempt has its own part of it."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"attempt-{attempt}", store)
