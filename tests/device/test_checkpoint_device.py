"""Checkpoints of tensors on a GPU: staged through pinned memory, loaded back in place."""

from __future__ import annotations

import time

import pytest
import torch

from megalith.checkpoint.native import Checkpointer, load
from megalith.topology.topology import Topology

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def tensors(value: float, megabytes: int = 8) -> dict[str, torch.Tensor]:
    count = megabytes * 1_000_000 // 12
    names = ("model.w", "optim.w.exp_avg", "optim.w.exp_avg_sq")
    return {name: torch.full((count,), value + number, device="cuda") for number, name in enumerate(names)}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_was_there_at_the_save_comes_back(tmp_path, asynchronous):
    saver = Checkpointer(tmp_path, Topology.single("cuda"), asynchronous=asynchronous)
    live = tensors(1)
    folder = saver.save(1, live, {}, config_yaml="")
    for tensor in live.values():
        tensor.zero_()
    saver.wait()
    places = {name: tensor.data_ptr() for name, tensor in live.items()}
    load(folder, live)
    assert all(torch.equal(live[name], tensor) for name, tensor in tensors(1).items())
    assert places == {name: tensor.data_ptr() for name, tensor in live.items()}


def test_the_stall_is_short(tmp_path):
    saver = Checkpointer(tmp_path, Topology.single("cuda"), asynchronous=True)
    live = tensors(1, megabytes=500)
    saver.save(1, live, {}, config_yaml="")
    saver.wait()
    assert all(buffer.is_pinned() for buffer in saver._staging._buffers.values())
    stalls = []
    for step in (2, 3, 4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        saver.save(step, live, {}, config_yaml="")
        stalls.append(time.perf_counter() - start)
        saver.wait()
    assert sorted(stalls)[1] <= 0.1
