"""One process: the built model's numbers come from the seed and the names alone, whatever the precision or the pass."""

from __future__ import annotations

import inspect

import pytest
import torch

from megalith.models.gpt import GPT
from megalith.parallel import apply
from megalith.parallel.memory import Recompute
from megalith.topology.topology import Topology
from tests.engine.tiny import LENGTH, VOCABULARY, tiny_config


def built(seed=3, **how):
    (model,) = apply.build(GPT, tiny_config(), Topology.single("cpu"), seed=seed, **how)
    return model


def test_nothing_is_left_on_meta():
    model = built()
    tensors = [*model.parameters(), *model.buffers()]
    assert tensors
    assert all(t.device.type == "cpu" and t.isfinite().all() for t in tensors)


def test_weights_are_a_function_of_the_seed():
    first, again, other = built(), built(), built(seed=4)
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.unique().numel() == 1 or not torch.equal(a, c), name


@pytest.mark.parametrize(
    "how", [{"precision": "bf16-mixed"}, {"precision": "64"}, {"recompute": Recompute()}]
)
def test_weights_and_names_do_not_depend_on_the_pass(how):
    plain, other = dict(built().named_parameters()), dict(built(**how).named_parameters())
    assert plain.keys() == other.keys()
    assert all(torch.equal(plain[name].to(p.dtype), p) for name, p in other.items())


@pytest.mark.parametrize(
    ("precision", "stored", "product"),
    [
        ("32", torch.float32, torch.float32),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("16-mixed", torch.float32, torch.float16),
        ("64", torch.float64, torch.float64),
    ],
)
def test_precision_sets_products_and_keeps_masters_and_stream(precision, stored, product):
    model = built(precision=precision)
    assert {p.dtype for p in model.parameters()} == {stored}
    seen = {}
    model.blocks["0"].mlp.up.register_forward_hook(lambda m, i, o: seen.update(product=o.dtype))
    keys = torch.arange(2)
    hidden = model(torch.randint(VOCABULARY, (2, LENGTH)), keys=keys)
    assert (seen["product"], hidden.dtype) == (product, stored)


def test_the_order_of_passes_fits_on_a_page():
    assert len(inspect.getsource(apply).splitlines()) <= 60
