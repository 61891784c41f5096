"""Where started processes find each other: rank 0's address, a room that no earlier start has used, and a network interface.

    TCPStore ─ everyone says hello ─ rank 0 opens a room for exactly these ─▶ Room: its name, and the hosts in it
                                                                              └─▶ the interface by which hosts reach each other

torchrun keeps its store when it restarts processes, and its hosts need not agree on how often that was, so what an earlier
start has left there must not be taken for today's. Knows sockets and stores; knows no process groups.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from megalith.errors import TopologyError
from megalith.topology.environment import Launched

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

JOINING = timedelta(minutes=2)
"""What processes have at least to find each other: importing torch may take one host longer than another."""
LONGEST = timedelta(minutes=10)
"""Who has not come by then does not come."""
PATIENCE = 30.0
"""Seconds after which rank 0 says for whom it waits."""
NAMING = 5.0
"""Seconds in which a name server may fail."""
INTERFACE = "GLOO_SOCKET_IFNAME"
SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class Room:
    """A part of the store that only the processes of this start use."""

    name: str
    hosts: dict[str, str]
    """Names of the hosts that processes run on, and the address by which each reaches rank 0's; that of rank 0 first."""

    def inside(self, store: Store) -> Store:
        """A connection to the store, seen from here."""
        return PrefixStore(self.name, store)


def waiting(limit: timedelta) -> timedelta:
    """How long processes wait for each other that may wait `limit` for anything later."""
    return min(max(limit, JOINING), LONGEST)


def open_store(launched: Launched, timeout: timedelta) -> Store:
    """The table that all processes share; rank 0 serves it, unless torchrun does.

    Errors: `TopologyError` for a host without an address, an occupied port, and nobody who listens.
    """
    _know(launched.host)
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true"
    first = launched.rank == 0 and not served
    place = f"{launched.host}:{launched.port}"
    try:
        return TCPStore(
            launched.host, launched.port, None, first, timeout=timeout, multi_tenant=True,
            wait_for_workers=False,
        )  # fmt: skip
    except RuntimeError as error:
        if "address already in use" in str(error).lower():
            raise TopologyError(
                "another program listens there", where=place, fix="another MASTER_PORT"
            ) from error
        raise TopologyError(
            f"rank {launched.rank} on {socket.gethostname()} cannot reach it: {_first_line(error)}",
            where=place,
            fix="look for a rank 0 that ended, a wrong MASTER_ADDR or SLURM_JOB_NODELIST, and a firewall",
        ) from error


def client(launched: Launched, room: Room) -> Store:
    """Another connection, for a thread that must not wait for the first; answers within 5 s or raises."""
    store = TCPStore(launched.host, launched.port, None, False, timeout=JOINING, wait_for_workers=False)
    store.set_timeout(timedelta(seconds=5))
    return room.inside(store)


def _know(host: str) -> None:
    """Errors: `TopologyError` when `host` has no address here; the store would go on asking until it is out of time."""
    end = time.monotonic() + NAMING
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            if time.monotonic() > end:
                raise TopologyError(
                    f"{socket.gethostname()} does not know a host of this name",
                    where=f"MASTER_ADDR {host}",
                    fix="give an address instead (torchrun: --local-addr on every host), or enter the name in /etc/hosts",
                ) from error
            time.sleep(0.5)


# -- a room -----------------------------------------------------------------------------------------------------------


def enter(store: Store, launched: Launched, timeout: timedelta) -> Room:
    """A room with all processes of this start in it. Errors: `TopologyError` naming the ranks that do not come."""
    me = f"{uuid.uuid4().hex[:12]} {socket.gethostname()} {route_to(launched.host)}"
    store.set(f"hello-{launched.rank}", me)
    end = time.monotonic() + timeout.total_seconds()
    try:
        return _invite(store, launched, end) if launched.rank == 0 else _follow(store, launched.rank, me, end)
    except TimeoutError as error:
        raise TopologyError(
            f"rank {launched.rank}: not all of {launched.world} processes met within {timeout.total_seconds():g} s: {error}",
            where=f"{launched.host}:{launched.port}",
            fix="look for a process that ended or a host that was not started",
        ) from error


def _invite(store: Store, launched: Launched, end: float) -> Room:
    """Rank 0: open a room for those who said hello. A hello may be an earlier start's; its new one makes a new room."""
    ranks, looks = range(launched.world), _Looks(end)
    for _ in looks:
        missing = [rank for rank in ranks if not store.check([f"hello-{rank}"])]
        if missing:
            _complain(missing, looks)
            continue
        there, room = _hellos(store, ranks), uuid.uuid4().hex[:12]
        store.set("room", "\n".join([room, *there]))
        for _ in looks:
            absent = [rank for rank in ranks[1:] if not store.check([f"{room}-{rank}"])]
            if not absent:
                store.set(f"{room}-open", "")
                return _room(room, there)
            _complain(absent, looks)
            if _hellos(store, ranks) != there:
                break
    raise TimeoutError(f"no word from {_ranks(missing or absent)}")


def _follow(store: Store, rank: int, me: str, end: float) -> Room:
    """Another rank: go where rank 0 says, when it counts on us."""
    for _ in _Looks(end):
        if not store.check(["room"]):
            continue
        room, *there = store.get("room").decode().splitlines()
        if rank < len(there) and there[rank] == me:
            store.set(f"{room}-{rank}", "")
            if store.check([f"{room}-open"]):
                return _room(room, there)
    raise TimeoutError("rank 0 did not see all of them")


def _hellos(store: Store, ranks: Sequence[int]) -> list[str]:
    return [text.decode() for text in store.multi_get([f"hello-{rank}" for rank in ranks])]


def _room(name: str, hellos: Sequence[str]) -> Room:
    return Room(name, {host: address for _, host, address in (text.split(" ") for text in hellos)})


class _Looks(Iterator[None]):
    """Looks at the store, further and further apart, until `end`."""

    def __init__(self, end: float) -> None:
        self.end, self.began, self.pause, self.complained = end, time.monotonic(), 0.0, False

    def __next__(self) -> None:
        if time.monotonic() > self.end:
            raise StopIteration
        time.sleep(self.pause)
        self.pause = min(self.pause * 1.5 + 0.005, 0.5)


def _complain(missing: Sequence[int], looks: _Looks) -> None:
    """Once, when it takes long: for whom."""
    if not looks.complained and time.monotonic() - looks.began > PATIENCE:
        print(f"rank 0: waiting for {_ranks(missing)}", file=sys.stderr, flush=True)
        looks.complained = True


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


# -- the network ------------------------------------------------------------------------------------------------------


def choose_interface(room: Room) -> str:
    """Where several hosts take part, tell gloo by which interface they reach each other. → its name, "" where gloo chooses.

    Left to itself it takes the address of the host's own name, which on many systems is 127.0.1.1. The user's word wins.
    """
    if len(room.hosts) == 1 or os.environ.get(INTERFACE):
        return os.environ.get(INTERFACE, "")
    own = room.hosts[socket.gethostname()]
    if _is_loopback(own):  # rank 0's host: the way to itself says nothing
        own = next((route_to(a) for a in room.hosts.values() if not _is_loopback(a)), own)
    name = "" if _is_loopback(own) else interface_of(own)
    if name:
        os.environ[INTERFACE] = name
    return name


def cannot_connect(error: Exception, launched: Launched, room: Room, interface: str) -> TopologyError:
    """The processes met, and yet the connections between them failed."""
    own = route_to(launched.host) if _is_loopback(room.hosts[socket.gethostname()]) else ""
    address = own or room.hosts[socket.gethostname()]
    by = f" by {interface}" if interface else ""
    hint = f"all ports between the hosts must be open; {INTERFACE} and NCCL_SOCKET_IFNAME name the interface"
    return TopologyError(
        f"rank {launched.rank}: the processes met, but cannot connect to each other{by}: {_first_line(error)}",
        where=f"{socket.gethostname()} ({address})",
        fix=hint if len(room.hosts) > 1 else "look for a process that ended",
    )


def route_to(host: str) -> str:
    """This host's address on the way to another; "127.0.0.1" where there is no way. Sends nothing."""
    for family, kind, protocol, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
        with suppress(OSError), socket.socket(family, kind, protocol) as found:
            found.connect(address)
            return str(found.getsockname()[0])
    return "127.0.0.1"


def interface_of(address: str) -> str:
    """The interface that has an IPv4 address first; "" where none has, or where the system does not say."""
    if fcntl is None or ":" in address or not sys.platform.startswith("linux"):
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                answer = fcntl.ioctl(asking.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return ""


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]
