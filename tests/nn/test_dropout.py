"""Keyed dropout: a mask is a function of (seed, step, sample, layer, site, position, channel), and looks random."""

from __future__ import annotations

import pytest
import torch

from megalith.nn.dropout import (
    SITE_ATTENTION,
    SITE_MLP,
    SITE_PROBABILITIES,
    Dropout,
    ProbabilityDropout,
    layer_keys,
    mix,
    mix_,
    sample_keys,
)

GOLDEN_MIX = [0, 824515495, 1722258072, 539527247]
GOLDEN_KEYS = [2294546807, 220300305, 3801539902]
SHAPE = (16, 128, 256)


def dropped(site=SITE_ATTENTION, rate=0.1, seed=1, step=2, layer=0, samples=range(16), shape=SHAPE):
    keys = layer_keys(sample_keys(seed, step, torch.tensor(list(samples))), layer)
    return Dropout(rate, site)(torch.ones(len(keys), *shape[1:]), keys) == 0


def test_hash_is_the_same_in_both_widths():
    words = torch.randint(-(2**31), 2**31, (10000,), generator=torch.Generator().manual_seed(0))
    wide = mix(words & 0xFFFFFFFF)
    narrow = mix_(words.to(torch.int32))
    assert torch.equal(narrow.long() & 0xFFFFFFFF, wide)
    assert len(wide.unique()) == len(words.unique())  # bijective


def test_hash_golden():
    """Pinned: other numbers would be other dropout in a resumed run."""
    assert mix(torch.tensor([0, 1, 2, 0xFFFFFFFF])).tolist() == GOLDEN_MIX
    assert sample_keys(1234, 5, torch.tensor([0, 1, 2**33])).tolist() == GOLDEN_KEYS


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_rate(rate):
    mask = dropped(rate=rate).double()
    sigma = (rate * (1 - rate) / mask.numel()) ** 0.5
    assert abs(mask.mean() - rate) < 5 * sigma
    per_sample = (rate * (1 - rate) / mask[0].numel()) ** 0.5
    assert (mask.mean((1, 2)) - rate).abs().max() < 5 * per_sample


def correlation(a, b):
    a, b = a.double().flatten(), b.double().flatten()
    return (((a - 0.1) * (b - 0.1)).mean() / 0.09).abs().item()


def test_independent_of_its_neighbours():
    """Between channels, positions, samples, sites, layers, steps and seeds: within 5 σ of no correlation."""
    mask = dropped()
    bound = 5 / mask.numel() ** 0.5
    pairs = {
        "channel": (mask[..., 1:], mask[..., :-1]),
        "position": (mask[:, 1:], mask[:, :-1]),
        "sample": (mask[1:], mask[:-1]),
        "site": (mask, dropped(site=SITE_MLP)),
        "layer": (mask, dropped(layer=1)),
        "step": (mask, dropped(step=3)),
        "seed": (mask, dropped(seed=2)),
        "far seed": (mask, dropped(seed=1 + 2**32)),
    }
    for name, (a, b) in pairs.items():
        assert correlation(a, b) < bound * 1.1, name


def test_no_two_rows_share_a_pattern():
    """Not even shuffled: the numbers of dropped channels of all rows spread as binomials do."""
    mask = dropped().flatten(0, 1)
    assert len({tuple(row.nonzero().flatten().tolist()) for row in mask}) == len(mask)
    counts = mask.sum(1).double()
    assert abs(counts.var() / (256 * 0.09) - 1) < 0.2


def test_same_mask_for_any_micro_batch():
    whole = dropped()
    for low, high in ((0, 5), (5, 6), (6, 16)):
        assert torch.equal(dropped(samples=range(low, high)), whole[low:high])


def test_keys_hold_large_sample_numbers_and_negative_seeds():
    keys = sample_keys(-5, 2**33, torch.tensor([0, 2**32, 2**40, 2**62]))
    assert len(keys.unique()) == 4
    assert keys.min() >= 0
    assert keys.max() < 2**32


def test_value_and_gradient():
    x = torch.randn(2, 8, 16, dtype=torch.float64, requires_grad=True)
    keys = sample_keys(0, 0, torch.arange(2))
    y = Dropout(0.25, SITE_MLP)(x, keys)
    mask = y == 0
    assert 0 < mask.sum() < mask.numel()
    assert torch.equal(y[~mask], x[~mask] / 0.75) or torch.allclose(
        y[~mask], x[~mask] / 0.75, rtol=1e-15, atol=0
    )
    y.sum().backward()
    assert torch.equal(x.grad != 0, ~mask)


def test_half_precision_is_not_biased():
    """1/0.9 rounded to bf16 would be 0.16 % small; the product is rounded instead."""
    x = torch.full((1, 64, 64), 9.0, dtype=torch.bfloat16)
    y = Dropout(0.1, SITE_MLP)(x, sample_keys(0, 0, torch.arange(1)))
    assert set(y.flatten().tolist()) == {0.0, 10.0}


def test_off_in_evaluation_and_at_rate_zero():
    x = torch.randn(2, 3, 4)
    assert Dropout(0.0, SITE_MLP)(x, None) is x
    assert Dropout(0.5, SITE_MLP).eval()(x, None) is x


def test_training_without_keys_says_what_to_do():
    with pytest.raises(ValueError, match="sample_keys"):
        Dropout(0.5, SITE_MLP)(torch.ones(1, 1, 1), None)


def test_probabilities_by_head():
    keys = sample_keys(0, 0, torch.arange(4))
    drop = ProbabilityDropout(0.1, SITE_PROBABILITIES)
    mask = drop(torch.ones(4, 8, 64, 64), keys) == 0
    sigma = (0.09 / mask.numel()) ** 0.5
    assert abs(mask.double().mean() - 0.1) < 5 * sigma
    assert correlation(mask[:, 1:], mask[:, :-1]) < 5.5 / mask.numel() ** 0.5
    drop.heads = lambda count, device: torch.arange(2, 2 + count)  # what a tensor-parallel rank says
    assert torch.equal(drop(torch.ones(4, 3, 64, 64), keys) == 0, mask[:, 2:5])


def test_rows_of_a_sequence_shard():
    keys = sample_keys(0, 0, torch.arange(2))
    drop = Dropout(0.3, SITE_MLP)
    whole = drop(torch.ones(2, 12, 8), keys)
    drop.rows = lambda length, device: torch.tensor([3, 4, 9, 10])  # a context-parallel rank's positions
    assert torch.equal(drop(torch.ones(2, 4, 8), keys), whole[:, [3, 4, 9, 10]])
