"""A configuration in small: choices kept, sizes shrunk, legal on every layout that is; and what the report makes of differences."""

from __future__ import annotations

import json
import random

import pytest

from megalith.config.compose import compose
from megalith.errors import ConfigError, UnsupportedError
from megalith.models.config import ModelConfig
from megalith.tasks.pretrain_config import ROOTS
from megalith.testing.diagnosis import diagnose
from megalith.testing.parity import KINDS, Difference, assert_parity
from megalith.testing.pool import RankFailure
from megalith.tools.miniature import CLIP, EPSILON, MOST_PROCESSES, miniature, small_sizes
from megalith.tools.parity import check, first_words, report
from megalith.topology.sizes import Divisible, Sizes


def small(*overrides: str, family: str = "gpt"):
    return miniature(compose(ROOTS[family], overrides=["model.data.data_prefix=x", *overrides]).config)


TENSOR, PIPELINE = "model.tensor_model_parallel_size", "model.pipeline_model_parallel_size"


def test_what_is_a_choice_is_kept():
    made = small(
        f"{TENSOR}=2",
        "model.preset=llama-nano",
        "model.hidden_dropout=0.2",
        "model.qkv_bias=true",
        "model.layernorm_epsilon=1e-6",
        "model.rotary_base=50000",
        "model.micro_batch_size=1",
        "model.seed=77",
        "model.compat.loss_average=micro_batches",
        "model.optim.betas=[0.8,0.9]",
        "model.optim.weight_decay=0.3",
        "model.optim.name=adam",
        "model.overlap_grad_reduce=false",
        "model.sequence_parallel=true",
    )
    case, model = made.case, made.case.model
    assert (model.normalization, model.position_embedding_type, model.activation) == (
        "rmsnorm", "rope", "swiglu",
    )  # fmt: skip
    assert not model.share_embeddings_and_output_weights
    assert not model.bias
    assert model.has_qkv_bias
    assert (model.hidden_dropout, model.layernorm_epsilon, model.rotary_base) == (0.2, 1e-6, 50000)
    assert model.num_attention_heads == 2 * model.kv_heads
    assert model.kv_heads % 2 == 0
    assert model.ffn_size / model.hidden_size == pytest.approx(172 / 64, rel=0.1)
    assert (case.micro_batch, case.seed, case.loss_average) == (1, 77, "micro_batches")
    assert (case.optim.name, case.optim.betas, case.optim.weight_decay) == ("adam", (0.8, 0.9), 0.3)
    assert (case.optim.eps, case.clip, case.precision) == (EPSILON, CLIP, "64")
    assert made.sizes == Sizes(tensor=2, sequence_parallel=True, overlap=False)


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["reset_attention_mask=true"], "documents"),
        (["reset_position_ids=true"], "positions"),
        (["reset_attention_mask=true", "reset_position_ids=true"], True),
        ([], False),
    ],
)
def test_document_masks(overrides, wanted):
    assert small(f"{TENSOR}=2", *(f"model.data.{text}" for text in overrides)).case.reset == wanted


def test_no_clipping_stays_none_and_no_compilation_unless_demanded():
    made = small(f"{TENSOR}=2", "trainer.gradient_clip_val=0", "model.compile=true")
    assert made.case.clip == 0
    assert made.case.compile
    assert not small(f"{TENSOR}=2").case.compile


@pytest.mark.parametrize(
    ("overrides", "layers", "stages"),
    [
        ([f"{PIPELINE}=2"], 4, None),
        ([f"{PIPELINE}=2", "model.num_layers=7"], 5, None),
        ([f"{PIPELINE}=2", "model.num_layers=2"], 2, None),
        ([f"{PIPELINE}=2", "model.virtual_pipeline_model_parallel_size=3"], 8, None),
        ([f"{PIPELINE}=2", "model.pipeline_layers=[7,5]"], 5, (3, 2)),
        ([f"{PIPELINE}=2", "model.pipeline_layers=[9,3]"], 4, (3, 1)),
        (
            [f"{PIPELINE}=4", "model.pipeline_layers=[7,8,8,7]", "model.num_layers=30", "model.global_batch_size=16"],
            10,
            (2, 3, 3, 2),
        ),
    ],
)  # fmt: skip
def test_layers_keep_their_relation_to_the_stages(overrides, layers, stages):
    made = small(*overrides)
    assert (made.case.model.num_layers, made.sizes.layers) == (layers, stages)


@pytest.mark.parametrize(
    ("given", "method", "wanted"),
    [(1, "uniform", 1), (6, "uniform", 2), (3, "block", 2), (1, "block", 1), (6, "block", 2)],
)
def test_recomputation_keeps_its_share(given, method, wanted):
    keys = {"granularity": "full", "method": method, "num_layers": given}
    made = small(f"{PIPELINE}=2", *(f"model.activations_checkpoint_{k}={v}" for k, v in keys.items()))
    assert (made.case.recompute.method, made.case.recompute.layers) == (method, wanted)


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        (Sizes(tensor=8, pipeline=8), (4, 2, 1, 1)),
        (Sizes(tensor=2, pipeline=2, replicate=64), (2, 2, 2, 1)),
        (Sizes(tensor=2, pipeline=2, replicate=8, shard=4, zero_stage=3), (2, 2, 1, 2)),
        (Sizes(replicate=8), (1, 1, 8, 1)),
        (Sizes(replicate=16), (1, 1, 4, 1)),
        (Sizes(tensor=3, pipeline=3), (3, 2, 1, 1)),
    ],
)
def test_large_layouts_keep_their_axes_in_eight_processes(asked, wanted):
    made = small_sizes(asked)
    assert (made.tensor, made.pipeline, made.replicate, made.shard) == wanted
    assert made.world <= MOST_PROCESSES


def test_the_data_parallel_size():
    assert small("trainer.devices=2").sizes == Sizes(replicate=2)
    assert small("model.zero_stage=3").sizes == Sizes(shard=2, zero_stage=3)
    assert small(f"{TENSOR}=2", "trainer.devices=4").sizes == Sizes(tensor=2, replicate=2)
    hybrid = small("model.zero_stage=1", "model.zero_shard_size=2")
    assert hybrid.sizes == Sizes(shard=2, replicate=2, zero_stage=1)


def test_context_ranks_are_few_and_the_length_is_one_that_they_can_cut():
    made = small("model.context_parallel_size=16", "model.zero_stage=1", "trainer.devices=32")
    assert made.sizes == Sizes(context=4, shard=2, zero_stage=1)
    assert made.case.length == made.case.model.max_position_embeddings == 8
    assert ("16", "4") in {(c.yours, c.here) for c in made.changes if c.key == "model.context_parallel_size"}
    most = small_sizes(Sizes(context=2, tensor=2, pipeline=2, replicate=2, shard=2))
    assert (most.context, most.tensor, most.pipeline, most.data) == (2, 2, 2, 1)
    assert small("model.context_parallel_size=3", "model.encoder_seq_length=510").case.length == 12


def test_changes_are_listed_and_nothing_else():
    made = small(f"{TENSOR}=16", "model.num_attention_heads=16", "model.vocab_size=512")
    rows = {change.key: (change.yours, change.here) for change in made.changes}
    assert rows[TENSOR] == ("16", "4")
    assert rows["model.hidden_size"] == ("768", "16")
    assert rows["trainer.precision"] == ("auto", "64")
    assert PIPELINE not in rows
    assert "model.attention_core" not in rows
    assert made.case.model.padded_vocab_size == made.case.model.vocab_size == 128  # 512 is not padded either
    assert not any(yours == here for yours, here in rows.values())


@pytest.mark.parametrize(
    ("family", "overrides", "depths", "split", "lengths"),
    [
        ("t5", [f"{TENSOR}=2"], (2, 2), None, (16, 8)),
        ("t5", [f"{PIPELINE}=4", "model.data.seq_length_dec=512"], (4, 4), 2, (8, 8)),
        ("t5", [f"{PIPELINE}=8", "model.pipeline_model_parallel_split_rank=2"], (2, 6), 1, (16, 8)),
        ("bart", [f"{PIPELINE}=3", "model.encoder_num_layers=5", "model.decoder_num_layers=9"], (2, 5), 1, (8, 8)),
        ("bart", [f"{PIPELINE}=2", "model.virtual_pipeline_model_parallel_size=2"], (4, 4), 2, (8, 8)),
        ("bart", [f"{PIPELINE}=4", "model.pipeline_layers=[12,5,4,3]"], (3, 3), 1, (8, 8)),
        ("bert", [f"{PIPELINE}=2", "model.bert_binary_head=false"], (4,), None, (8,)),
    ],
)  # fmt: skip
def test_the_sides_of_a_model_are_to_each_other_as_asked(family, overrides, depths, split, lengths):
    made = small(*overrides, family=family)
    case = made.case
    both = (case.source, case.length) if len(depths) > 1 else (case.length,)
    assert (case.model.depths, made.sizes.pipeline_split, both) == (depths, split, lengths)
    assert case.model.max_position_embeddings == max(both)
    numbers = Divisible(layers=depths, length=both, micro_batch=case.micro_batch, global_batch=case.samples)
    assert not made.sizes.problems(numbers, world=made.sizes.world)


def test_changes_of_two_sides_are_listed():
    made = small(
        f"{PIPELINE}=8",
        "model.pipeline_model_parallel_split_rank=2",
        "model.decoder_ffn_hidden_size=1536",
        family="t5",
    )
    rows = {change.key: (change.yours, change.here) for change in made.changes}
    assert rows["model.pipeline_model_parallel_split_rank"] == ("2", "1")
    assert rows["model.encoder_num_layers"] == ("12", "2")
    assert rows["model.decoder_num_layers"] == ("12", "6")
    assert rows["model.encoder_seq_length"] == ("512", "16")
    assert rows["model.data.seq_length_dec"] == ("128", "8")
    assert rows["model.decoder_ffn_hidden_size"] == ("1536", "32")


def problems(*overrides: str) -> str:
    with pytest.raises(ConfigError) as failure:
        small(*overrides)
    return str(failure.value)


def test_problems_are_about_the_users_own_sizes():
    found = problems(f"{TENSOR}=5")
    assert "5 does not divide heads 12" in found
    found = problems(f"{TENSOR}=2", "model.make_vocab_size_divisible_by=1", "model.vocab_size=1001")
    assert f"{TENSOR}: 2 does not divide the padded vocabulary 1001" in found
    found = problems(f"{TENSOR}=2", "trainer.devices=3")
    assert "trainer.devices: 3 processes, but this layout needs 2" in found
    found = problems("trainer.devices=2", "model.micro_batch_size=8")
    assert "8 is not a multiple of micro_batch_size 8 × data-parallel size 2" in found
    found = problems(
        "model.zero_stage=3",
        "model.activations_checkpoint_method=uniform",
        "model.activations_checkpoint_num_layers=3",
    )
    assert "recomputing 3 layers as one" in found


def test_one_process_is_nothing_to_compare():
    for overrides in ([], ["trainer.devices=1"], ["trainer.devices=1", "model.zero_stage=2"]):
        assert "nothing to compare" in problems(*overrides)


CHOICES = {
    "tensor_model_parallel_size": [1, 2, 4, 8],
    "pipeline_model_parallel_size": [1, 2, 4, 8],
    "virtual_pipeline_model_parallel_size": ["null", 2],
    "sequence_parallel": ["true", "false"],
    "zero_stage": [0, 1, 2, 3],
    "num_layers": [16, 24, 19],
    "num_attention_heads": [16, 32],
    "num_query_groups": ["null", 8],
    "kv_channels": ["null", 64, 48],
    "hidden_size": [1024, 512],
    "ffn_hidden_size": ["null", 2736],
    "make_vocab_size_divisible_by": [8, 128, 1000],
    "vocab_size": ["null", 50304, 50257, 50000],
    "position_embedding_type": ["learned_absolute", "rope", "relative", "none"],
    "rotary_percentage": [1.0, 0.5, 0.25],
    "normalization": ["layernorm", "rmsnorm"],
    "activation": ["gelu", "swiglu"],
    "relative_attention_num_buckets": [4, 32],
    "max_position_embeddings": ["null", 2048],
    "micro_batch_size": [1, 4],
    "global_batch_size": [128],
    "compat.loss_average": ["tokens", "micro_batches"],
}


@pytest.mark.parametrize("number", range(60))
def test_any_legal_configuration_has_a_legal_miniature(number):
    draw = random.Random(number)
    overrides = [f"model.{key}={draw.choice(values)}" for key, values in CHOICES.items()]
    try:
        made = small(*overrides)
    except ConfigError:
        return
    sizes, case = made.sizes, made.case
    numbers = Divisible(
        layers=case.model.num_layers,
        heads=case.model.num_attention_heads,
        kv_heads=case.model.kv_heads,
        ffn=case.model.ffn_size,
        vocab=case.model.padded_vocab_size,
        length=case.length,
        micro_batch=case.micro_batch,
        global_batch=case.samples,
    )
    assert not sizes.problems(numbers, world=sizes.world)
    assert case.micro_batches >= 4 * sizes.data
    assert isinstance(case.model, ModelConfig)
    assert case.model.hidden_size <= 128
    if case.model.vocab_size != case.model.padded_vocab_size:
        assert case.model.padded_vocab_size - case.model.vocab_size < case.model.make_vocab_size_divisible_by


@pytest.mark.parametrize(
    "overrides",
    [
        [f"{TENSOR}=2", "model.sequence_parallel=true", "model.preset=llama-nano", "model.kv_channels=24"],
        [
            f"{PIPELINE}=2",
            "model.position_embedding_type=relative",
            "model.num_query_groups=3",
            "model.data.reset_position_ids=true",
            "model.transformer_block_type=post_ln",
            "model.optim.name=sgd",
        ],
        ["model.zero_stage=2", "model.data.reset_attention_mask=true", "model.position_embedding_type=none"],
    ],
)
def test_miniatures_are_at_parity(rank_pool, overrides):
    made = small(*overrides)
    assert_parity(rank_pool, made.case, made.sizes)
    assert {c.key for c in made.changes} >= {"model.hidden_size", "trainer.precision"}


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("bert", [f"{TENSOR}=2", "model.bert_binary_head=false", "model.num_tokentypes=1"]),
        ("t5", [f"{PIPELINE}=2", "model.preset=t5-v1.1-base"]),
        ("bart", ["trainer.devices=2"]),
    ],
)
def test_miniatures_of_other_families_are_at_parity(rank_pool, family, overrides):
    made = small(*overrides, family=family)
    assert_parity(rank_pool, made.case, made.sizes)


def test_check_reports_every_kind(rank_pool):
    said: list[str] = []
    found = check(small("trainer.devices=2", "model.num_layers=1"), rank_pool, said.append)
    assert found.agrees
    assert [row.kind for row in found.rows] == list(KINDS)
    assert all(row.agrees and row.tensors for row in found.rows)
    assert said == ["one process", "2 processes: replicate 2"]
    assert found.as_json()["agrees"] is True


def test_a_report_of_differences():
    made = small(f"{TENSOR}=2")
    good = [Difference(f"{kind} x 0", 1e-16, 1.0) for kind in KINDS]
    bad = [Difference("norm 0", 0.5), Difference("weight final_norm.bias", 0.25, None)]
    found = report(made, [*good, *bad], 1.0)
    assert not found.agrees
    assert found.differing == 2
    assert found.first.name == "norm 0"
    assert found.cause.name == "norm"
    assert [row.kind for row in found.rows if not row.agrees] == ["norm", "weight"]
    assert found.as_json()["cause"]["name"] == "norm"
    not_a_number = [Difference("weight a", float("nan"), None)]
    assert not report(made, [*good, *not_a_number], 1.0).agrees
    lost = report(made, [*good, Difference("weight a", float("inf"), None)], 1.0).as_json()
    assert lost["first"] == {"name": "weight a", "relative": None}
    json.dumps(lost, allow_nan=False)


def test_a_common_factor_is_a_division():
    halves = [Difference("gradient a", 0.5, 0.5), Difference("gradient b", 0.5, 0.5)]
    assert "averaged" in diagnose(halves, Sizes(replicate=2)).text
    assert "0.5 times" in diagnose(halves, Sizes(tensor=2)).text
    assert diagnose([halves[0], Difference("gradient b", 0.0, 1.0)], Sizes(tensor=2)).name == "backward"


class Failing:
    """A pool whose ranks fail."""

    def __init__(self, errors: dict[int, str]) -> None:
        self.errors = errors

    def start(self, ranks: int) -> None: ...

    def run(self, *_: object, **__: object) -> None:
        raise RankFailure(self.errors)


def test_what_ranks_refuse_is_a_users_error_and_the_rest_is_not():
    made = small("trainer.devices=2", "model.num_layers=1")
    text = "Traceback\n  line\nmegalith.errors.UnsupportedError: model.x: cannot be\n  fix: model.x=1\n"
    with pytest.raises(UnsupportedError, match="cannot be") as refusal:
        check(made, Failing({0: text, 1: "no answer"}))
    assert refusal.value.problem.fix == "model.x=1"
    failure = RankFailure({0: "…\nRuntimeError: Connection closed by peer", 1: "…\nValueError: 3 is not 4\n"})
    with pytest.raises(RankFailure):
        check(made, Failing(failure.errors))
    assert first_words(failure) == "rank 1: ValueError: 3 is not 4"
