"""Every family's objective names the same terms in counts and in losses, and the engine trains on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megalith.engine.objective import objective_of
from megalith.models.family import FAMILIES

SHAPE: dict[str, Any] = {
    "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 32, "vocab_size": 20,
    "max_position_embeddings": 8, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    "make_vocab_size_divisible_by": 1,
}  # fmt: skip


def rows(family: str) -> dict[str, torch.Tensor]:
    """Two rows of 6 tokens with 3 targets."""
    tokens = torch.arange(12).reshape(2, 6)
    targets = torch.full((2, 6), -1)
    targets[0, 1], targets[1, 2], targets[1, 3] = 4, 5, 6
    batch = {"tokens": tokens, "targets": targets, "sample": torch.arange(2)}
    if family == "bert":
        batch |= {"types": tokens % 2, "lengths": torch.tensor([6, 4]), "order": torch.tensor([1, -1])}
    if family in ("t5", "bart"):
        batch |= {"encoder_tokens": tokens.flip(1)[:, :5], "encoder_lengths": torch.tensor([5, 3])}
    return batch


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_known_beforehand_are_those_of_the_loss_terms(family: str) -> None:
    model_class, config_class = FAMILIES[family]
    layers = (
        {"encoder_num_layers": 1, "decoder_num_layers": 1} if family in ("t5", "bart") else {"num_layers": 1}
    )
    config = config_class(**SHAPE, **layers)
    objective, batch = objective_of(config), rows(family)
    torch.manual_seed(0)
    model = model_class(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, kwargs = objective.inputs(batch)
    terms = objective.terms(model, model(x, **kwargs), batch)
    counts = objective.counts(batch)
    assert {name: int(count) for name, count in counts.items()} == {
        "lm": 3,
        **({"sop": 1} if family == "bert" else {}),
    }
    assert {name: int(term.count) for name, term in terms.items()} == {n: int(c) for n, c in counts.items()}
    assert all(term.sum.isfinite() and term.sum > 0 for term in terms.values())


def test_without_a_binary_head_there_is_one_term() -> None:
    _, config_class = FAMILIES["bert"]
    objective = objective_of(config_class(**SHAPE, num_layers=1, bert_binary_head=False))
    batch = {name: tensor for name, tensor in rows("bert").items() if name != "order"}
    assert list(objective.counts(batch)) == ["lm"]
