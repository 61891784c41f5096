"""`model.compat.padded_logits=trained`: the rows that pad the vocabulary take part in the softmax, alike on every layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megalith.models.config import ModelConfig
from megalith.models.gpt import GPT
from megalith.testing.parity import Case, make_batch, make_engine, share
from megalith.topology.sizes import Sizes
from megalith.topology.topology import Topology

CASE = Case(
    ModelConfig(
        vocab_size=21,
        make_vocab_size_divisible_by=16,
        num_layers=2,
        hidden_size=16,
        num_attention_heads=4,
        max_position_embeddings=8,
        share_embeddings_and_output_weights=False,
    )
)
LAYOUTS = {
    "tensor4": Sizes(tensor=4),
    "tensor2-pipeline2": Sizes(tensor=2, pipeline=2),
    "sequence2-shard2": Sizes(tensor=2, sequence_parallel=True, shard=2, zero_stage=3),
}


def losses(sizes: Sizes, *, trained: bool) -> list[float]:
    """Of three steps, the second and third behind updates that moved the padded rows."""
    topology = Topology.of(sizes, "cpu") if sizes.world > 1 else Topology.single("cpu")
    engine = make_engine(CASE, topology)
    if trained:
        for stage in engine.stages:
            stage.train_padding()
    return [engine.train_step(share(make_batch(CASE, step), topology)).loss for step in range(3)]


def trained_losses(sizes: Sizes) -> list[float]:
    return losses(sizes, trained=True)


def test_the_loss_is_cross_entropy_over_all_rows():
    model = GPT(CASE.model).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.train_padding()
    hidden, targets = (
        torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True),
        torch.randint(-1, 21, (2, 5)),
    )
    term = model.loss(hidden, targets)["lm"]
    term.sum.backward()
    mine = hidden.grad.clone(), model.head.weight.grad.clone()
    hidden.grad = model.head.weight.grad = None
    logits = hidden @ model.head.weight.T
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
    expected.backward()
    torch.testing.assert_close(term.sum, expected)
    torch.testing.assert_close(mine, (hidden.grad, model.head.weight.grad))
    assert mine[1][21:].abs().min() > 0
    assert model.logits(hidden).shape[-1] == 21


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_alike(rank_pool, layout):
    expected = losses(Sizes(), trained=True)
    for found in rank_pool.run(trained_losses, 4, LAYOUTS[layout]):
        assert found == pytest.approx(expected, rel=1e-10)
    assert losses(Sizes(), trained=False) != pytest.approx(expected, rel=1e-3)
