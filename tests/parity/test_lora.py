"""LoRA on a frozen base computes on every layout what it computes on one process: gradients of A and B, norms, weights.

Dropout of what A reads is on, of the base too: its masks must not know the layout.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megalith.adapt.lora import LoRA
from megalith.models.config import ModelConfig
from megalith.parallel.memory import Recompute
from megalith.testing.parity import Case, assert_parity, by_kind, compare, layouts, write_reference
from megalith.topology.sizes import Divisible
from tests.parity.cases import LLAMA, T5, bert, encoder_decoder, model


class Warm(LoRA):
    """B begins with numbers, too, so that A has a gradient in the first step."""

    def install(self, model):
        return [(r"\.lora_b$", ("normal", 0.2)), *super().install(model)]


METHOD = Warm(rank=3, alpha=6.0, dropout=0.2)


def few(config: ModelConfig, method: LoRA = METHOD, **how: Any) -> Case:
    """Four micro-batches of two rows."""
    return Case(config, adapt=method, micro_batches=4, clip=0.05, **how)


CASES = {
    "gpt2": few(model()),
    "llama": few(model(**LLAMA), replace(METHOD, targets=("q_proj", "k_proj", "v_proj", "embed->mlp"))),
    "t5": few(encoder_decoder(**T5), replace(METHOD, targets=("qkv", "cross.q", "kv", "out", "mlp"))),
    "bart": few(encoder_decoder(transformer_block_type="post_ln", share_position_embeddings=False)),
}
VARIANTS = {
    "bert": few(bert()),
    "recomputed": few(model(), recompute=Recompute("full", "block", 1)),
    "in groups": few(model(), recompute=Recompute("full", "uniform", 2)),
    "compiled": few(model(2), compile=True),
    "some layers": few(model(), replace(METHOD, targets=(r"blocks\.[13]\.",))),
    "last layer": few(model(), replace(METHOD, targets=(r"blocks\.3\.",))),
    "first layer": few(model(), replace(METHOD, targets=(r"blocks\.0\.",))),
    "bf16": few(model(hidden_dropout=0.0), precision="bf16-mixed"),
}
LAYOUTS = layouts()
QUICK = {
    "gpt2": {"pp2-zero-bubble", "shard_grads2", "tp2+sp×pp2-interleaved", "tp2+sp×shard_all2", "cp2-zero3"},
    "llama": {"tp2"},
    "t5": {"cp2×tp2+sp"},
    "bart": {"pp2-zero-bubble"},
}  # fmt: skip
ALL = {
    name: [
        layout
        for layout, sizes in LAYOUTS.items()
        if not sizes.problems(
            Divisible(
                layers=case.model.depths,
                heads=case.model.num_attention_heads,
                kv_heads=case.model.kv_heads,
                length=(case.source, case.length) if len(case.model.depths) == 2 else case.length,
            )
        )
    ]
    for name, case in CASES.items()
}


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
        pytest.param("bert", "tp2+sp", marks=pytest.mark.slow),
        ("recomputed", "tp2×pp2"),
        pytest.param("in groups", "tp2+sp", marks=pytest.mark.slow),
        pytest.param("compiled", "tp2+sp", marks=pytest.mark.slow),
        ("some layers", "pp2-interleaved"),
        pytest.param("some layers", "pp2-zero-bubble", marks=pytest.mark.slow),
        ("last layer", "pp2"),
        pytest.param("last layer", "pp2-interleaved", marks=pytest.mark.slow),
        pytest.param("first layer", "tp2+sp×pp2", marks=pytest.mark.slow),
        pytest.param("first layer", "pp2-zero-bubble", marks=pytest.mark.slow),
        pytest.param("some layers", "tp2+sp×shard_all2", marks=pytest.mark.slow),
    ],
)
def test_every_way_of_training(rank_pool, reference, name, layout):
    assert_parity(rank_pool, VARIANTS[name], LAYOUTS[layout], reference=reference(name))


def test_bf16_differs_by_rounding(rank_pool, reference):
    """float64 would hide a matrix that is cast on one layout alone."""
    found = by_kind(compare(rank_pool, VARIANTS["bf16"], LAYOUTS["pp2"], reference("bf16")))
    assert max(found["loss"], found["gradient"], found["norm"]) < 1e-5
