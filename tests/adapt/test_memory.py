"""Frozen weights cost their own bytes and nothing besides: no gradients, no moments, no copies."""

from __future__ import annotations

import pytest
import torch

from megalith.adapt.p_tuning import PTuning
from megalith.adapt.prompts import NewPrompt
from megalith.adapt.soft_prompt import SoftPrompts
from megalith.engine.engine import Engine
from megalith.models.config import ModelConfig
from megalith.models.gpt import GPT
from megalith.optim.config import OptimConfig
from megalith.optim.schedule import make_schedule
from megalith.parallel.apply import build
from megalith.testing.memory import TensorBytes
from megalith.topology.topology import Topology

CONFIG = ModelConfig(
    vocab_size=512,
    hidden_size=256,
    num_layers=4,
    num_attention_heads=4,
    max_position_embeddings=64,
    hidden_dropout=0.0,
)
METHODS = {
    "soft prompt": SoftPrompts([NewPrompt("a", 2)]),
    "p-tuning": PTuning([NewPrompt("a", 2)], kind="mlp"),
    "": None,
}


def peak_over_weights(method):
    """Of a step on eight tokens, so that activations are small beside the weights."""
    topology, optim = Topology.single(), OptimConfig(lr=0.01)
    stages = build(GPT, CONFIG, topology, seed=1, adapt=method and method.install)
    parameters = list(stages[0].parameters())
    engine = Engine(
        stages, topology, optim=optim, seed=1, micro_batch_size=1, frozen=method.frozen if method else (),
        schedule=make_schedule(optim, max_steps=9, global_batch=1, sequence_length=8),
    )  # fmt: skip
    tokens = torch.arange(500, 508)[None] if method is None else torch.arange(506, 514)[None]
    batch = {"tokens": tokens, "targets": tokens % 512, "sample": torch.zeros(1, dtype=torch.long)}
    engine.train_step(batch)
    engine.zero_gradients()
    moments = [t for state in engine.optimizer.state.values() for t in state.values()]
    with TensorBytes([*parameters, *moments]) as seen:
        engine.train_step(batch)
    return seen.peak / sum(p.numel() * p.element_size() for p in parameters)


@pytest.mark.parametrize(("name", "most"), [("soft prompt", 1.1), ("p-tuning", 1.3)])
def test_frozen_weights_are_held_once(name, most):
    assert 1 < peak_over_weights(METHODS[name]) < most


def test_weights_that_learn_are_held_four_times():
    """The control: a gradient and two moments each."""
    assert peak_over_weights(METHODS[""]) > 3.9


def test_bytes_are_counted_once_and_given_back():
    with TensorBytes([kept := torch.zeros(1000)]) as seen:
        view = kept[:10]
        made = torch.ones(1000)
        del made
        other = torch.ones(500)
    assert (seen.now, seen.peak) == (4000 + 2000, 8000)
    assert view.sum() + other.sum() == 500
