"""Soft prompts and p-tuning as methods: how they begin, what trains, what is kept, and what a user may get wrong."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

from megalith.adapt.method import Tag
from megalith.adapt.p_tuning import PTuning
from megalith.adapt.prompts import NewPrompt
from megalith.adapt.soft_prompt import SoftPrompts, tiled
from megalith.engine.engine import Engine
from megalith.errors import CheckpointError, ConfigError, UnsupportedError
from megalith.models.bert import Bert
from megalith.models.bert_config import BertConfig
from megalith.models.config import ModelConfig
from megalith.models.encdec import EncoderDecoder
from megalith.models.encdec_config import EncoderDecoderConfig
from megalith.models.gpt import GPT
from megalith.optim.config import OptimConfig
from megalith.optim.schedule import make_schedule
from megalith.parallel.apply import build
from megalith.topology.topology import Topology

SHAPE = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_layers": 2,
    "max_position_embeddings": 400,
}
TOPOLOGY = Topology.single()


def made(method, *, seed=1, config=None, model_class=GPT, precision="32"):
    config = config or ModelConfig(**SHAPE)
    stages = build(model_class, config, TOPOLOGY, seed=seed, adapt=method.install, precision=precision)
    method.begin(stages, TOPOLOGY)
    return stages


def engine_of(method, **settings):
    optim = OptimConfig(lr=0.01, weight_decay=0.1)
    return Engine(
        made(method),
        TOPOLOGY,
        optim=optim,
        schedule=make_schedule(optim, max_steps=20, global_batch=2, sequence_length=6),
        seed=1,
        micro_batch_size=2,
        frozen=method.frozen,
        **settings,
    )


def batch():
    tokens = torch.tensor([[22, 23, 24, 1, 2, 3], [22, 23, 24, 4, 5, 6]])
    return {"tokens": tokens, "targets": tokens.roll(-1, 1).clamp(max=19), "sample": torch.arange(2)}


@pytest.mark.parametrize(
    ("ids", "expected"), [((7, 8, 9, 10, 11), (7, 8, 9)), ((7, 8), (7, 8, 7)), ((7,), (7, 7, 7))]
)
def test_a_text_is_clipped_or_tiled(ids, expected):
    assert tiled(NewPrompt("a", 3, ids)) == expected
    method = SoftPrompts([NewPrompt("a", 3, ids)])
    (model,) = made(method)
    table = model.prompts.tables[0]
    assert torch.equal(table.tokens, model.token_embedding.weight[list(expected)])
    assert torch.equal(table.positions, model.position_embedding.weight[:3])


@pytest.mark.parametrize("shared", [True, False])
def test_an_encoders_positions(shared):
    config = EncoderDecoderConfig(**SHAPE, share_position_embeddings=shared)
    (model,) = made(SoftPrompts([NewPrompt("a", 3, (4, 5))]), config=config, model_class=EncoderDecoder)
    table = model.position_embedding if shared else model.encoder.position_embedding
    assert torch.equal(model.prompts.tables[0].positions, table.weight[:3])


def test_random_is_xavier_normal():
    length, width = 300, 16
    (model,) = made(SoftPrompts([NewPrompt("a", length), NewPrompt("b", length)]))
    tables = model.prompts.tables
    expected = math.sqrt(2 / (length + width))
    for parameter in model.prompts.parameters():
        assert abs(parameter.std() / expected - 1) < 0.05
    assert not torch.equal(tables[0].tokens, tables[1].tokens)
    assert not torch.equal(tables[0].tokens, tables[0].positions)
    (again,) = made(SoftPrompts([NewPrompt("a", length), NewPrompt("b", length)]))
    (other,) = made(SoftPrompts([NewPrompt("a", length), NewPrompt("b", length)]), seed=2)
    assert torch.equal(again.prompts.tables[0].tokens, tables[0].tokens)
    assert not torch.equal(other.prompts.tables[0].tokens, tables[0].tokens)


def test_prompts_do_not_change_how_the_model_begins():
    (plain,) = build(GPT, ModelConfig(**SHAPE), TOPOLOGY, seed=1)
    (model,) = made(SoftPrompts([NewPrompt("a", 3)]))
    found = dict(model.named_parameters())
    assert all(torch.equal(p, found[name]) for name, p in plain.named_parameters())


@pytest.mark.parametrize("method", [SoftPrompts, PTuning])
def test_only_the_new_tags_move_and_the_rest_costs_nothing(method):
    """No gradient, no moments, and in a checkpoint nothing, for what is frozen."""
    engine = engine_of(method([NewPrompt("new", 3)], [Tag("old", 2, positions=True)]), keep="trainable")
    before = {name: p.detach().clone() for name, p in engine.parameters.items()}
    engine.forward_backward(batch())
    with_gradient = {name for name, p in engine.parameters.items() if p.grad is not None}
    engine.optimizer_step()
    moved = {name for name, p in engine.parameters.items() if not torch.equal(p, before[name])}
    tuned = {name for name in before if name.startswith("prompts.tables.1.")}
    assert tuned == with_gradient == engine.trainable.keys()
    assert moved == tuned
    assert len(engine.optimizer.state) == len(tuned)
    assert {name for name in engine.tensors() if name.startswith("model.")} == {f"model.{n}" for n in tuned}
    assert engine.weights().keys() == {f"model.{name}" for name in before}


@pytest.mark.parametrize("method", [SoftPrompts, PTuning])
def test_what_is_kept_computes_the_same(method):
    """Tensors of one model in another, made by `understand`: a network collapses to its matrix."""
    tuned = method([NewPrompt("new", 3)], [Tag("old", 2, positions=True)])
    (model,) = made(tuned, precision="64")
    with torch.no_grad():
        model.prompts.tables[0].tokens.normal_()
        model.prompts.tables[0].positions.normal_()
    kept = tuned.tensors([model], TOPOLOGY)
    own = {"prompts.1.positions"} if method is SoftPrompts else set()
    assert kept.keys() == {"prompts.0.tokens", "prompts.0.positions", "prompts.1.tokens"} | own
    used = method.understand(tuned.describe())
    assert used.tags == tuned.tags
    assert used.trains == ()
    (other,) = made(used, precision="64")
    used.fill([other], kept)
    tokens = torch.tensor([[22, 23, 24, 1, 2, 3], [20, 21, 4, 5, 6, 7]])
    assert torch.equal(model.eval()(tokens), other.eval()(tokens))
    assert used.describe() == tuned.describe()


def test_a_second_task_fills_the_first_ones_matrices():
    first = SoftPrompts([NewPrompt("one", 3, (1, 2))])
    (model,) = made(first)
    kept = first.tensors([model], TOPOLOGY)
    second = SoftPrompts([NewPrompt("two", 5)], first.tags)
    (model,) = made(second)
    second.fill([model], kept)
    assert torch.equal(second.tensors([model], TOPOLOGY)["prompts.0.tokens"], kept["prompts.0.tokens"])
    assert [(tag.name, tag.length) for tag in second.tags] == [("one", 3), ("two", 5)]


def test_the_first_rows_of_a_network_begin_from_given_ids():
    (model,) = made(PTuning([NewPrompt("task", 4, (7, 8)), NewPrompt("long", 2, (1, 2, 3))]))
    first, second = model.prompts.tables
    assert torch.equal(first.embedding[:2], model.token_embedding.weight[[7, 8]])
    assert first.embedding[2:].std() > 0.5
    assert torch.equal(second.embedding, model.token_embedding.weight[[1, 2]])


@pytest.mark.parametrize("kind", ["lstm", "mlp"])
def test_the_networks_numbers_keep_their_size(kind):
    """Neither vanishing nor exploding at a real width."""
    config = ModelConfig(**{**SHAPE, "hidden_size": 256, "num_layers": 1})
    method = PTuning([NewPrompt("a", 50)], kind=kind)
    tokens = method.tensors(made(method, config=config), TOPOLOGY)["prompts.0.tokens"]
    assert tokens.shape == (50, 256)
    assert 0.01 < tokens.std() < 1


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"prompts.0.tokens": torch.zeros(4, 16)}, "wants (3, 16)"),
        ({"prompts.1.tokens": torch.zeros(3, 16)}, "no such prompt"),
        ({"blocks.0.attention.qkv.lora_a": torch.zeros(3, 16)}, "no such prompt"),
    ],
)
def test_tensors_that_do_not_fit(tensors, says):
    method = SoftPrompts([NewPrompt("a", 3)])
    stages = made(method)
    with pytest.raises(CheckpointError, match=says.replace("(", r"\(").replace(")", r"\)")):
        method.fill(stages, tensors)


def test_a_network_has_no_matrix_to_fill():
    method = PTuning([NewPrompt("a", 3)])
    with pytest.raises(CheckpointError):
        method.fill(made(method), {"prompts.0.tokens": torch.zeros(3, 16)})


def test_all_that_is_wrong_with_tags_at_once():
    with pytest.raises(ConfigError) as caught:
        SoftPrompts([NewPrompt("a", 3), NewPrompt("", 0)], [Tag("a", 3)])
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("length", [401])
def test_more_virtual_tokens_than_positions(length):
    with pytest.raises(ConfigError, match="400"):
        made(SoftPrompts([NewPrompt("a", length)]))


def test_a_text_outside_the_vocabulary_or_none():
    with pytest.raises(ConfigError, match="20"):
        made(SoftPrompts([NewPrompt("a", 3, (20,))]))


def test_bert_has_no_place_for_virtual_tokens():
    with pytest.raises(UnsupportedError, match="no place"):
        made(SoftPrompts([NewPrompt("a", 3)]), config=BertConfig(**SHAPE), model_class=Bert)


def test_a_method_travels():
    """To the processes of a run."""
    method = PTuning([NewPrompt("a", 3, (1,))], [Tag("b", 2)], kind="mlp")
    assert pickle.loads(pickle.dumps(method)).describe() == method.describe()
