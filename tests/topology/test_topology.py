"""One process: no groups, identities; devices that do not exist are refused."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch
import torch.distributed as dist

from megalith.errors import TopologyError
from megalith.topology.sizes import AXES, Sizes
from megalith.topology.topology import Topology, choose_device


def test_one_process_needs_no_process_group():
    topology = Topology.single()
    assert not dist.is_initialized()
    assert all(topology.rank(axis) == 0 and topology.size(axis) == 1 for axis in AXES)
    assert all(topology.group(axis) is None for axis in AXES)
    assert (topology.data_rank, topology.data_size, topology.is_main) == (0, 1, True)
    value = torch.tensor([3.0])
    assert topology.sum(value, *AXES) is value
    topology.barrier()


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        Topology.single().device = torch.device("cpu")


def test_a_layout_needs_its_processes():
    with pytest.raises(TopologyError, match="replicate 2 needs 2 processes"):
        Topology(Sizes(replicate=2))
    with pytest.raises(TopologyError, match="1 processes, but this layout needs 2"):
        Topology.of(Sizes(replicate=2))


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "mps"])
def test_missing_devices_are_refused(name):
    with pytest.raises(TopologyError, match="auto"):
        choose_device(name)


def test_auto_takes_a_gpu_when_there_is_one():
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu") == torch.device("cpu")
