"""FLOPs of each family against a count of every matrix product that torch runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megalith.engine.flops import Sample, matrix_parameters, model_flops
from megalith.engine.objective import objective_of
from megalith.models import presets
from megalith.models.config import ModelConfig
from megalith.models.family import class_of

ROWS, LENGTH, DECODER_LENGTH, MASKED = 2, 48, 16, 7
SHAPE: dict[str, Any] = {
    "vocab_size": 256, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "hidden_dropout": 0.0,
    "attention_core": "eager",
}  # fmt: skip
TWO_SIDES = {"encoder_num_layers": 3, "decoder_num_layers": 2, "ffn_hidden_size": 96, "num_query_groups": 2}
SIDES = Sample(LENGTH, DECODER_LENGTH)
BERT = Sample(LENGTH, targets=MASKED)


def batch(config: ModelConfig, sample: Sample) -> dict[str, torch.Tensor]:
    """Nothing is padded."""
    generator = torch.Generator().manual_seed(1)

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(config.vocab_size, (ROWS, length), generator=generator)

    if sample.decoder_length:
        read, written = tokens(sample.length), tokens(sample.decoder_length)
        return {"encoder_tokens": read, "tokens": written, "targets": written}
    read = tokens(sample.length)
    targets = read.clone()
    if sample.targets:
        targets[:, int(sample.targets) :] = -1
    return {"tokens": read, "targets": targets, "order": torch.zeros(ROWS, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("preset", "more", "sample"),
    [
        ("gpt2-124m", {}, Sample(LENGTH)),
        ("gpt2-124m", {"share_embeddings_and_output_weights": False, "activation": "swiglu"}, Sample(LENGTH)),
        ("bert-110m", {}, BERT),
        ("bert-110m", {"bert_binary_head": False}, BERT),
        ("t5-220m", {}, SIDES),
        ("t5-v1.1-base", TWO_SIDES, SIDES),
        ("bart-base", {"decoder_ffn_hidden_size": 64}, SIDES),
    ],
)
def test_the_formula_counts_every_product_of_forward_and_backward(preset, more, sample):
    config = presets.get(preset, **{**SHAPE, **more})
    model, objective, made = class_of(config)(config), objective_of(config), batch(config, sample)
    x, kwargs = objective.inputs(made)
    with FlopCounterMode(display=False) as counter:
        terms = objective.terms(model, model(x, **kwargs), made)
        sum(term.sum for term in terms.values()).backward()
    needed = model_flops(config, sample).per_token * sample.tokens * ROWS
    assert counter.get_total_flops() == pytest.approx(needed, rel=1e-12)


@pytest.mark.parametrize("changes", [{}, {"share_embeddings_and_output_weights": False}])
def test_matrices_of_a_gpt(changes):
    assert matrix_parameters(presets.get("gpt2-124m", **changes)) == 12 * 12 * 768**2 + 50257 * 768
