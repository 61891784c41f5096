"""Parity must fail when anything is missing: each collective replaced by the identity, each finishing step left out.

And the tool must say what: the cause that it names is part of each case.
"""

from __future__ import annotations

import pytest

from megalith.checkpoint.tensor_files import open_tensors
from megalith.models.bert_config import BertConfig
from megalith.models.config import ModelConfig
from megalith.models.encdec_config import EncoderDecoderConfig
from megalith.testing.diagnosis import diagnose, wrong
from megalith.testing.parity import Case, collect, layouts, write_reference
from tests.sensitivity.sabotage import SABOTAGES, broken_rank

LAYOUTS = layouts()
SHAPE = {
    "vocab_size": 130,
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "hidden_dropout": 0.1,
}
CASES = {
    "gpt2": Case(ModelConfig(**SHAPE), micro_batch=1, micro_batches=4, clip=0.1),
    "probabilities": Case(
        ModelConfig(**{**SHAPE, "hidden_dropout": 0.0}, attention_dropout=0.1), micro_batch=1, micro_batches=4
    ),
    "relative": Case(
        ModelConfig(**SHAPE, position_embedding_type="relative", share_embeddings_and_output_weights=False),
        micro_batch=1,
        micro_batches=4,
        clip=0.1,
    ),
    "bert": Case(BertConfig(**{**SHAPE, "attention_dropout": 0.1}), micro_batch=2, micro_batches=4, clip=0.1),
    "t5": Case(
        EncoderDecoderConfig(**{**SHAPE, "max_position_embeddings": 16}),
        micro_batch=1,
        micro_batches=4,
        clip=0.1,
    ),
    "t5 relative": Case(
        EncoderDecoderConfig(**{**SHAPE, "num_layers": 1}, position_embedding_type="relative"),
        micro_batch=1,
        micro_batches=4,
        clip=0.1,
    ),
}
BROKEN = [
    # what is missing, layout, model, the cause that must be named
    ("copy_backward", "tp2", "gpt2", "backward"),
    ("reduce_forward", "tp2", "gpt2", "forward"),
    ("gather_forward", "tp2+sp", "gpt2", "forward"),
    ("gather_backward", "tp2+sp", "gpt2", "backward"),
    ("scatter_sum_forward", "tp2+sp", "gpt2", "forward"),
    ("scatter_sum_backward", "tp2+sp", "gpt2", "backward"),
    ("join_forward", "tp2", "gpt2", "logits"),
    ("largest_logit", "tp2", "gpt2", "forward"),
    ("cross_entropy_sum", "tp2", "gpt2", "forward"),
    ("partial_sums", "tp2+sp", "gpt2", "sequence"),
    ("shared_gradients", "pp2", "gpt2", "tied"),
    ("shared_gradients", "pp2", "relative", "relative bias"),
    ("relative_bias_over_data", "replicate2", "relative", "relative bias"),
    ("last_micro_batch_not_reduced", "shard_grads2", "gpt2", "backward"),
    ("last_micro_batch_not_reduced", "replicate2", "gpt2", "backward"),
    ("averaged", "replicate2", "gpt2", "division"),
    ("averaged", "shard_all2", "gpt2", "division"),
    ("target_count", "replicate2", "gpt2", "counts"),
    ("norm_reduction", "tp2", "gpt2", "norm"),
    ("norm_reduction", "pp2", "gpt2", "norm"),
    ("norm_reduction", "shard_all2", "gpt2", "norm"),
    ("replicas_counted_twice", "tp2", "gpt2", "norm"),
    ("clipping", "tp2", "gpt2", "update"),
    ("reported_loss", "replicate2", "gpt2", "reported loss"),
    ("evaluation_sum", "replicate2", "gpt2", "evaluation"),
    ("dropout_rows", "tp2+sp", "gpt2", "training"),
    ("initial_weights", "replicate2", "gpt2", "initial"),
    ("gather_forward", "cp2", "gpt2", "forward"),
    ("gather_backward", "cp2", "gpt2", "backward"),
    ("order_of_keys", "cp2", "gpt2", "forward"),
    ("places_of_tokens", "cp2", "gpt2", "forward"),
    ("places_in_masks", "cp2", "gpt2", "training"),
    ("places_of_queries", "cp2", "probabilities", "training"),
    ("relative_bias_over_data", "cp2", "relative", "relative bias"),
    ("last_micro_batch_not_reduced", "cp2-zero2", "gpt2", "backward"),
    ("averaged", "cp2", "gpt2", "division"),
    ("counted_on_context_ranks", "cp2", "gpt2", "counts"),
    ("norm_reduction", "cp2-zero3", "gpt2", "norm"),
    ("reported_loss", "cp2", "gpt2", "reported loss"),
    ("evaluation_sum", "cp2", "gpt2", "evaluation"),
    ("gather_backward", "tp2+sp", "bert", "backward"),
    ("partial_sums", "tp2+sp", "bert", "sequence"),
    ("partial_sums", "tp2+sp", "t5", "sequence"),
    ("pooled_gradients", "tp2+sp", "bert", "first position"),
    ("pooled_position", "tp2+sp", "bert", "first position"),
    ("order_of_targets", "tp2+sp", "bert", "forward"),
    ("order_on_all_ranks", "cp2", "bert", "first position"),
    ("types_of_tokens", "cp2", "bert", "forward"),
    ("places_of_tokens", "cp2", "bert", "forward"),
    ("places_of_queries", "cp2", "bert", "training"),
    ("padding", "cp2", "bert", "forward"),
    ("gather_backward", "cp2", "t5", "backward"),
    ("keys_across", "cp2", "t5", "forward"),
    ("padding", "cp2", "t5", "forward"),
    ("places_of_encoder_tokens", "cp2", "t5", "forward"),
    ("places_in_masks", "cp2", "t5", "training"),
    ("places_around", "cp2", "t5 relative", "forward"),
    ("relative_bias_over_data", "cp2", "t5 relative", "relative bias"),
    ("shared_gradients", "pp2", "t5", "tied"),
    ("memory_gradient", "pp2-interleaved", "t5", "backward"),
]


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    for name, case in CASES.items():
        write_reference(case, folder / name)
    return folder


@pytest.fixture
def differences(rank_pool, references):
    """A function: what is missing, layout, model → the differences of that layout."""

    def run(missing: str, layout: str, model: str):
        case, sizes, path = CASES[model], LAYOUTS[layout], references / model
        ranks = rank_pool.run(broken_rank, sizes.world, case, sizes, str(path), missing)
        return collect(case, [tensor.name for tensor in open_tensors(path)], ranks)

    return run


@pytest.mark.parametrize(("missing", "layout", "model", "cause"), BROKEN)
def test_what_is_missing_is_found_and_named(differences, missing, layout, model, cause):
    found = differences(missing, layout, model)
    assert wrong(found), "parity did not notice"
    assert diagnose(found, LAYOUTS[layout]).name == cause


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        (layout, "gpt2")
        for layout in ("tp2", "tp2+sp", "pp2", "replicate2", "shard_grads2", "shard_all2", "cp2")
    ]
    + [
        ("tp2+sp", "bert"),
        ("cp2", "bert"),
        ("tp2+sp", "t5"),
        ("cp2", "t5"),
        ("cp2", "t5 relative"),
        ("pp2-interleaved", "t5"),
    ],
)
def test_nothing_missing_is_parity(differences, layout, model):
    found = differences("nothing", layout, model)
    assert not wrong(found)
    assert diagnose(found, LAYOUTS[layout]) is None


def test_subtracting_the_largest_logit_only_guards_against_overflow(differences):
    assert not wrong(differences("no_largest_logit", "tp2", "gpt2"))


def test_every_sabotage_is_tried():
    assert SABOTAGES.keys() - {"nothing", "no_largest_logit"} == {missing for missing, *_ in BROKEN}
