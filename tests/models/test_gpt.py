"""The whole model: stages cut from it, positions given, initial numbers, and that it learns."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch

from megalith.models.config import ModelConfig
from megalith.models.gpt import GPT, Blocks
from megalith.nn.dropout import sample_keys
from megalith.nn.loss import LossTerm
from megalith.topology.rng import initialise
from tests.reference.common import mean_loss, random_model

SHAPE = {
    "vocab_size": 13,
    "num_layers": 4,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}


def make_model(**fields):
    return random_model(ModelConfig(**{**SHAPE, **fields})).train()


def batch():
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(13, (2, 16), generator=generator) for _ in range(2))
    return tokens, targets, sample_keys(1, 1, torch.arange(2))


@pytest.mark.parametrize(
    "fields", [{}, {"position_embedding_type": "rope"}, {"transformer_block_type": "post_ln"}]
)
def test_stages_are_the_model_with_parts_deleted(fields):
    """Layers 0-2 on one stage, 3 on the other, names kept: the same hidden states, dropout included."""
    model = make_model(**fields)
    tokens, _, keys = batch()
    first, last = copy.deepcopy(model), copy.deepcopy(model)
    first.last, last.first = False, False
    first.blocks = Blocks({str(i): first.blocks[str(i)] for i in (0, 1, 2)})
    last.blocks = Blocks({"3": last.blocks["3"]})
    del first.final_norm, last.position_embedding
    assert torch.equal(last(first(tokens, keys=keys), keys=keys), model(tokens, keys=keys))
    names = {n for stage in (first, last) for n, _ in stage.named_parameters()}
    assert names == {n for n, _ in model.named_parameters()}


def test_a_middle_stage_needs_no_table():
    model = make_model(position_embedding_type="rope")
    x = torch.randn(2, 16, 16, dtype=torch.float64)
    wanted = x
    middle = copy.deepcopy(model)
    middle.first = middle.last = False
    middle.blocks = Blocks({str(i): middle.blocks[str(i)] for i in (1, 2)})
    keys = torch.arange(2)
    wanted = middle(x, keys=keys)
    del middle.token_embedding, middle.final_norm
    assert torch.equal(middle(x, keys=keys), wanted)


@pytest.mark.parametrize("kind", ["learned_absolute", "rope", "relative"])
def test_a_stage_without_blocks_takes_documents(kind):
    """Tables on one stage, all blocks on another, nothing on a third, the norm on the last: the whole model's hidden states."""
    model = make_model(position_embedding_type=kind, hidden_dropout=0.0)
    tokens, _, _ = batch()
    documents = torch.arange(16).div(5, rounding_mode="floor").repeat(2, 1)
    stages = [copy.deepcopy(model) for _ in range(4)]
    for i, stage in enumerate(stages):
        stage.first, stage.last = i == 0, i == 3
        stage.blocks = stage.blocks if i == 1 else Blocks()
        if i:
            del stage.token_embedding, stage.position_embedding
        if i != 3:
            del stage.final_norm
    x = tokens
    for stage in stages:
        x = stage(x, documents=documents)
    assert kind == "relative" or not list(stages[2].parameters())
    assert torch.equal(x, model(tokens, documents=documents))


@pytest.mark.parametrize("kind", ["learned_absolute", "rope"])
def test_positions_are_used(kind):
    model = make_model(position_embedding_type=kind).eval()
    tokens = batch()[0]
    ordinary = torch.arange(16).repeat(2, 1)
    assert torch.equal(model(tokens, positions=ordinary), model(tokens))
    restarted = ordinary % 5
    assert not torch.allclose(model(tokens, positions=restarted), model(tokens))


def test_causal():
    model = make_model().eval()
    tokens = batch()[0]
    other = tokens.clone()
    other[:, 9:] = (other[:, 9:] + 1) % 13
    before, after = model(tokens), model(other)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


def test_loss_terms_and_logits():
    model = make_model().eval()
    tokens, targets, _ = batch()
    targets[0, :5] = -1
    hidden = model(tokens)
    term = model.loss(hidden, targets)["lm"]
    assert isinstance(term, LossTerm)
    assert term.count == 27
    assert term.weight == 1.0
    logits = model.logits(hidden)
    assert logits.shape == (2, 16, 13)
    picked = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    assert abs(term.sum + picked[targets >= 0].sum()) < 1e-12 * term.sum


def test_names_of_parameters():
    """What checkpoints hold. A change here is a change of the format."""
    names = {re.sub(r"\.\d+\.", ".N.", n) for n, _ in make_model().named_parameters()}
    assert names == {
        "token_embedding.weight",
        "position_embedding.weight",
        *(
            f"blocks.N.{layer}.{kind}"
            for layer in (
                "norm_attention",
                "attention.qkv",
                "attention.out",
                "norm_mlp",
                "mlp.up",
                "mlp.down",
            )
            for kind in ("weight", "bias")
        ),
        "final_norm.weight",
        "final_norm.bias",
    }
    fields = {
        "position_embedding_type": "relative",
        "normalization": "rmsnorm",
        "activation": "swiglu",
        "bias": False,
        "share_embeddings_and_output_weights": False,
    }
    names = {re.sub(r"\.\d+\.", ".N.", n) for n, _ in make_model(**fields).named_parameters()}
    layers = (
        "norm_attention",
        "attention.qkv",
        "attention.out",
        "norm_mlp",
        "mlp.up",
        "mlp.gate",
        "mlp.down",
    )
    assert names == {
        *(f"{n}.weight" for n in ("token_embedding", "relative_bias", "final_norm", "head")),
        *(f"blocks.N.{layer}.weight" for layer in layers),
    }


@pytest.mark.parametrize("scaled", [True, False])
def test_initial_numbers(scaled):
    config = ModelConfig(
        vocab_size=1000,
        num_layers=8,
        hidden_size=128,
        num_attention_heads=4,
        init_method_std=0.05,
        use_scaled_init_method=scaled,
        position_embedding_type="learned_absolute",
        share_embeddings_and_output_weights=False,
    )
    model = GPT(config)
    initialise(model.named_parameters(), model.init_rules(), 7)
    residual = 0.05 / math.sqrt(16) if scaled else 0.05
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            assert parameter.eq(0).all(), name
        elif "norm" in name:
            assert parameter.eq(1).all(), name
        else:
            std = residual if re.search(r"attention\.out|mlp\.down", name) else 0.05
            error = 5 * std / math.sqrt(2 * parameter.numel())
            assert abs(parameter.std() - std) < error, name
            assert abs(parameter.mean()) < 5 * std / math.sqrt(parameter.numel()), name


def test_initial_loss_is_that_of_guessing():
    """A fresh GPT-2 guesses: log of the vocabulary, not more."""
    model = GPT(ModelConfig(**{**SHAPE, "vocab_size": 500, "hidden_size": 64, "hidden_dropout": 0.0}))
    initialise(model.named_parameters(), model.init_rules(), 0)
    tokens = torch.randint(500, (8, 16), generator=torch.Generator().manual_seed(0))
    assert abs(mean_loss(model, tokens, tokens.roll(1, 0)) - math.log(500)) < 0.05


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "position_embedding_type": "rope",
            "normalization": "rmsnorm",
            "activation": "swiglu",
            "bias": False,
            "num_query_groups": 2,
            "share_embeddings_and_output_weights": False,
        },
    ],
    ids=["gpt2", "llama"],
)
def test_learns_to_copy(fields):
    """The second half of a row repeats the first: only attention by content or position can know it."""
    fields = {
        **SHAPE,
        "num_layers": 2,
        "hidden_size": 32,
        "hidden_dropout": 0.0,
        "init_method_std": 0.1,
        **fields,
    }
    model = GPT(ModelConfig(**fields))
    initialise(model.named_parameters(), model.init_rules(), 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        half = torch.randint(13, (32, 8), generator=generator)
        tokens = torch.cat((half, half), 1)
        targets = torch.cat((tokens[:, 1:], tokens.new_full((32, 1), -1)), 1)
        targets[:, :7] = -1
        loss = mean_loss(model, tokens, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.2:
            break
    assert loss < 0.2
