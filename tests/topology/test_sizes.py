"""Every rule on parallel sizes, all problems together, and the legal values in the text."""

from __future__ import annotations

import pytest

from megalith.errors import TopologyError, UnsupportedError
from megalith.topology.sizes import Divisible, Sizes


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
        (Sizes(context=2), Divisible(length=6), "context ∈ {1, 3}"),
        (Sizes(context=2), Divisible(length=9), "a length that is a multiple of 4"),
        (
            Sizes(context=3, tensor=3, sequence_parallel=True),
            Divisible(heads=3, length=12),
            "12 cannot be cut into 6 equal parts on each of 3 ranks",
        ),
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
    with pytest.raises(UnsupportedError, match="expert_model_parallel_size 2 is not built yet"):
        Sizes(shard=2, expert=2).check(Divisible(experts=8))


def test_context_ranks_take_part_in_sums_and_in_what_is_shared():
    assert (Sizes(context=2, replicate=3).copies, Sizes(context=2, replicate=3).sharing) == (6, 1)
    assert Sizes(context=2, shard=3, zero_stage=1).sharing == 6
    assert Sizes(context=2, zero_stage=3).sharing == 2
    assert "zero_stage 3 is there to avoid" in text(Sizes(context=2, zero_stage=3, overlap=False))
    assert not Sizes(context=2, tensor=4, sequence_parallel=True).problems(Divisible(heads=4, length=8))


def test_data_parallel_sizes_come_from_the_processes():
    assert Sizes(tensor=2).fit(8) == Sizes(tensor=2, replicate=4)
    assert Sizes(tensor=2, zero_stage=3).fit(8) == Sizes(tensor=2, zero_stage=3, shard=4)
    assert Sizes(zero_stage=1).fit(8, shard=2) == Sizes(zero_stage=1, replicate=4, shard=2)
    assert "{2, 4, 6, …}" in text(Sizes(tensor=2).fit(7), world=7)


@pytest.mark.parametrize(
    ("sizes", "numbers", "expected"),
    [
        (Sizes(pipeline=2, virtual_pipeline=2), None, "1f1b runs one stage a rank"),
        (Sizes(pipeline=2, schedule="interleaved"), None, "nothing to interleave"),
        (Sizes(pipeline=2, shard=2, zero_stage=3, schedule="zero_bubble"), None, "loses weight gradients"),
        (Sizes(shard=2, zero_stage=3, overlap=False), None, "overlap_grad_reduce: false gathers all weights"),
        (Sizes(pipeline=2, layers=(1, 2, 3)), None, "3 numbers of layers (1, 2, 3) for 2 stages"),
        (Sizes(pipeline=2, layers=(4, 0)), Divisible(layers=4), "a stage without layers"),
        (Sizes(pipeline=2, layers=(1, 2)), Divisible(layers=4), "1, 2 make 3 layers, the model has 4"),
        (
            Sizes(pipeline=4, virtual_pipeline=2, schedule="interleaved"),
            Divisible(micro_batch=1, global_batch=2),
            "interleaved works in rounds of 4",
        ),
        (
            Sizes(pipeline=2, virtual_pipeline=2, schedule="interleaved"),
            Divisible(micro_batch=2, global_batch=6),
            "interleaved works in rounds of 2",
        ),
        (Sizes(tensor=3), Divisible(vocab=128), "3 does not divide the padded vocabulary 128"),
    ],
)  # fmt: skip
def test_each_rule_of_stages_and_schedules(sizes, numbers, expected):
    assert expected in text(sizes, numbers)


def test_1f1b_does_with_fewer_micro_batches_than_stages():
    assert not Sizes(pipeline=4).problems(Divisible(micro_batch=1, global_batch=2))


def test_zero_bubble_and_compiled_blocks_exclude_each_other():
    sizes = Sizes(pipeline=2, schedule="zero_bubble")
    assert not sizes.problems()
    assert "cannot" in str(sizes.problems(compiled=True)[0])


@pytest.mark.parametrize(
    ("sizes", "layers", "expected"),
    [
        (Sizes(pipeline=2), 5, [2, 3]),
        (Sizes(pipeline=2, virtual_pipeline=2, schedule="interleaved"), 6, [1, 2, 1, 2]),
        (Sizes(pipeline=2, layers=(4, 1)), 5, [4, 1]),
    ],
)
def test_stages_take_all_layers_in_order(sizes, layers, expected):
    ranges = sizes.layers_of(layers)
    assert [len(each) for each in ranges] == expected
    assert [layer for each in ranges for layer in each] == list(range(layers))


@pytest.mark.parametrize(
    ("sizes", "towers", "expected"),
    [
        (Sizes(pipeline=2), (6, 6), [6, 6]),
        (Sizes(pipeline=3), (6, 6), [6, 3, 3]),
        (Sizes(pipeline=4), (2, 12), [2, 4, 4, 4]),
        (Sizes(pipeline=4), (12, 1), [4, 4, 4, 1]),
        (Sizes(pipeline=4, pipeline_split=3), (6, 6), [2, 2, 2, 6]),
        (Sizes(pipeline=2, virtual_pipeline=2, schedule="interleaved"), (4, 4), [2, 2, 2, 2]),
        (Sizes(pipeline=3, layers=(4, 2, 6)), (6, 6), [4, 2, 6]),
        (Sizes(), (6, 6), [12]),
    ],
)
def test_no_stage_has_layers_of_two_towers(sizes, towers, expected):
    assert not sizes.problems(Divisible(layers=towers))
    ranges = sizes.layers_of(*towers)
    assert [len(each) for each in ranges] == expected
    assert [layer for each in ranges for layer in each] == list(range(sum(towers)))
    if sizes.stages > 1:
        assert sum(expected[: sizes.stages_of(*towers)[0]]) == towers[0]


@pytest.mark.parametrize(
    ("sizes", "where", "fix"),
    [
        (Sizes(pipeline=4, pipeline_split=4), "split_rank", "1 to 3"),
        (Sizes(pipeline=4, pipeline_split=0), "split_rank", "1 to 3"),
        (Sizes(pipeline=6, pipeline_split=1), "split_rank", "2 to 4"),
        (Sizes(pipeline=4, layers=(3, 2, 2, 1)), "pipeline_layers", "add up to 4"),
        (Sizes(pipeline=4, layers=(3, 1, 2, 2), pipeline_split=1), "split_rank", "2 or null"),
        (Sizes(pipeline=10), "pipeline_model_parallel_size", "at most 8"),
    ],
)
def test_stages_that_two_towers_do_not_fill(sizes, where, fix):
    (problem,) = sizes.problems(Divisible(layers=(4, 4)))
    assert where in problem.where
    assert fix in problem.fix


def test_either_sequence_must_divide():
    sizes = Sizes(tensor=4, sequence_parallel=True)
    assert not sizes.problems(Divisible(length=(16, 8)))
    (problem,) = sizes.problems(Divisible(length=(16, 6)))
    assert "sequence length" in problem.what
