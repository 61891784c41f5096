"""Logits of weights that stay in their files: those of the model itself, whatever the family; and what ends them in the middle."""

from __future__ import annotations

import pytest
import torch

from megalith.checkpoint.convert.streamed import logits
from megalith.models.config import ModelConfig
from tests.checkpoint.convert.test_twins import Live
from tests.checkpoint.foreign_files import GPT2_LIKE, LLAMA_LIKE, random_model

TOKENS = torch.tensor([3, 0, 28, 28, 7])


@pytest.fixture(scope="module", params=[GPT2_LIKE, LLAMA_LIKE], ids=["tied", "gated"])
def model(request):
    return random_model(ModelConfig(**request.param)).eval()


def lazies(model):
    return {name: Live(parameter.detach(), name) for name, parameter in model.named_parameters()}


def test_they_are_the_models_own(model):
    tensors, told = lazies(model), []
    found = logits(model.config, tensors, TOKENS, torch.float64, told.append)
    with torch.no_grad():
        expected = model.logits(model(TOKENS[None]))[0]
    torch.testing.assert_close(found, expected[:, : model.config.vocab_size], rtol=0, atol=1e-12)
    assert sum(told) <= sum(lazy.nbytes for lazy in tensors.values())


def test_a_tensor_that_cannot_be_read_is_told(model):
    def broken():
        raise EOFError("the file became shorter")

    for name in ("blocks.0.attention.out.weight", "blocks.3.mlp.down.weight"):
        tensors = lazies(model)
        tensors[name].read = broken
        with pytest.raises(EOFError, match="became shorter"):
            logits(model.config, tensors, TOKENS, torch.float64)


@pytest.mark.parametrize("after", [1, 2, 9])
def test_an_interruption_ends_it(model, after):
    calls = iter(range(1000))

    def step(count):
        if next(calls) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        logits(model.config, lazies(model), TOKENS, torch.float64, step)
