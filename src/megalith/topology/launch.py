"""From started processes to one process group, and out of it again, in order or after a failure.

    environment() ─▶ None: one process, no group
                  ─▶ Launched ─ start ─ meeting ─ process group ─ watchdog ─▶ Member ─ … ─ leave together

Knows processes and devices. Knows no model: names for messages come through `Member.watch`. Starting processes is `spawn`'s.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.testing._internal.distributed.fake_pg import FakeStore

from megalith.errors import TopologyError
from megalith.topology import meeting
from megalith.topology.environment import Launched, environment
from megalith.topology.topology import Topology, choose_device
from megalith.topology.watchdog import Watchdog

__all__ = ["Launched", "Member", "environment", "fake", "start"]

DEFAULT_TIMEOUT = timedelta(minutes=30)
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
    store, room = _join(launched, backend or ("cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo"), limit)
    watchdog = Watchdog(
        launched.rank,
        launched.world,
        lambda: meeting.client(launched, room),
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


@contextmanager
def fake(world_size: int, *, rank: int = 0) -> Iterator[Member]:
    """Within, this process believes to be `rank` of `world_size`: groups and meshes can be made, and nobody answers.

    A send ends at once and what is received stays as it was: for shapes and counts, never for values. One process has no
    group here, either. Errors: `TopologyError` where this process is one of several already.
    """
    if dist.is_initialized():
        raise TopologyError("a fake process group inside a real one", fix="plan in a process of its own")
    if world_size == 1:
        yield Member(torch.device("cpu"))
        return
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield Member(torch.device("cpu"), rank, world_size)
    finally:
        dist.destroy_process_group()
        forget_meshes()


def forget_meshes() -> None:
    """After a process group: DTensor remembers meshes by their shape, and with them groups that are gone."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()


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


# -- meeting -----------------------------------------------------------------------------------------------------------


def _join(launched: Launched, backend: str, limit: timedelta) -> tuple[Store, meeting.Room]:
    """The default process group. → its store, and this start's part of it. Errors: `TopologyError` when not all come, when
    rank 0 cannot listen, or when hosts cannot connect.

    A group is made with time enough for a loaded machine to make it; what it may take at work is set afterwards.
    """
    timeout = meeting.waiting(limit)
    store = meeting.open_store(launched, timeout)
    room = meeting.enter(store, launched, timeout)
    interface = meeting.choose_interface(room)
    try:
        dist.init_process_group(
            backend, store=room.inside(store), rank=launched.rank, world_size=launched.world, timeout=timeout
        )
    except RuntimeError as error:
        raise meeting.cannot_connect(error, launched, room, interface) from error
    return store, room
