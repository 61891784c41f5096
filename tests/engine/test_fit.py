"""The plain loop: rhythm, stop, resume, and it learns."""

from __future__ import annotations

import inspect
from itertools import count

import pytest
import torch

from megalith.engine import fit as module
from megalith.engine.fit import Every, fit
from megalith.errors import DataError
from tests.engine.tiny import VOCABULARY, snapshot, tiny_batch, tiny_engine


def batches(first=0):
    return (tiny_batch(step) for step in count(first))


def test_rhythm():
    calls = []
    engine = tiny_engine()
    result = fit(
        engine,
        batches(),
        max_steps=7,
        log=Every(3, lambda e, report: calls.append(("log", e.step, len(report.results)))),
        validate=Every(3, lambda e: calls.append(("validate", e.step))),
        save=Every(4, lambda e: calls.append(("save", e.step))),
    )
    assert calls == [
        ("log", 3, 3),
        ("validate", 3),
        ("save", 4),
        ("log", 6, 3),
        ("validate", 6),
        ("log", 7, 1),
        ("save", 7),
    ]
    assert result is not None
    assert result.loss > 0
    assert engine.consumed_samples == 56


def test_stop_and_go_on_equals_one_run():
    whole, parts = tiny_engine(), tiny_engine()
    fit(whole, batches(), max_steps=5)
    fit(parts, batches(), max_steps=2)
    fit(parts, batches(parts.step), max_steps=5)
    left, right = snapshot(whole), snapshot(parts)
    assert all(torch.equal(left[n], right[n]) for n in left)


def test_a_finished_run_does_nothing():
    engine = tiny_engine()
    fit(engine, batches(), max_steps=1)
    assert fit(engine, batches(), max_steps=1) is None


def test_batches_that_end_early_are_an_error():
    with pytest.raises(DataError, match="end at step 2 of 3"):
        fit(tiny_engine(), iter([tiny_batch(0), tiny_batch(1)]), max_steps=3)


def test_it_learns():
    """Counting modulo the vocabulary is learnt from ln 100 = 4.6 to almost nothing."""

    def counting():
        for step in count():
            first = torch.randint(VOCABULARY, (8, 1), generator=torch.Generator().manual_seed(step))
            text = (first + torch.arange(9)) % VOCABULARY
            yield {"tokens": text[:, :-1], "targets": text[:, 1:], "sample": torch.arange(8) + 8 * step}

    engine = tiny_engine(
        precision="32",
        model={"hidden_size": 64},
        optim={"eps": 1e-8, "lr": 5e-3, "weight_decay": 0.0, "sched": {"name": "constant"}},
        micro_batch_size=8,
        clip=1.0,
    )
    fit(engine, counting(), max_steps=150)
    total, number = engine.evaluate([next(counting())])["lm"]
    assert total / number < 0.2


def test_the_loop_stays_plain():
    assert len(inspect.getsource(module).splitlines()) <= 150
