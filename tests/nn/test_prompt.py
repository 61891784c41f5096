"""Virtual tokens in the embedding: only they change, each row alone, with dropout of their own."""

from __future__ import annotations

import pytest
import torch

from megalith.adapt.method import Tag
from megalith.adapt.p_tuning import PTuning
from megalith.adapt.prompts import NewPrompt, virtual_ids
from megalith.adapt.soft_prompt import SoftPrompts
from megalith.models.config import ModelConfig
from megalith.models.encdec import EncoderDecoder
from megalith.models.encdec_config import EncoderDecoderConfig
from megalith.models.gpt import GPT
from megalith.nn.dropout import sample_keys
from megalith.nn.prompt import Prompts, SoftPrompt
from megalith.parallel.apply import build
from megalith.topology.topology import Topology

SHAPE = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_layers": 2,
    "max_position_embeddings": 12,
}
METHOD = {
    "new": [NewPrompt("a", 3), NewPrompt("b", 2)],
    "earlier": [Tag("c", 2), Tag("d", 1, positions=True)],
}
A, B, C = [23, 24, 25], [26, 27], [20, 21]
LEARNED = {"position_embedding_type": "learned_absolute"}
ROPE = {"position_embedding_type": "rope"}
POST = {"transformer_block_type": "post_ln", "share_position_embeddings": False}
KINDS = {
    "gpt": (GPT, ModelConfig, LEARNED),
    "gpt, rope": (GPT, ModelConfig, ROPE),
    "t5": (EncoderDecoder, EncoderDecoderConfig, {"position_embedding_type": "relative"}),
    "bart": (EncoderDecoder, EncoderDecoderConfig, POST),
}


def built(kind, adapt, **changes):
    """A float64 model of a kind, its matrices random."""
    model_class, config_class, fields = KINDS[kind]
    config = config_class(**{**SHAPE, "hidden_dropout": 0.0, **fields, **changes})
    (model,) = build(model_class, config, Topology.single(), seed=3, precision="64", adapt=adapt)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.startswith("prompts."):
            parameter.data.normal_(generator=generator)
    return model.eval()


def read(model, rows, **options):
    """Hidden states of rows that the model reads first."""
    tokens = torch.tensor(rows)
    if isinstance(model, EncoderDecoder):
        lengths = options.pop("lengths", None)
        return model.encode(tokens, lengths, options.get("keys"))
    options.pop("lengths", None)
    return model(tokens, **options)


TEXT = [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [SoftPrompts, PTuning])
def test_rows_without_virtual_tokens_keep_their_bits(kind, method):
    plain, tuned = built(kind, None), built(kind, method(**METHOD).install)
    for training in (False, True):
        keys = sample_keys(1, 2, torch.arange(2))
        assert torch.equal(
            read(plain.train(training), TEXT, keys=keys), read(tuned.train(training), TEXT, keys=keys)
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [SoftPrompts, PTuning])
def test_a_row_of_a_mixed_batch_is_as_alone(kind, method):
    """Two tags with matrices of different kinds and lengths, and a row without one; in training with its keys, too."""
    model = built(kind, method(**METHOD).install)
    rows = [[*A, 1, 2, 3], [*C, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13], [*B, 1, 2, 3, 4]]
    keys = sample_keys(1, 2, torch.arange(4))
    for training in (False, True):
        model.train(training)
        together = read(model, rows, keys=keys)
        for number, row in enumerate(rows):
            alone = read(model, [row], keys=keys[number : number + 1])[0]
            assert (together[number] - alone).abs().max() < 1e-12
    assert (together[0] - together[3]).abs().max() > 0.1


def test_text_rows_of_a_mixed_batch_keep_their_bits_in_the_embedding():
    model = built("gpt", SoftPrompts(**METHOD).install)
    tokens = torch.tensor([[*A, 1, 2, 3], [1, 2, 3, 4, 5, 6]])
    embedded = model.embed(tokens, torch.arange(6), 0, None)
    wte, wpe = model.token_embedding.weight, model.position_embedding.weight
    assert torch.equal(embedded[0, 3:], wte[[1, 2, 3]] + wpe[3:6])
    assert torch.equal(embedded[1], wte[1:7] + wpe[:6])


def test_positions_are_the_prompts_own_or_the_models():
    model = built("gpt", SoftPrompts(**METHOD).install)
    wpe, tables = model.position_embedding.weight, model.prompts.tables
    embedded = model.embed(torch.tensor([[1, *C, *B]]), torch.arange(5), 0, None)[0]
    assert torch.equal(embedded[1:3], tables[0].tokens + wpe[1:3])  # "c" brought none
    assert torch.equal(embedded[3:], tables[3].tokens + tables[3].positions)


def test_behind_a_norm_of_the_embedding():
    """BART's: a prompt's rows go through it, as rows of text do."""
    model = built("bart", SoftPrompts(**METHOD).install)
    table, norm = model.prompts.tables[2], model.encoder.norm_embedding
    embedded = model.embed(model.encoder, torch.tensor([[*A, 1]]), torch.arange(4), None)[0]
    assert torch.allclose(embedded[:3], norm(table.tokens + table.positions), atol=1e-12)


def test_dropout_is_the_prompts_own():
    """Its rate whatever the model's; only virtual rows; of the sample, the place and the channel; none in evaluation."""
    tables = [SoftPrompt(500, 64, own_positions=False)]
    torch.nn.init.ones_(tables[0].tokens)
    prompts = Prompts(20, tables)
    ids = torch.arange(20, 520)[None].expand(2, -1)
    tokens = torch.cat((ids, ids.new_zeros(2, 50)), 1)
    x, keys = torch.full((2, 550, 64), 3.0), sample_keys(1, 2, torch.arange(2))
    out = prompts(x, tokens, None, keys)
    assert torch.equal(out[:, 500:], x[:, 500:])
    dropped = out[:, :500] == 0
    assert abs(dropped.double().mean() - 0.1) < 5 * (0.09 / dropped.numel()) ** 0.5
    assert torch.allclose(out[:, :500][~dropped], torch.tensor(1 / 0.9))
    assert not torch.equal(dropped[0], dropped[1])
    assert torch.equal(prompts(x, tokens, None, keys), out)
    shifted = prompts(x, tokens.roll(1, dims=1), None, keys)[:, 1:501] == 0
    assert not torch.equal(shifted, dropped)  # another place, another mask
    assert prompts.eval()(x, tokens, None, keys)[:, :500].eq(1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_gets_its_gradient(kind):
    """Also of a tag that the batch lacks: zeros, so that every process has one to sum."""
    model = built(kind, SoftPrompts(**METHOD).install).train()
    keys = sample_keys(1, 2, torch.arange(2))
    read(model, [[*A, 1, 2, 3], [4, 5, 6, 7, 8, 9]], keys=keys).square().sum().backward()
    gradients = [table.tokens.grad for table in model.prompts.tables]
    assert [gradient.abs().max() > 0 for gradient in gradients] == [False, False, True, False]


def test_ids_lie_behind_the_vocabulary():
    tags = [Tag("c", 2), Tag("d", 1), Tag("a", 3)]
    assert virtual_ids(20, tags) == {"c": range(20, 22), "d": range(22, 23), "a": range(23, 26)}


def test_a_cache_remembers_prompts():
    """Token by token behind a prompt, as a generator reads, equals all at once."""
    model = built("gpt", SoftPrompts(**METHOD).install)
    row = torch.tensor([[*A, 1, 2, 3, 4, 5]])
    with torch.no_grad():
        whole, cache = model(row), model.new_cache(1, 12)
        parts = [
            model(row[:, :4], cache=cache),
            *(model(row[:, i : i + 1], cache=cache) for i in range(4, 8)),
        ]
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-12
