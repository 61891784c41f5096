"""Processes that meet: those of this start and no others, with names for who is missing and the interface that reaches all."""

from __future__ import annotations

import socket
import sys
import threading
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from megalith.errors import TopologyError
from megalith.topology import meeting
from megalith.topology.environment import Launched
from megalith.topology.meeting import Room
from megalith.topology.spawn import free_port

SOON = timedelta(seconds=0.3)
HERE = socket.gethostname()


def launched(rank, world, port=1):
    return Launched(rank, world, rank, "localhost", port, "torchrun")


@pytest.fixture
def store():
    """A function: another connection to one store."""
    port = free_port()
    first = TCPStore("localhost", port, None, True, wait_for_workers=False)
    yield lambda: TCPStore("localhost", port, None, False, wait_for_workers=False)
    del first


def meet(store, world):
    """`meeting.enter` of all ranks, each in a thread."""
    rooms = {}

    def enter(rank):
        rooms[rank] = meeting.enter(store(), launched(rank, world), timedelta(seconds=20))

    threads = [threading.Thread(target=enter, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return rooms


def test_all_ranks_are_in_one_room_and_each_start_has_its_own(store):
    first, second = meet(store, 3), meet(store, 3)
    assert len({room.name for room in first.values()}) == len({room.name for room in second.values()}) == 1
    assert first[0].name != second[0].name
    assert list(first[2].hosts) == [HERE]


def test_who_is_left_from_an_earlier_start_is_not_taken_for_a_member(store):
    """Rank 1 said hello in an earlier start, and is late in this one: rank 0 has opened a room for the ghost by then."""
    store().set("hello-1", f"ghost {HERE} 127.0.0.1")
    rooms = {}

    def enter(rank):
        rooms[rank] = meeting.enter(store(), launched(rank, 2), timedelta(seconds=20))

    main = threading.Thread(target=enter, args=(0,))
    main.start()
    look = store()
    while not look.check(["room"]):
        pass
    enter(1)
    main.join()
    assert rooms[0] == rooms[1]
    assert "ghost" not in look.get("room").decode()


@pytest.mark.parametrize(
    ("rank", "expected"), [(0, "no word from ranks 1, 2"), (1, "rank 0 did not see all")]
)
def test_who_does_not_come_is_named(store, rank, expected):
    with pytest.raises(TopologyError, match=expected) as caught:
        meeting.enter(store(), launched(rank, 3), SOON)
    assert "localhost:1" in str(caught.value)


def test_a_host_without_an_address_is_an_error_at_once(monkeypatch):
    monkeypatch.setattr(meeting, "NAMING", 0.0)
    strange = Launched(1, 2, 1, "no-such-host.invalid", 29500, "torchrun")
    with pytest.raises(TopologyError, match=r"MASTER_ADDR no-such-host\.invalid"):
        meeting.open_store(strange, SOON)


def test_nobody_listens():
    with pytest.raises(TopologyError, match=r"rank 1 on .* cannot reach it"):
        meeting.open_store(launched(1, 2, free_port()), SOON)


def test_an_occupied_port():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        with pytest.raises(TopologyError, match="another program listens there"):
            meeting.open_store(launched(0, 2, other.getsockname()[1]), SOON)


@pytest.mark.parametrize(
    ("asked", "waits"), [(5, 120), (300, 300), (1800, 600)], ids=["short", "between", "long"]
)
def test_how_long_processes_wait_for_each_other(asked, waits):
    assert meeting.waiting(timedelta(seconds=asked)) == timedelta(seconds=waits)


@pytest.fixture
def interfaces(monkeypatch):
    """One interface that other hosts reach, beside the loopback; the user has chosen none."""
    monkeypatch.setenv(meeting.INTERFACE, "")  # put back at the end, also what the test sets
    monkeypatch.delenv(meeting.INTERFACE)
    monkeypatch.setattr(meeting, "interface_of", {"10.0.0.1": "eth7"}.get)
    monkeypatch.setattr(meeting, "route_to", lambda host: "10.0.0.1")


def test_the_interface_that_reaches_the_other_hosts(interfaces):
    assert meeting.choose_interface(Room("r", {"other": "10.0.0.2", HERE: "10.0.0.1"})) == "eth7"


def test_the_host_of_rank_0_goes_by_the_way_to_another(interfaces):
    assert meeting.choose_interface(Room("r", {HERE: "127.0.1.1", "other": "10.0.0.2"})) == "eth7"


def test_one_host_needs_none_and_the_users_word_wins(interfaces, monkeypatch):
    assert meeting.choose_interface(Room("r", {HERE: "10.0.0.1"})) == ""
    monkeypatch.setenv(meeting.INTERFACE, "ib0")
    assert meeting.choose_interface(Room("r", {HERE: "10.0.0.1", "other": "10.0.0.2"})) == "ib0"


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel in Linux's words")
def test_interfaces_of_this_machine():
    assert meeting.interface_of("127.0.0.1") == "lo"
    assert meeting.interface_of("198.51.100.7") == ""
    assert meeting.route_to("127.0.0.1") == "127.0.0.1"


def test_the_error_of_a_connection_names_the_interface():
    two = Room("r", {HERE: "10.0.0.1", "other": "10.0.0.2"})
    said = str(meeting.cannot_connect(RuntimeError("Connection refused"), launched(1, 2), two, "eth7"))
    assert "cannot connect to each other by eth7: Connection refused" in said
    assert meeting.INTERFACE in said
