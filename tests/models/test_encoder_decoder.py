"""Encoder-decoders: padding that nobody looks at, dropout told apart, names, first numbers, and that they learn."""

from __future__ import annotations

import math
import re

import pytest
import torch
from pydantic import ValidationError

from megalith.models.encdec import EncoderDecoder
from megalith.models.encdec_config import EncoderDecoderConfig
from megalith.nn.dropout import sample_keys
from megalith.topology.rng import initialise
from tests.reference.common import random_model

SHAPE = {
    "vocab_size": 13,
    "encoder_num_layers": 2,
    "decoder_num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}
KINDS = {
    "megatron": {"output_bias": True},
    "t5": {
        "position_embedding_type": "relative",
        "normalization": "rmsnorm",
        "bias": False,
        "attention_scale": 1.0,
        "activation": "geglu",
        "share_embeddings_and_output_weights": False,
    },
    "bart": {"transformer_block_type": "post_ln", "share_position_embeddings": False},
    "rope, grouped": {"position_embedding_type": "rope", "num_query_groups": 2},
}
LENGTHS = torch.tensor([9, 4, 1])


def make_model(**fields):
    return random_model(EncoderDecoderConfig(**{**SHAPE, **fields}), model_class=EncoderDecoder).train()


def batch():
    generator = torch.Generator().manual_seed(0)
    source, tokens, targets = (torch.randint(13, (3, n), generator=generator) for n in (9, 6, 6))
    targets[0, :3] = -1
    return source, tokens, targets, sample_keys(1, 1, torch.arange(3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("core", ["auto", "eager"])
def test_nobody_looks_at_padding(kind, core):
    model = make_model(attention_core=core, **KINDS[kind]).eval()
    source, tokens, *_ = batch()
    other = torch.where(torch.arange(9) >= LENGTHS[:, None], (source + 1) % 13, source)
    before, after = (model(x, tokens=tokens, encoder_lengths=LENGTHS) for x in (source, other))
    assert torch.equal(before, after)
    alone = model(source[1:2, :4], tokens=tokens[1:2])
    assert (before[1] - alone[0]).abs().max() < 1e-12
    assert not torch.allclose(model(source, tokens=tokens)[1], alone[0])


def test_a_row_without_a_token_is_finite():
    model = make_model(**KINDS["t5"], hidden_dropout=0.0)
    source, tokens, targets, _ = batch()
    hidden = model(source, tokens=tokens, encoder_lengths=torch.tensor([9, 0, 3]))
    model.loss(hidden, targets)["lm"].sum.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_looks_back_and_at_all_of_the_source(kind):
    model = make_model(**KINDS[kind]).eval()
    source, tokens, *_ = batch()
    other = tokens.clone()
    other[:, 4:] = (other[:, 4:] + 1) % 13
    before, after = model(source, tokens=tokens), model(source, tokens=other)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])
    source[:, -1] = (source[:, -1] + 1) % 13
    assert not torch.allclose(model(source, tokens=tokens)[:, 0], before[:, 0])


def test_keys_and_values_of_the_memory_may_be_made_before():
    model = make_model().eval()
    source = batch()[0]
    memory = model.encode(source, LENGTHS)
    cross = model.decoder.blocks["0"].cross
    across = model.decoder.look_across(6, 9, source.device, lengths=LENGTHS)
    shared = model.decoder.share(torch.arange(6), source.device)._replace(memory=memory, across=across)
    x = torch.randn(3, 6, 16, dtype=torch.float64)
    seen = cross.look_up(memory)
    assert torch.equal(cross(x, shared._replace(memory=None), None, seen), cross(x, shared))


def test_every_dropout_has_a_mask_of_its_own():
    """Encoder and decoder read the same tokens: no place drops what another one does."""
    model = make_model(hidden_dropout=0.5, attention_dropout=0.5)
    masks = {}

    def hook(name):
        return lambda m, i, o: masks.update({name: (o == 0) & (i[0] != 0)})

    for name, module in model.named_modules():
        if type(module).__name__.endswith("Dropout"):
            module.register_forward_hook(hook(name))
    tokens = batch()[1]
    model(tokens, tokens=tokens, keys=batch()[3])
    hidden = {name: mask for name, mask in masks.items() if mask.ndim == 3}
    assert len(hidden) == 2 + 2 * 2 + 2 * 3
    assert len({tuple(mask.flatten().tolist()) for mask in hidden.values()}) == len(hidden)
    assert len(masks) - len(hidden) == 2 + 2 * 2
    cross, own = (masks[f"decoder.blocks.0.{part}.core.drop"] for part in ("cross", "attention"))
    lower = torch.ones(6, 6, dtype=torch.bool).tril()
    assert not torch.equal(cross[..., lower], own[..., lower])


def test_names_of_parameters():
    """What checkpoints hold. A change here is a change of the format."""

    def names(**fields):
        return {re.sub(r"\.\d+\.", ".N.", n) for n, _ in make_model(**fields).named_parameters()}

    inner = ("norm_attention", "attention.qkv", "attention.out", "norm_mlp", "mlp.up", "mlp.down")
    across = ("norm_cross", "cross.q", "cross.kv", "cross.out")
    blocks = {
        *(f"encoder.blocks.N.{layer}.{kind}" for layer in inner for kind in ("weight", "bias")),
        *(f"decoder.blocks.N.{layer}.{kind}" for layer in inner + across for kind in ("weight", "bias")),
    }
    ends = {f"{side}.final_norm.{kind}" for side in ("encoder", "decoder") for kind in ("weight", "bias")}
    tables = {"token_embedding.weight", "position_embedding.weight"}
    assert names(**KINDS["megatron"]) == blocks | ends | tables | {"output_bias.bias"}
    assert names(**KINDS["bart"]) == blocks | {"token_embedding.weight"} | {
        f"{side}.{name}"
        for side in ("encoder", "decoder")
        for name in ("position_embedding.weight", "norm_embedding.weight", "norm_embedding.bias")
    }
    gates = {f"{side}.blocks.N.mlp.gate.weight" for side in ("encoder", "decoder")}
    tables = {"token_embedding.weight", "head.weight"}
    tables |= {f"{side}.relative_bias.weight" for side in ("encoder", "decoder")}
    assert names(**KINDS["t5"]) == {n for n in blocks | ends | gates if not n.endswith("bias")} | tables


def test_initial_numbers_guess():
    fields = {**SHAPE, "vocab_size": 500, "hidden_size": 64, "hidden_dropout": 0.0, "encoder_num_layers": 8}
    model = EncoderDecoder(EncoderDecoderConfig(**fields))
    initialise(model.named_parameters(), model.init_rules(), 0)
    for name, parameter in model.named_parameters():
        if "norm" not in name and name.endswith("weight"):
            residual = re.search(r"attention\.out|cross\.out|mlp\.down", name)
            assert abs(parameter.std() / (0.02 / math.sqrt(16) if residual else 0.02) - 1) < 0.25, name
    tokens = torch.randint(500, (8, 16), generator=torch.Generator().manual_seed(0))
    term = model.loss(model(tokens, tokens=tokens.roll(1, 0)), tokens.roll(2, 0))["lm"]
    assert abs(term.sum / term.count - math.log(500)) < 0.05


@pytest.mark.parametrize("kind", ["megatron", "t5", "bart"])
def test_learns_to_turn_round(kind):
    """The target is the source backwards: only attention across can know it."""
    torch.manual_seed(0)
    fields = {**SHAPE, **KINDS[kind], "hidden_size": 32, "hidden_dropout": 0.0, "init_method_std": 0.1}
    fields |= {"encoder_num_layers": 1, "decoder_num_layers": 1}
    model = EncoderDecoder(EncoderDecoderConfig(**fields))
    initialise(model.named_parameters(), model.init_rules(), 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(200):
        source = torch.randint(1, 13, (32, 5))
        targets = source.flip(1)
        tokens = torch.cat((torch.zeros_like(targets[:, :1]), targets[:, :-1]), 1)
        term = model.loss(model(source, tokens=tokens), targets)["lm"]
        optimizer.zero_grad()
        (term.sum / term.count).backward()
        optimizer.step()
    assert term.sum / term.count < 0.3 * math.log(12)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"share_position_embeddings": False, "position_embedding_type": "relative"},
            "relative positions have none",
        ),
        (
            {"scale_decoder_output": True, "share_embeddings_and_output_weights": False},
            "share_embeddings_and_output_weights true",
        ),
        ({"hidden_size": 30, "num_attention_heads": 4}, "num_attention_heads ∈"),
    ],
)
def test_impossible(fields, said):
    with pytest.raises(ValidationError, match=said):
        EncoderDecoderConfig(**{**SHAPE, **fields})
