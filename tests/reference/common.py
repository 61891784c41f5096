"""What the reference tests share: random weights, comparison by the largest number, tables of options."""

from __future__ import annotations

import itertools

import torch

from megalith.models.gpt import GPT
from megalith.topology.rng import initialise

TOLERANCE = 1e-10


def random_model(config, seed=0, model_class=GPT):
    """A float64 model whose every number is random: norms and biases too, which start at 1 and 0."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    model = model_class(config)
    torch.set_default_dtype(default)
    initialise(model.named_parameters(), model.init_rules(), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.eval()


def mean_loss(model, tokens, targets, **inputs):
    """The loss as training computes it: chunked, with its own gradients."""
    term = model.loss(model(tokens, **inputs), targets)["lm"]
    return term.sum / term.count


def assert_close(name, ours, theirs, tolerance=TOLERANCE):
    largest = theirs.abs().max().clamp(min=1e-30)
    error = ((ours - theirs).abs().max() / largest).item()
    assert error <= tolerance, f"{name}: {error:.1e} of its largest number {largest:.1e}"


def rows(table, factors):
    """Lines of a table → dictionaries; every value must be one of the factor's."""
    found = [dict(zip(factors, line.split(), strict=True)) for line in table.strip().splitlines()]
    for row in found:
        for factor, value in row.items():
            assert value in factors[factor], (factor, value)
    return found


def missing_pairs(table, factors):
    """Pairs of values of two factors that no row of the table has."""
    have = {pair for row in table for pair in itertools.combinations(row.items(), 2)}
    return [
        ((a, x), (b, y))
        for a, b in itertools.combinations(factors, 2)
        for x in factors[a]
        for y in factors[b]
        if ((a, x), (b, y)) not in have
    ]
