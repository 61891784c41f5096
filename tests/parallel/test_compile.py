"""One graph for all blocks and one for the loss, the same gradients, with dropout and recomputation on."""

from __future__ import annotations

import pytest
import torch

from megalith.parallel.memory import Recompute
from megalith.topology.hardware import compiler_problem
from tests.engine.tiny import gradients, tiny_batch, tiny_engine

needs_compiler = pytest.mark.skipif(
    bool(compiler_problem(torch.device("cpu"))), reason="torch.compile needs a C++ compiler"
)


@needs_compiler
@pytest.mark.slow
def test_twelve_blocks_and_the_loss_make_two_graphs():
    import torch._dynamo.utils as dynamo

    torch._dynamo.reset()
    dynamo.counters.clear()
    model = {"num_layers": 12}
    plain = tiny_engine(model=model)
    compiled = tiny_engine(
        model=model, building={"compile": True, "recompute": Recompute("full", "uniform", 2)}
    )
    for step in range(3):
        a, b = plain.train_step(tiny_batch(step)), compiled.train_step(tiny_batch(step))
        assert b.loss == pytest.approx(a.loss, abs=1e-12)
    left, right = gradients(plain), gradients(compiled)
    assert max(((left[n] - right[n]).abs().max() / left[n].abs().max()).item() for n in left) < 1e-10
    assert dynamo.counters["stats"]["unique_graphs"] == 2
    assert not dynamo.counters["recompiles"]


@needs_compiler
@pytest.mark.slow
def test_selective_recomputation_inside_a_compiled_block():
    torch._dynamo.reset()
    model = {"attention_dropout": 0.1}
    plain = tiny_engine(model=model)
    compiled = tiny_engine(model=model, building={"compile": True, "recompute": Recompute("selective")})
    plain.forward_backward(tiny_batch())
    compiled.forward_backward(tiny_batch())
    left, right = gradients(plain), gradients(compiled)
    assert max(((left[n] - right[n]).abs().max() / left[n].abs().max()).item() for n in left) < 1e-10


@needs_compiler
@pytest.mark.slow
def test_names_and_print_stay():
    plain, compiled = tiny_engine(), tiny_engine(building={"compile": True})
    assert list(plain.parameters) == list(compiled.parameters)
    assert repr(plain.model) == repr(compiled.model)
