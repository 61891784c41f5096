"""BERT: stages cut from it, padding that nobody looks at, heads on the positions that need them, names and first numbers."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from pydantic import ValidationError

from megalith.models.bert import Bert
from megalith.models.bert_config import BertConfig
from megalith.nn.dropout import sample_keys
from megalith.topology.rng import initialise
from tests.reference.common import random_model

SHAPE = {
    "vocab_size": 13,
    "num_layers": 4,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}
WIRINGS = {
    "pre": {},
    "pre, residual behind the norm": {"apply_residual_connection_post_layernorm": True},
    "post": {"transformer_block_type": "post_ln"},
    "relative": {"position_embedding_type": "relative"},
    "rope": {"position_embedding_type": "rope"},
}
LENGTHS = torch.tensor([12, 7, 1])
ORDER = torch.tensor([1, -1, 0])


def make_model(**fields):
    return random_model(BertConfig(**{**SHAPE, **fields}), model_class=Bert).train()


def batch():
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(13, (3, 12), generator=generator) for _ in range(2))
    targets[:, ::3] = -1
    targets[torch.arange(12) >= LENGTHS[:, None]] = -1
    types = (torch.arange(12) > 4).long().repeat(3, 1)
    return tokens, types, targets, sample_keys(1, 1, torch.arange(3))


@pytest.mark.parametrize("wiring", WIRINGS)
def test_stages_are_the_model_with_parts_deleted(wiring):
    model = make_model(**WIRINGS[wiring])
    tokens, types, _, keys = batch()
    stages = [copy.deepcopy(model) for _ in range(3)]
    for i, (stage, layers) in enumerate(zip(stages, (range(1), range(1, 3), range(3, 4)), strict=True)):
        stage.cut(i, 3, layers)
    x = tokens
    for stage in stages:
        x = stage(x, types=types, lengths=LENGTHS, keys=keys)
    assert torch.equal(x, model(tokens, types=types, lengths=LENGTHS, keys=keys))
    names = [{n for n, _ in stage.named_parameters()} for stage in stages]
    assert set.union(*names) == {n for n, _ in model.named_parameters()}
    middle = {n.split(".")[0] for n in names[1]}
    assert middle == ({"blocks", "relative_bias"} if wiring == "relative" else {"blocks"})
    with torch.no_grad():
        assert torch.equal(stages[2].logits(x), model.logits(x))


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("core", ["auto", "eager"])
def test_nobody_looks_at_padding(wiring, core):
    model = make_model(attention_core=core, **WIRINGS[wiring]).eval()
    tokens, types, *_ = batch()
    padding = torch.arange(12) >= LENGTHS[:, None]
    other = torch.where(padding, (tokens + 1) % 13, tokens)
    before, after = (model(x, types=types, lengths=LENGTHS) for x in (tokens, other))
    assert torch.equal(before[~padding], after[~padding])
    alone = model(tokens[1:2, :7], types=types[1:2, :7])
    assert (before[1, :7] - alone[0]).abs().max() < 1e-12
    assert not torch.allclose(model(tokens, types=types)[1, :7], alone[0])
    full = model(tokens, types=types, lengths=torch.full((3,), 12))
    assert torch.equal(full, model(tokens, types=types))


def test_looks_both_ways():
    model = make_model().eval()
    tokens = batch()[0]
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % 13
    assert not torch.allclose(model(tokens)[:, 0], model(other)[:, 0])


def test_types_are_read():
    model = make_model().eval()
    tokens, types, *_ = batch()
    assert torch.equal(model(tokens), model(tokens, types=torch.zeros_like(types)))
    assert not torch.allclose(model(tokens), model(tokens, types=types))


def test_the_head_sees_only_what_is_to_be_guessed():
    model = make_model()
    tokens, types, targets, keys = batch()
    rows = []
    model.lm_head.dense.register_forward_hook(lambda m, i, o: rows.append(o.shape[0]))
    terms = model.loss(model(tokens, types=types, lengths=LENGTHS, keys=keys), targets, ORDER)
    assert rows == [int((targets >= 0).sum())]
    assert {name: int(term.count) for name, term in terms.items()} == {"lm": rows[0], "sop": 2}


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_without_targets(training):
    """A micro-batch may have none: nothing is lost, and every gradient is there, as zero."""
    model = make_model(hidden_dropout=0.0).train(training)
    tokens, types, targets, _ = batch()
    none = torch.full_like(targets, -1), torch.full_like(ORDER, -1)
    terms = model.loss(model(tokens, types=types, lengths=LENGTHS), *none)
    assert all(term.sum == 0 and term.count == 0 for term in terms.values())
    sum(term.sum for term in terms.values()).backward()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in model.parameters())


def test_without_a_binary_head():
    model = make_model(bert_binary_head=False)
    tokens, _, targets, keys = batch()
    assert {n.split(".")[0] for n, _ in model.named_parameters()}.isdisjoint(
        {"type_embedding", "pooler", "binary_head"}
    )
    assert set(model.loss(model(tokens, keys=keys), targets)) == {"lm"}
    with pytest.raises(ValueError, match="order"):
        make_model().loss(model(tokens, keys=keys), targets)


def test_one_type_cannot_tell_two_halves_apart():
    with pytest.raises(ValidationError, match="0 for none"):
        BertConfig(**SHAPE, num_tokentypes=1)
    assert BertConfig(**SHAPE, num_tokentypes=1, bert_binary_head=False).token_types == 1
    assert BertConfig(**SHAPE, num_tokentypes=0).token_types == 0


def test_padded_rows_reach_no_logit_until_asked():
    model = make_model(make_vocab_size_divisible_by=8).eval()
    tokens, _, targets, _ = batch()
    hidden = model(tokens)
    before = model.loss(hidden, targets, ORDER)["lm"].sum
    with torch.no_grad():
        model.output_bias.bias[13:] += 5
    assert torch.equal(model.loss(hidden, targets, ORDER)["lm"].sum, before)
    assert model.logits(hidden).shape[-1] == 13
    model.train_padding()
    assert model.loss(hidden, targets, ORDER)["lm"].sum > before + 1


def test_names_of_parameters():
    """What checkpoints hold. A change here is a change of the format."""
    names = {re.sub(r"\.\d+\.", ".N.", n) for n, _ in make_model().named_parameters()}
    layers = ("norm_attention", "attention.qkv", "attention.out", "norm_mlp", "mlp.up", "mlp.down")
    both = ("final_norm", "lm_head.dense", "lm_head.norm", "pooler.dense", "binary_head")
    assert names == {
        *(f"{table}_embedding.weight" for table in ("token", "position", "type")),
        *(f"blocks.N.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")),
        *(f"{layer}.{kind}" for layer in both for kind in ("weight", "bias")),
        "output_bias.bias",
    }
    fields = {"transformer_block_type": "post_ln", "share_embeddings_and_output_weights": False}
    other = {re.sub(r"\.\d+\.", ".N.", n) for n, _ in make_model(**fields).named_parameters()}
    assert other - names == {"norm_embedding.weight", "norm_embedding.bias", "head.weight"}
    assert names - other == {"final_norm.weight", "final_norm.bias"}


def test_initial_numbers_guess():
    model = Bert(BertConfig(**{**SHAPE, "vocab_size": 500, "hidden_size": 64, "hidden_dropout": 0.0}))
    initialise(model.named_parameters(), model.init_rules(), 0)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            assert parameter.eq(1).all(), name
        elif name.endswith("bias"):
            assert parameter.eq(0).all(), name
        else:
            residual = 0.02 / math.sqrt(8) if re.search(r"attention\.out|mlp\.down", name) else 0.02
            assert abs(parameter.std() / residual - 1) < 0.25, name
    tokens = torch.randint(500, (8, 16), generator=torch.Generator().manual_seed(0))
    terms = model.loss(model(tokens), tokens, torch.arange(8) % 2)
    assert abs(terms["lm"].sum / terms["lm"].count - math.log(500)) < 0.05
    assert abs(terms["sop"].sum / terms["sop"].count - math.log(2)) < 0.05


def test_learns_order_and_words():
    """Rows of 0 … 5 or of 5 … 0 with one hole: the hole and the direction are both known from what stands on both sides."""
    torch.manual_seed(0)
    model = Bert(BertConfig(**{**SHAPE, "num_layers": 1, "hidden_dropout": 0.0, "init_method_std": 0.1}))
    initialise(model.named_parameters(), model.init_rules(), 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        order = torch.randint(2, (32,))
        rows = torch.arange(6).repeat(32, 1)
        rows[order == 1] = rows[order == 1].flip(1)
        hole = torch.randint(6, (32, 1))
        targets = torch.full_like(rows, -1).scatter(1, hole, rows.gather(1, hole))
        terms = model.loss(model(rows.scatter(1, hole, 12)), targets, order)
        means = {name: term.sum / term.count for name, term in terms.items()}
        optimizer.zero_grad()
        sum(means.values()).backward()
        optimizer.step()
    assert means["lm"] < 0.05
    assert means["sop"] < 0.05
