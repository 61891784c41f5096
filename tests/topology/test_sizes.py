"""Every rule on parallel sizes, all problems together, and the legal values in the text."""

from __future__ import annotations

import pytest

from megalith.errors import TopologyError, UnsupportedError
from megalith.topology.sizes import Divisible, Sizes, legal


def text(sizes: Sizes, numbers: Divisible | None = None, world: int | None = None) -> str:
    return "\n".join(str(p) for p in sizes.problems(numbers, world=world))


def test_one_process_is_legal():
    sizes = Sizes()
    sizes.check(
        Divisible(layers=3, heads=5, kv_heads=5, ffn=7, length=9, micro_batch=2, global_batch=8), world=1
    )
    assert (sizes.world, sizes.data, str(sizes)) == (1, 1, "one process")


def test_all_problems_come_together():
    sizes = Sizes(tensor=3, expert=4, shard=2)
    numbers = Divisible(heads=28, ffn=100, experts=6, micro_batch=4, global_batch=10)
    with pytest.raises(TopologyError) as caught:
        sizes.check(numbers, world=8)
    message = str(caught.value)
    assert message.startswith("6 problems")
    for part in (
        "8 processes, but this layout needs 6 (shard 2 × tensor 3)",
        "3 does not divide heads 28",
        "tensor ∈ {1, 2, 4, 7, 14, 28}",
        "3 does not divide ffn_hidden_size 100",
        "4 does not divide experts 6",
        "global_batch_size",
    ):
        assert part in message


def test_key_value_heads_limit_tensor_parallelism():
    assert "{1, 2, 4}" in text(Sizes(tensor=8), Divisible(heads=32, kv_heads=4))
    assert "common divisor" in text(Sizes(tensor=8), Divisible(heads=32, kv_heads=4))


@pytest.mark.parametrize(
    ("sizes", "numbers", "expected"),
    [
        (Sizes(tensor=0), None, "tensor_model_parallel_size: 0 is not a size"),
        (Sizes(zero_stage=4), None, "zero_stage ∈ {0, 1, 2, 3}"),
        (Sizes(virtual_pipeline=2), None, "interleaving needs a pipeline"),
        (Sizes(pipeline=2, virtual_pipeline=3), Divisible(layers=5), "6 stages for 5 layers"),
        (Sizes(tensor=2, sequence_parallel=True), Divisible(heads=2, length=5), "sequence length"),
        (Sizes(context=2), Divisible(length=6), "half the sequence length 3"),
        (Sizes(shard=2, expert=4), Divisible(experts=4), "data-parallel size 2"),
    ],
)
def test_each_rule(sizes, numbers, expected):
    assert expected in text(sizes, numbers)


@pytest.mark.parametrize(
    ("whole", "micro", "expected"),
    [
        (10, 4, "micro_batch_size ∈ {1, 2, 5, 10}; or global_batch_size 8 or 12"),
        (3, 4, "micro_batch_size ∈ {1, 3}; or global_batch_size 4"),
    ],
)
def test_batch_sizes_name_their_neighbours(whole, micro, expected):
    assert expected in text(Sizes(), Divisible(micro_batch=micro, global_batch=whole))


def test_world_size_names_the_data_parallel_size_that_would_fit():
    assert "data-parallel size 4" in text(Sizes(tensor=2, replicate=2), world=8)
    assert "{2, 4, 6, …}" in text(Sizes(tensor=2), world=7)


def test_legal_but_unbuilt_sizes_are_refused_by_name():
    with pytest.raises(UnsupportedError, match="tensor_model_parallel_size 2 is not built yet"):
        Sizes(tensor=2).check(Divisible(heads=4))
    with pytest.raises(UnsupportedError) as caught:
        Sizes(pipeline=2, shard=2).check()
    assert "pipeline_model_parallel_size 2" in str(caught.value)
    assert "data-parallel shards 2" in str(caught.value)


def test_long_lists_of_legal_values_are_shortened():
    assert legal(50304).count(",") == 10
    assert legal(50304).endswith("…, 25152, 50304}")
