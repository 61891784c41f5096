"""Compiled block by block: one graph for all blocks and one for the loss, losses as without, document masks included."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.utils as dynamo

from megalith.topology.hardware import compiler_problem
from tests.device.small import gradients, small_batch, small_engine, worst

pytestmark = pytest.mark.device


@pytest.mark.parametrize("documents", [False, True], ids=["plain", "documents"])
def test_compiled_equals_eager_and_is_one_graph(device, documents):
    if problem := compiler_problem(device):
        pytest.skip(problem)
    plain = small_engine(device, "bf16-mixed")
    compiled = small_engine(device, "bf16-mixed", compile=True)
    dynamo.counters.clear()
    batches = [small_batch(step, documents=documents) for step in range(3)]
    found = [compiled.train_step(batch).loss for batch in batches]
    assert dynamo.counters["stats"]["unique_graphs"] == 2
    assert not dynamo.counters["recompiles"]
    assert found == pytest.approx([plain.train_step(batch).loss for batch in batches], rel=3e-3)


def test_compiled_gradients_are_as_near_to_float64_as_eager_ones(device):
    if problem := compiler_problem(device):
        pytest.skip(problem)
    exact = small_engine(torch.device("cpu"), "64")
    exact.forward_backward(small_batch())
    errors = []
    for compiled in (False, True):
        engine = small_engine(device, "bf16-mixed", compile=compiled)
        engine.forward_backward(small_batch())
        errors.append(worst(gradients(engine), gradients(exact)))
    assert errors[1] < 1.5 * errors[0]
