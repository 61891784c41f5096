"""A run that is saved and loaded on the device goes on as if it had not stopped."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megalith.checkpoint.native import Checkpointer, load
from tests.device.small import small_batch, small_engine

pytestmark = pytest.mark.device


def steps(engine, first, last):
    return [engine.train_step(small_batch(step)).loss for step in range(first, last)]


def interrupted(device, precision, folder):
    """Two steps, saved, loaded into an engine of another seed, two more. → the last losses and the engine."""
    begun = small_engine(device, precision)
    steps(begun, 0, 2)
    saver = Checkpointer(folder, begun.topology)
    saved = saver.save(2, begun.tensors(), begun.state_dict(), config_yaml="")
    engine = small_engine(device, precision)
    for tensor in engine.tensors().values():
        tensor.fill_(0.125)
    engine.load_state_dict(load(saved, engine.tensors()))
    restored, live = engine.tensors(), begun.tensors()
    assert all(torch.equal(restored[name], tensor) for name, tensor in live.items())
    assert all(tensor.device.type == device.type for tensor in restored.values())
    return steps(engine, 2, 4), engine


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_it_is_the_same_run_to_the_bit(device, precision, tmp_path):
    """With attention written out: the flash kernels' backward adds in an order that changes from run to run."""
    with sdpa_kernel(SDPBackend.MATH):
        whole = small_engine(device, precision)
        wanted = steps(whole, 0, 4)[2:]
        found, engine = interrupted(device, precision, tmp_path)
    assert found == wanted
    left, right = engine.tensors(), whole.tensors()
    assert all(torch.equal(left[name], tensor) for name, tensor in right.items())


def test_with_the_fast_kernels_it_is_the_same_run_to_rounding(device, tmp_path):
    wanted = steps(small_engine(device, "bf16-mixed"), 0, 4)[2:]
    found, _ = interrupted(device, "bf16-mixed", tmp_path)
    assert found == pytest.approx(wanted, rel=1e-3)
