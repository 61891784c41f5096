"""Every layout computes what one process computes, to rounding in float64: loss, gradients, norm, weights, tokens.

One model (GPT-2's shape, dropout on) goes through all layouts; the other models go through those that could tell them apart.
`make test` runs a sample of the pairs, `make test-all` all of them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from megalith.testing.parity import (
    Case,
    assert_parity,
    by_kind,
    compare,
    layouts,
    write_reference,
)
from tests.parity.cases import CASES, UNEVEN

LAYOUTS = layouts()
SAMPLED = {
    "tp2", "tp2+sp", "pp2", "pp2-interleaved", "pp2-zero-bubble",
    "replicate2", "shard_optimizer2", "shard_grads2", "shard_all2",
    "tp2×pp2", "tp2+sp×pp2-interleaved", "tp2+sp×shard_all2", "tp2×shard_grads2",
    "pp2×shard_all2", "pp2-interleaved×shard_grads2", "replicate2×shard_all2",
    "pp2-zero-bubble×shard_optimizer2", "tp4",
    "cp2", "cp2×tp2+sp", "cp2×pp2", "cp2×shard_optimizer2", "cp2×shard_all2",
    "cp2-zero2", "cp4-zero3",
}  # fmt: skip
OTHERS = {
    "llama": [
        "tp2+sp×shard_all2",
        "pp2-interleaved",
        "cp2×tp2+sp",
        "tp2+sp",
        "tp2×pp2",
        "shard_grads2",
        "cp4",
    ],
    "relative": [
        "tp2+sp",
        "pp2-zero-bubble",
        "cp2×shard_grads2",
        "pp2-interleaved",
        "tp4",
        "tp2×pp2",
        "replicate2",
        "cp4",
        "cp2×pp2-interleaved",
    ],
    "probabilities": ["tp2+sp", "cp2×tp2+sp", "pp2", "shard_all2", "tp2×pp2", "cp2"],
    "recompute": ["tp2+sp×shard_all2", "pp2-interleaved", "tp2", "cp2×shard_all2"],
    "recompute in groups": ["tp2", "pp2", "shard_grads2", "cp2"],
    "selective": ["tp2+sp", "pp2×shard_all2", "cp2", "cp2×pp2"],
    "frozen": ["tp2+sp", "pp2-interleaved×shard_all2", "cp2-zero3", "pp2", "shard_all2"],
    "micro-batch means": ["replicate2", "pp2", "tp2", "cp2"],
    "uneven stages": ["pp2"],
    "few micro-batches": ["pp4", "pp2×shard_all2"],
    "bert": ["tp2+sp", "pp2-interleaved", "shard_all2", "tp2+sp×pp2", "cp2×tp2+sp"],
    "bert original": ["tp2+sp", "pp2", "shard_grads2", "cp2"],
    "bert without order": ["tp2+sp", "cp2"],
    "bert recomputed": ["cp2"],
    "bert frozen": ["tp2+sp", "cp2-zero3"],
    "bert micro-batch means": ["cp2", "replicate2"],
    "t5": ["tp2+sp", "shard_all2", "cp2", "cp2×pp2"],
    "t5 1.0": ["replicate2", "cp2"],
    "t5 1.1": ["tp2+sp", "shard_all2", "cp4"],
    "t5 recomputed": ["cp2"],
    "t5 frozen": ["tp2+sp", "cp2-zero3", "pp2"],
    "bart": ["tp2+sp", "shard_grads2", "cp2×tp2+sp"],
    "bart selective": ["cp2"],
}
QUICK = 3
"""So many layouts of each kind in every run; the rest of them are `slow`."""
FAMILIES = ["bert", "bert original", "t5", "t5 1.1", "bart"]
ROUNDING = {
    "fp32": (
        ["tp2+sp", "pp2", "replicate2", "shard_optimizer2", "shard_grads2", "shard_all2", "cp2", "cp2-zero3"],
        1e-4,
    ),
    "bf16": (["tp2+sp", "tp2×pp2", "cp2"], 4e-2),
    "bert fp32": (["tp2+sp"], 1e-4),
    "bert bf16": (["tp2+sp"], 4e-2),
    "t5 fp32": (["cp2", "shard_all2"], 1e-4),
    "t5 bf16": (["cp2"], 4e-2),
}


def marked(names, sample):
    return [pytest.param(name, marks=() if name in sample else pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A function: case → file with what one process computes; each is computed once."""
    folder, made = tmp_path_factory.mktemp("reference"), {}

    def path(name: str, case: Case):
        if name not in made:
            made[name] = folder / f"{len(made)}.safetensors"
            write_reference(case, made[name])
        return made[name]

    return path


@pytest.mark.parametrize("layout", marked(LAYOUTS, SAMPLED))
def test_every_layout(rank_pool, reference, layout):
    case = CASES["gpt2"]
    assert_parity(rank_pool, case, LAYOUTS[layout], reference=reference("gpt2", case))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=() if i < QUICK else pytest.mark.slow)
        for name, many in OTHERS.items()
        for i, layout in enumerate(many)
    ],
)
def test_every_kind_of_model(rank_pool, reference, name, layout):
    case, sizes = CASES[name], LAYOUTS[layout]
    if name == "uneven stages":
        sizes = UNEVEN
    assert_parity(rank_pool, case, sizes, reference=reference(name, case))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), [(n, layout) for n in FAMILIES for layout in LAYOUTS])
def test_every_layout_of_every_family(rank_pool, reference, name, layout):
    assert_parity(rank_pool, CASES[name], LAYOUTS[layout], reference=reference(name, CASES[name]))


@pytest.mark.parametrize("layout", ["shard_all4", "tp2×shard_all2", "replicate2×shard_grads2", "cp4-zero3"])
def test_rows_that_do_not_divide(rank_pool, reference, layout):
    """A width of 18 and 6 channels a head over four shards: pieces of different sizes, and empty ones."""
    case = CASES["odd rows"]
    assert_parity(rank_pool, case, LAYOUTS[layout], reference=reference("odd rows", case))


@pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for name, (many, _) in ROUNDING.items() for layout in many]
)
def test_lower_precisions_differ_by_rounding(rank_pool, reference, name, layout):
    """float64 would hide what gloo lacks in fp32. Weights after Adam's steps magnify rounding, so gradients are compared."""
    case = CASES[name]
    found = by_kind(compare(rank_pool, case, LAYOUTS[layout], reference(name, case)))
    assert max(found["loss"], found["gradient"], found["norm"], found["evaluation"]) < ROUNDING[name][1]
    if name.endswith("fp32"):
        assert found["weight"] < ROUNDING[name][1]


@pytest.mark.parametrize("layout", ["pp2", "shard_all2"])
def test_bf16_without_tensor_parallelism_differs_by_the_order_of_sums(rank_pool, reference, layout):
    """The same products are rounded at the same places where the micro-batch size is the same."""
    case = CASES["bf16"]
    found = by_kind(compare(rank_pool, case, LAYOUTS[layout], reference("bf16", case)))
    assert found["gradient"] < 1e-5


@pytest.mark.parametrize("layout", marked(["tp2+sp", "pp2", "tp2×shard_all2", "cp2"], {"tp2+sp"}))
def test_compiled_blocks_equal_eager_ones_on_one_process(rank_pool, reference, layout):
    assert_parity(rank_pool, CASES["compiled"], LAYOUTS[layout], reference=reference("gpt2", CASES["gpt2"]))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2+sp", "cp2"])
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_compiled_blocks_of_other_families(rank_pool, reference, name, layout):
    case = CASES[f"{name} compiled"]
    assert_parity(rank_pool, case, LAYOUTS[layout], reference=reference(name, CASES[name]))


@pytest.mark.parametrize("layout", ["replicate2", "shard_grads2", "tp2×shard_optimizer2", "cp2-zero1"])
def test_reducing_gradients_at_the_end_changes_nothing(rank_pool, reference, layout):
    case = CASES["gpt2"]
    sizes = replace(LAYOUTS[layout], overlap=False)
    assert_parity(rank_pool, case, sizes, reference=reference("gpt2", case))


@pytest.mark.parametrize("layout", ["shard_all2", "tp2×shard_grads2", "pp2×shard_optimizer2", "cp2-zero3"])
def test_shares_in_host_memory_change_nothing(rank_pool, reference, layout):
    case = CASES["gpt2"]
    sizes = replace(LAYOUTS[layout], offload=True)
    assert_parity(rank_pool, case, sizes, reference=reference("gpt2", case))
