"""Scoring a checkpoint's model: equal to the obvious loop, whatever the batch, the window and the source."""

import math

import numpy as np
import pytest
import torch

from megalith.errors import ConfigError, DataError
from megalith.evaluate.perplexity import Request, evaluate
from megalith.evaluate.windows import score
from megalith.generate.loading import Loaded
from megalith.models.config import ModelConfig
from megalith.models.family import describe
from megalith.models.gpt import GPT
from megalith.parallel.apply import build
from megalith.topology.topology import Topology


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        vocab_size=37, num_layers=2, hidden_size=16, num_attention_heads=2, max_position_embeddings=12
    )
    (built,) = build(GPT, config, Topology.single(), seed=5, precision="64")
    with torch.no_grad():
        for p in built.parameters():
            p.mul_(6)
    return built.eval()


def obvious(model, tokens, length, stride):
    """One target at a time, each with the context that its window gives it."""
    total, start = 0.0, 0
    for target in range(1, len(tokens)):
        while target > start + length:
            start += stride
        context = torch.tensor(tokens[start:target])[None]
        with torch.inference_mode():
            logits = model.logits(model(context))[0, -1]
        total -= float(logits.log_softmax(-1)[tokens[target]])
    return total


@pytest.mark.parametrize(("length", "stride"), [(12, 12), (12, 5), (7, 1), (3, 2)])
@pytest.mark.parametrize("n", [2, 8, 13, 40])
def test_score_equals_the_obvious_loop_for_any_batch(model, length, stride, n):
    tokens = np.random.default_rng(n).integers(0, 37, n)
    expected = obvious(model, tokens.tolist(), length, stride)
    for batch_size in (1, 3, 64):
        result = score(model, tokens, length=length, stride=stride, batch_size=batch_size)
        assert result.targets == n - 1
        assert result.total == pytest.approx(expected, rel=1e-12)


def test_numbers(model):
    tokens = np.random.default_rng(0).integers(0, 37, 50)
    result = score(model, tokens, length=12)
    assert result.perplexity == pytest.approx(math.exp(result.total / 49))
    assert result.bits_per_byte(10) == pytest.approx(result.total / math.log(2) / 10)


def test_bad_requests_are_refused(model):
    with pytest.raises(DataError, match="no target"):
        score(model, np.array([3]), length=12)
    with pytest.raises(ConfigError, match="between 1 and the window length"):
        score(model, np.arange(5), length=4, stride=9)


def test_a_file_of_another_vocabulary_is_refused(model, tmp_path):
    from megalith.data.indexed.builder import IndexedWriter

    writer = IndexedWriter(tmp_path / "x", np.uint16)
    writer.add_item(np.array([1, 2, 99]))
    writer.end_document()
    writer.finish()
    state = {"step": 0, "seed": 1, **describe("gpt", model.config)}
    loaded = Loaded(model, None, tmp_path, state)
    with pytest.raises(DataError, match="token id 99"):
        evaluate(loaded, Request(data=str(tmp_path / "x")))


def test_the_window_is_the_length_that_the_model_was_trained_on(model, tmp_path):
    from megalith.data.indexed.builder import IndexedWriter

    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_item(np.arange(30))
        writer.end_document()
    known = describe("gpt", model.config)
    for plan, length in (({}, 12), ({"data_plan": {"train": {"seq_length": 7}}}, 7)):
        report = evaluate(Loaded(model, None, tmp_path, {**known, **plan}), Request(data=str(tmp_path / "x")))
        assert report.seq_length == length
