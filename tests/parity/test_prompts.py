"""Prompts are tuned alike on every layout, before a frozen base: gradients of their matrices to 1e-10 in float64.

Rows of a batch have the virtual tokens of one tag, of another or none; three of them are cut between two ranks wherever a
sequence is. The base drops out as well, at its own places (`compat.frozen_dropout`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megalith.adapt.method import Method, Tag
from megalith.adapt.p_tuning import PTuning
from megalith.adapt.prompts import NewPrompt
from megalith.adapt.soft_prompt import SoftPrompts
from megalith.parallel.memory import Recompute
from megalith.testing.parity import Case, assert_parity, by_kind, compare, layouts, write_reference
from tests.parity.cases import BART, GATED, LLAMA, encoder_decoder, model

TEXT, RANDOM = NewPrompt("a", 3, (5, 129)), NewPrompt("b", 2)


def case(config: Any, method: Method, **how: Any) -> Case:
    return Case(config, micro_batch=3, micro_batches=4, adapt=method, **how)


CASES = {
    "gpt2": case(model(), SoftPrompts([TEXT, RANDOM])),
    "llama": case(model(**LLAMA), SoftPrompts([TEXT, RANDOM])),
    "p-tuning": case(model(), PTuning([TEXT], [Tag("before", 2, positions=True)])),
    "p-tuning mlp": case(model(**LLAMA), PTuning([TEXT, RANDOM], kind="mlp")),
    "second task": case(model(), SoftPrompts([RANDOM], [Tag("a", 3, positions=True)])),
    "recomputed": case(model(), SoftPrompts([TEXT, RANDOM]), recompute=Recompute("full", "uniform", 1)),
    "t5": case(encoder_decoder(), SoftPrompts([TEXT, RANDOM])),
    "t5 1.1": case(encoder_decoder(**GATED), SoftPrompts([TEXT, RANDOM])),
    "t5 p-tuning": case(encoder_decoder(), PTuning([TEXT, RANDOM])),
    "bart": case(encoder_decoder(**BART), SoftPrompts([TEXT, RANDOM])),
}
CASES["fp32"] = replace(CASES["gpt2"], precision="32")
CASES["compiled"] = replace(CASES["gpt2"], compile=True)
APART = ("fp32", "compiled")
LAYOUTS = layouts()
QUICK = {
    "gpt2": {
        "tp2", "tp2+sp", "pp2", "pp2-interleaved", "pp2-zero-bubble", "replicate2", "shard_optimizer2", "shard_all2",
        "cp2", "tp2×shard_all2", "tp2+sp×pp2-interleaved",
    },
    "t5": {"tp2+sp", "pp2-interleaved", "pp2-zero-bubble", "shard_all2", "cp2"},
    "p-tuning": {"tp2+sp", "cp2×shard_all2"},
    "second task": {"tp2+sp"},
    "bart": {"tp2+sp×pp2"},
}  # fmt: skip


def fits(name: str, layout: str) -> bool:
    """Two key-value heads are not for four ranks, nor a decoder's three layers for stages of one."""
    uneven = name == "bart" and any(word in layout for word in ("pp4", "interleaved", "bubble"))
    return not uneven and not (name in ("llama", "p-tuning mlp") and "tp4" in layout)


EVERY = [
    pytest.param(name, layout, marks=[] if layout in QUICK.get(name, ()) else [pytest.mark.slow])
    for name in CASES
    for layout in LAYOUTS
    if name not in APART and fits(name, layout)
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A function: name of a case → file with what one process computes; each is computed once."""
    folder, made = tmp_path_factory.mktemp("reference"), {}

    def path(name: str):
        if name not in made:
            made[name] = folder / f"{len(made)}.safetensors"
            write_reference(CASES[name], made[name])
        return made[name]

    return path


@pytest.mark.parametrize(("name", "layout"), EVERY)
def test_every_layout(rank_pool, reference, name, layout):
    assert_parity(rank_pool, CASES[name], LAYOUTS[layout], reference=reference(name))


@pytest.mark.parametrize(
    "layout",
    ["replicate2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("shard_all2", "cp2", "tp2+sp"))],
)
def test_in_fp32_they_differ_by_rounding(rank_pool, reference, layout):
    """float64 hides what gloo lacks."""
    found = by_kind(compare(rank_pool, CASES["fp32"], LAYOUTS[layout], reference("fp32")))
    assert max(found["loss"], found["gradient"], found["norm"], found["evaluation"], found["weight"]) < 1e-4


@pytest.mark.parametrize("how", [{"offload": True}, {"overlap": False}], ids=lambda how: next(iter(how)))
@pytest.mark.parametrize(
    "layout",
    [
        "shard_grads2",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("replicate2", "cp2-zero2", "tp2×shard_grads2")
        ),
    ],
)
def test_where_shares_lie_and_when_they_are_summed(rank_pool, reference, layout, how):
    assert_parity(rank_pool, CASES["gpt2"], replace(LAYOUTS[layout], **how), reference=reference("gpt2"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2+sp", "pp2", "shard_all2", "cp2"])
def test_compiled_blocks(rank_pool, reference, layout):
    assert_parity(rank_pool, CASES["compiled"], LAYOUTS[layout], reference=reference("gpt2"))
