"""Encoder-decoders in a pipeline compute what one process computes: the encoder's stages, then the decoder's, with the memory.

Rows are longer on the encoder's side and padded, so that a length taken from the other side shows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megalith.models.encdec_config import EncoderDecoderConfig
from megalith.parallel.memory import Recompute
from megalith.testing.parity import Case, assert_parity, by_kind, compare, layouts, write_reference
from megalith.topology.sizes import Divisible, Sizes

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_layers": 2,
    "max_position_embeddings": 16,
    "hidden_dropout": 0.1,
    "make_vocab_size_divisible_by": 32,
}


def case(**changes: Any) -> Case:
    model = EncoderDecoderConfig(**{**SHAPE, **changes})
    return Case(model, micro_batch=1, micro_batches=4, length=8, source=12)


CASES = {
    "megatron": case(output_bias=True),
    "t5": case(
        position_embedding_type="relative", normalization="rmsnorm", bias=False, scale_decoder_output=True,
        decoder_num_layers=4, encoder_num_layers=4,
    ),
    "t5 1.1": case(
        position_embedding_type="relative", activation="geglu", share_embeddings_and_output_weights=False,
        encoder_num_layers=3, decoder_num_layers=3,
    ),
    "bart": case(
        transformer_block_type="post_ln", share_position_embeddings=False, decoder_ffn_hidden_size=40,
        encoder_num_layers=3, decoder_num_layers=6, attention_dropout=0.1,
    ),
}  # fmt: skip
VARIANTS = {
    "recomputed": replace(CASES["bart"], recompute=Recompute("full", "uniform", 1)),
    "few micro-batches": replace(CASES["t5"], micro_batches=2),
    "frozen": replace(CASES["megatron"], frozen=(r"^(?!.*(norm_mlp|decoder\.blocks\.1)).*",)),
    "fp32": replace(CASES["t5"], precision="32"),
    "bf16": replace(
        CASES["t5"],
        precision="bf16-mixed",
        model=CASES["t5"].model.model_copy(update={"hidden_dropout": 0.0}),
    ),
}
LAYOUTS = layouts() | {
    "pp4, one stage of the encoder": Sizes(pipeline=4, pipeline_split=1),
    "pp4, three stages of the encoder": Sizes(pipeline=4, pipeline_split=3),
    "pp4, uneven": Sizes(pipeline=4, layers=(3, 1, 1, 3)),
    "pp2-interleaved, one stage of the encoder": Sizes(
        pipeline=2, virtual_pipeline=2, schedule="interleaved", pipeline_split=1
    ),
    "pp2-zero-bubble, one stage of the encoder": Sizes(
        pipeline=2, virtual_pipeline=2, schedule="zero_bubble", pipeline_split=1
    ),
}


QUICK = {
    "megatron": {
        "pp2", "pp2-interleaved", "pp2-zero-bubble", "tp2×pp2", "tp2+sp×pp2", "pp2×replicate2", "pp2×shard_all2",
        "pp2-interleaved×shard_all2",
    },
    "t5": {
        "pp2-zero-bubble", "pp4, uneven", "pp2-interleaved, one stage of the encoder", "tp2+sp×pp2-interleaved",
        "pp2-interleaved×shard_grads2",
    },
    "t5 1.1": {"pp2-interleaved"},
    "bart": {"pp4, one stage of the encoder", "pp2-zero-bubble, one stage of the encoder"},
}  # fmt: skip
ALL = {
    name: [
        layout
        for layout, sizes in LAYOUTS.items()
        if sizes.pipeline > 1
        and not sizes.problems(
            Divisible(layers=case.model.depths, heads=4, length=(case.source, case.length))
        )
    ]
    for name, case in CASES.items()
}
"""Where layers suffice."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A function: case → file with what one process computes; each is computed once."""
    folder, made = tmp_path_factory.mktemp("reference"), {}

    def path(name: str):
        if name not in made:
            made[name] = folder / f"{len(made)}.safetensors"
            write_reference((CASES | VARIANTS)[name], made[name])
        return made[name]

    return path


def test_quick_layouts_are_legal():
    assert all(layouts <= set(ALL[name]) for name, layouts in QUICK.items())


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=() if layout in QUICK[name] else pytest.mark.slow)
        for name, layouts in ALL.items()
        for layout in layouts
    ],
)
def test_every_layout(rank_pool, reference, name, layout):
    assert_parity(rank_pool, CASES[name], LAYOUTS[layout], reference=reference(name))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("recomputed", "pp2-interleaved"),
        ("few micro-batches", "pp4"),
        ("frozen", "pp2-interleaved"),
    ],
)
def test_every_way_of_training(rank_pool, reference, name, layout):
    assert_parity(rank_pool, VARIANTS[name], LAYOUTS[layout], reference=reference(name))


@pytest.mark.parametrize(
    ("name", "layout", "tolerance"),
    [("fp32", "pp2-interleaved×shard_all2", 1e-4), ("bf16", "pp2", 1e-5)],
)
def test_lower_precisions_differ_by_rounding(rank_pool, reference, name, layout, tolerance):
    """float64 would hide what gloo lacks in fp32, and a message of another dtype than was stated."""
    found = by_kind(compare(rank_pool, VARIANTS[name], LAYOUTS[layout], reference(name)))
    assert max(found["loss"], found["gradient"], found["norm"]) < tolerance
