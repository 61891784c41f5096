"""Decoding: the cache changes nothing, neighbours change nothing, ends are honoured."""

import pytest
import torch

from megalith.errors import DataError
from megalith.generate.engine import decode
from megalith.generate.sampling import Sampling
from megalith.models.config import ModelConfig
from megalith.models.gpt import GPT
from megalith.parallel.apply import build
from megalith.topology.topology import Topology


def tiny(**options) -> GPT:
    config = ModelConfig(
        vocab_size=61,
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        max_position_embeddings=48,
        **options,
    )
    (model,) = build(GPT, config, Topology.single(), seed=3, precision="64")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # larger weights: predictions worth deciding between
    return model


def run(model, prompts, sampling, **options):
    *_, rows = decode(model, prompts, sampling, eod=options.pop("eod", None), **options)
    return [row.tokens for row in rows], rows


VARIANTS = [
    {},
    {
        "position_embedding_type": "rope",
        "num_query_groups": 2,
        "normalization": "rmsnorm",
        "activation": "swiglu",
    },
    {"position_embedding_type": "relative"},
]


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize(
    "sampling", [Sampling(tokens_to_generate=20), Sampling(temperature=1.3, top_p=0.9, tokens_to_generate=20)]
)
def test_cache_equals_no_cache_and_batch_equals_single(options, sampling):
    model = tiny(**options)
    prompts = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7]]
    together, rows = run(model, prompts, sampling)
    assert together == run(model, prompts, sampling, recompute=True)[0]
    for i, prompt in enumerate(prompts):
        alone, (row,) = run(model, [prompt], sampling, first_row=i)
        assert alone[0] == together[i]
        assert row.logprobs == pytest.approx(rows[i].logprobs, abs=1e-9)
        assert len(row.continuation) == 20
        assert together[i][: len(prompt)] == prompt


def test_greedy_takes_the_most_probable_token():
    model = tiny()
    tokens, (row,) = run(model, [[3, 1]], Sampling(tokens_to_generate=6))
    with torch.inference_mode():
        logits = model.logits(model(torch.tensor(tokens)))[0]
    assert logits[1:-1].argmax(-1).tolist() == row.continuation
    logprobs = logits.float().log_softmax(-1)[1:-1].max(-1).values
    assert row.logprobs == pytest.approx(logprobs.tolist(), abs=1e-5)


def test_end_of_document_ends_a_row_and_minimum_delays_it():
    model = tiny()
    (tokens,), _ = run(model, [[3, 1]], Sampling(tokens_to_generate=8))
    eod = tokens[4]
    (ended,), (row,) = run(model, [[3, 1]], Sampling(tokens_to_generate=8), eod=eod)
    assert ended == tokens[:5]
    assert row.finished == "eod"
    (later,), (row,) = run(model, [[3, 1]], Sampling(tokens_to_generate=8, min_tokens_to_generate=6), eod=eod)
    assert eod not in later[2:8]


def test_the_position_table_ends_a_row():
    model = tiny()
    (tokens,), (row,) = run(model, [[1] * 40], Sampling(tokens_to_generate=100))
    assert len(tokens) == 48
    assert row.finished == "length"
    with pytest.raises(DataError, match="48 at most"):
        run(model, [[1] * 48], Sampling())
    with pytest.raises(DataError, match="empty prompt"):
        run(model, [[]], Sampling())


def test_nothing_asked_for_is_nothing_generated():
    (tokens,), (row,) = run(tiny(), [[3, 1]], Sampling(tokens_to_generate=0))
    assert tokens == [3, 1]
    assert row.continuation == []
