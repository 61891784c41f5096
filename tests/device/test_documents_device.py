"""Document masks on the device (flex attention on a GPU): equal to SDPA's mask, and no document sees another."""

from __future__ import annotations

import pytest
import torch

from megalith.topology.hardware import compiler_problem
from tests.device.small import VOCABULARY, document_numbers, small_batch, small_engine

pytestmark = pytest.mark.device
LIMITS = {"32": 1e-4, "bf16-mixed": 3e-2}


def run(engine, batch, direction, where):
    """→ logits, and the gradient of their weighted sum over `where` by the embedded tokens."""
    model, device = engine.model.train(), engine.topology.device
    embedded = []
    hook = model.drop_embedding.register_forward_pre_hook(lambda _, args: embedded.append(args[0]))
    keys = torch.arange(len(batch["tokens"]), device=device)
    tokens, documents = (batch[name].to(device) for name in ("tokens", "documents"))
    logits = model.logits(model(tokens, keys=keys, documents=documents))
    hook.remove()
    chosen = (logits.float() * direction)[where].sum()
    return logits.detach().float(), torch.autograd.grad(chosen, embedded[0])[0]


def near(left, right, limit):
    return (left - right).abs().max() <= limit * right.abs().max()


@pytest.mark.parametrize("precision", LIMITS)
def test_flex_equals_a_mask(device, precision):
    flex = small_engine(device, precision)
    mask = small_engine(device, precision, model={"attention_core": "sdpa"})
    core = flex.model.blocks["0"].attention.core
    assert core.wants_blocks(device) == (device.type == "cuda")
    batch = small_batch(documents=True)
    everywhere = torch.ones_like(batch["tokens"], dtype=torch.bool, device=device)
    direction = torch.randn(*everywhere.shape, VOCABULARY, device=device)
    (a, x), (b, y) = (run(engine, batch, direction, everywhere) for engine in (flex, mask))
    assert near(a, b, LIMITS[precision])
    assert near(x, y, LIMITS[precision])
    losses = [engine.forward_backward(batch)["loss"].item() for engine in (flex, mask)]
    assert losses[0] == pytest.approx(losses[1], rel=LIMITS[precision] / 10)
    for name, parameter in flex.trainable.items():
        assert near(parameter.grad, mask.trainable[name].grad, LIMITS[precision]), name


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_editing_a_document_leaves_the_others_unchanged(device, compiled):
    if compiled and (problem := compiler_problem(device)):
        pytest.skip(problem)
    engine = small_engine(device, "bf16-mixed", compile=compiled)
    batch = small_batch(documents=True)
    documents = document_numbers().to(device)
    first = documents == 0
    other = {**batch, "tokens": torch.where(first.cpu(), (batch["tokens"] + 1) % VOCABULARY, batch["tokens"])}
    direction = torch.randn(*first.shape, VOCABULARY, device=device)
    before, gradient = run(engine, batch, direction, ~first)
    after, again = run(engine, other, direction, ~first)
    assert (before - after)[~first].abs().max() == 0
    assert (before - after)[first].abs().max() > 1e-3
    assert gradient[first].abs().max() == 0
    assert gradient[~first].abs().max() > 1e-3
    assert near(again[~first], gradient[~first], 1e-5)
    _, backwards = run(engine, batch, direction, first)
    assert backwards[~first].abs().max() == 0
