"""Recomputation changes the memory and nothing else: gradients are equal with every kind of dropout on."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megalith.errors import ConfigError
from megalith.models.gpt import GPT
from megalith.nn.dropout import sample_keys
from megalith.parallel.apply import build
from megalith.parallel.memory import Recompute
from megalith.topology.topology import Topology
from tests.engine.tiny import tiny_config

LAYERS, BATCH, LENGTH, WIDTH = 4, 4, 64, 32
HOW = {
    "uniform 1": Recompute("full", "uniform", 1),
    "uniform 2": Recompute("full", "uniform", 2),
    "uniform 3": Recompute("full", "uniform", 3),
    "uniform 9": Recompute("full", "uniform", 9),
    "block 1": Recompute("full", "block", 1),
    "block 3": Recompute("full", "block", 3),
    "block 9": Recompute("full", "block", 9),
    "selective": Recompute("selective"),
}


def model_of(how, precision="64", **changes):
    shape = {"num_layers": LAYERS, "hidden_size": WIDTH, "max_position_embeddings": LENGTH}
    config = tiny_config(**{**shape, "attention_dropout": 0.1, **changes})
    (model,) = build(GPT, config, Topology.single(), seed=1, precision=precision, recompute=how)
    return model


def batch_of():
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(100, (BATCH, LENGTH + 1), generator=generator)
    documents = (torch.arange(LENGTH) // 20).int().expand(BATCH, -1)
    return text[:, :-1], text[:, 1:], documents


def loss_of(model, documents=False):
    tokens, targets, numbers = batch_of()
    hidden = model(
        tokens, keys=sample_keys(1, 0, torch.arange(BATCH)), documents=numbers if documents else None
    )
    return model.loss(hidden, targets)["lm"].sum


def gradients_of(model, documents=False):
    loss_of(model, documents).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_gradients_are_equal(how):
    expected, found = gradients_of(model_of(None)), gradients_of(model_of(how))
    assert max((expected[n] - found[n]).abs().max().item() for n in expected) == 0.0


@pytest.mark.parametrize("how", [HOW["uniform 2"], HOW["selective"]], ids=str)
@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_gradients_are_equal_with_documents_and_rotary_positions(how, precision):
    options = {"precision": precision, "position_embedding_type": "rope", "attention_dropout": 0.0}
    expected = gradients_of(model_of(None, **options), documents=True)
    found = gradients_of(model_of(how, **options), documents=True)
    assert all(torch.equal(expected[n], found[n]) for n in expected)


def test_dropout_is_really_on():
    first, second = model_of(None), model_of(None, hidden_dropout=0.0, attention_dropout=0.0)
    assert (loss_of(first) - loss_of(second)).abs() > 1e-6


def retained(model):
    """Bytes that a forward leaves allocated for its backward."""
    loss_of(model)  # first-call caches
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        loss = loss_of(model)
    del loss
    return sum(event.self_cpu_memory_usage for event in trace.events())


def test_each_kind_keeps_what_it_says():
    # The profiler loses an event now and then, hence the most frequent of several measurements.
    kept = {
        name: statistics.mode(retained(model_of(how, "32")) for _ in range(5))
        for name, how in {"none": None, **HOW}.items()
    }
    stream = BATCH * LENGTH * WIDTH * 4  # the input of one layer, fp32
    scores = BATCH * 4 * LENGTH * LENGTH * 4  # one (B, H, T, S) tensor, fp32
    assert kept["uniform 1"] - kept["uniform 2"] == 2 * stream
    assert kept["uniform 2"] - kept["uniform 9"] == stream
    assert kept["uniform 3"] == kept["uniform 2"]
    layer = kept["none"] - kept["block 1"]  # what recomputing one layer saves
    assert layer > 10 * stream
    assert abs(kept["none"] - kept["block 3"] - 3 * layer) <= 3 * stream
    assert kept["block 9"] == kept["uniform 1"]
    assert kept["none"] - kept["selective"] > LAYERS * 2 * scores  # probabilities before and behind dropout
    assert kept["selective"] > kept["uniform 1"] + LAYERS * 4 * stream  # all the rest is still there


def test_evaluation_recomputes_nothing():
    plain, wrapped = model_of(None).eval(), model_of(HOW["uniform 2"]).eval()
    with torch.no_grad():
        assert torch.equal(loss_of(plain), loss_of(wrapped))


def test_an_interrupted_forward_leaves_nothing_behind():
    model = model_of(HOW["uniform 3"])
    broken = model.blocks["1"].forward
    model.blocks["1"].forward = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        loss_of(model)
    model.blocks["1"].forward = broken
    expected, found = gradients_of(model_of(None)), gradients_of(model)
    assert all(torch.equal(expected[n], found[n]) for n in expected)


def test_keys_of_the_config():
    assert Recompute.from_keys(None, None, 1) is None
    assert Recompute.from_keys("selective", None, None) == Recompute("selective")
    assert Recompute.from_keys(None, "block", 3) == Recompute("full", "block", 3)
    assert Recompute.from_keys("full", None, 2) == Recompute("full", "uniform", 2)
    with pytest.raises(ConfigError) as caught:
        Recompute.from_keys("partial", "blocks", 0)
    assert len(caught.value.problems) == 3
