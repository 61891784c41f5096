"""Choosing tokens: filters against slow definitions, distribution, independence of the batch."""

import pytest
import torch

from megalith.errors import ConfigError
from megalith.generate.sampling import Sampling, choose, draw, filtered, forbid, most_probable, penalise


def slow_top_p(row, p):
    order = sorted(range(len(row)), key=lambda i: -row[i])
    probabilities = torch.tensor(row).softmax(-1)
    kept, total = [], 0.0
    for index in order:
        kept.append(index)
        total += float(probabilities[index])
        if total > p:
            break
    return set(kept)


@pytest.mark.parametrize("seed", range(5))
def test_top_p_keeps_the_crossing_token(seed):
    torch.manual_seed(seed)
    logits = torch.randn(3, 20) * 2
    out = filtered(logits, Sampling(top_p=0.7))
    for row, original in zip(out, logits.tolist(), strict=True):
        assert {i for i in range(20) if row[i] > float("-inf")} == slow_top_p(original, 0.7)


def test_top_k_and_top_p_both_apply():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert filtered(logits, Sampling(top_k=2)).isfinite().tolist() == [[True, True, False, False]]
    assert filtered(logits, Sampling(top_k=3, top_p=0.5)).isfinite().tolist() == [[True, False, False, False]]
    assert filtered(logits, Sampling(top_k=100, top_p=1.0)).isfinite().all()


def test_sampling_is_on_only_when_asked_for():
    assert not Sampling().samples
    assert not Sampling(top_k=1).samples
    assert not Sampling(temperature=0, num_samples=3).samples
    assert not Sampling(num_samples=2, greedy=True).samples
    for asked in ({"temperature": 1.0}, {"top_k": 2}, {"top_p": 0.9}, {"num_samples": 2}):
        assert Sampling(**asked).samples


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, float("-inf")]])
    draws = torch.cat([choose(logits, Sampling(temperature=1.0), [draw(0, 0, i)]) for i in range(4000)])
    shares = draws.bincount(minlength=4) / 4000
    assert torch.allclose(shares, logits.softmax(-1)[0], atol=0.03)
    assert shares[3] == 0


def test_the_ends_of_the_interval():
    logits = torch.tensor([[float("-inf"), 1.0, 2.0, float("-inf")]])
    assert choose(logits, Sampling(temperature=1.0), [0.0]).tolist() == [1]
    assert choose(logits, Sampling(temperature=1.0), [1.0]).tolist() == [
        2
    ]  # rounding up cannot reach a cut token


def test_draws_are_uniform_and_unlike():
    values = [draw(7, row, index, attempt) for row in range(20) for index in range(50) for attempt in (0, 1)]
    assert len(set(values)) == 2000
    assert all(0 <= v < 1 for v in values)
    assert abs(sum(values) / 2000 - 0.5) < 0.03


def test_penalty_and_ban():
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    seen = torch.tensor([[True, True, False]])
    assert penalise(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0]]
    assert penalise(logits, seen, 1.0) is logits
    assert forbid(logits, 0).tolist() == [[float("-inf"), -2.0, 1.0]]
    assert logits[0, 0] == 2.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_first_of_the_largest(dtype):
    logits = torch.tensor([[1.0, 5.0, 5.0], [-1.0, -2.0, -1.0], [0.0, 1.0, 3.0]], dtype=dtype)
    assert most_probable(logits).tolist() == [1, 0, 2]
    close = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    assert most_probable(close).tolist() == [1]


def test_every_bad_knob_is_named_at_once():
    with pytest.raises(ConfigError) as error:
        Sampling(temperature=-1, top_p=3, top_k=-2, tokens_to_generate=3, min_tokens_to_generate=4)
    assert {p.where for p in error.value.problems} == {
        "--temperature",
        "--top-p",
        "--top-k",
        "--min-tokens-to-generate",
    }


def test_greedy_contradicts_what_asks_for_draws():
    with pytest.raises(ConfigError) as error:
        Sampling(greedy=True, temperature=0.5, top_k=3, top_p=0.9)
    assert [p.where for p in error.value.problems] == [
        "--greedy, --temperature",
        "--greedy, --top-k",
        "--greedy, --top-p",
    ]
    assert not Sampling(greedy=True, temperature=0, top_k=1, top_p=0).samples
