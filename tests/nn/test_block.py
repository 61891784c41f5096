"""A block is one graph for all layers, survives recomputation, and drops the same elements either way."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megalith.models.config import ModelConfig
from megalith.nn.dropout import sample_keys
from tests.reference.common import mean_loss, random_model

MODELS = {
    "gpt2": {},
    "gpt2 documents": {},
    "llama": {
        "position_embedding_type": "rope",
        "normalization": "rmsnorm",
        "activation": "swiglu",
        "num_query_groups": 2,
        "bias": False,
        "rotary_percentage": 0.5,
        "rotary_interleaved": True,
    },
    "bert wiring, dropped probabilities": {
        "apply_residual_connection_post_layernorm": True,
        "attention_dropout": 0.1,
        "activation": "gelu_erf",
    },
    "post_ln relative": {
        "transformer_block_type": "post_ln",
        "position_embedding_type": "relative",
        "activation": "geglu",
    },
}
TOKENS = torch.randint(13, (3, 16), generator=torch.Generator().manual_seed(0))
TARGETS = torch.randint(-1, 13, (3, 16), generator=torch.Generator().manual_seed(1))
DOCUMENTS = torch.arange(16).ge(7).int().repeat(3, 1)


def make_model(name, layers=4):
    shape = {"num_layers": layers, "hidden_size": 16, "num_attention_heads": 4, "max_position_embeddings": 16}
    return random_model(ModelConfig(vocab_size=13, hidden_dropout=0.2, **shape, **MODELS[name])).train()


def run(model, name, rows=slice(None)):
    inputs = {"documents": DOCUMENTS[rows]} if "documents" in name else {}
    keys = sample_keys(1, 2, torch.tensor([10, 11, 12]))[rows]
    loss = mean_loss(model, TOKENS[rows], TARGETS[rows], keys=keys, **inputs)
    return loss, torch.autograd.grad(loss, list(model.parameters()))


def assert_same(found, wanted, tolerance=1e-12):
    assert abs(found[0] - wanted[0]) <= tolerance * abs(wanted[0])
    for a, b in zip(found[1], wanted[1], strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_one_graph_serves_all_layers(name):
    """`fullgraph=True` refuses graph breaks; the backend counts the graphs of forward."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = make_model(name)
    wanted = run(model, name)
    for block in model.blocks.values():
        block.forward = torch.compile(block.forward, fullgraph=True, backend=backend)
    assert_same(run(model, name), wanted)
    assert len(graphs) == 1
    torch.compiler.reset()


@pytest.mark.parametrize("name", MODELS)
def test_recomputation_changes_nothing(name):
    """No generator state is saved: keyed dropout needs none."""
    model = make_model(name)
    wanted = run(model, name)
    for block in model.blocks.values():
        inner = block.forward
        block.forward = lambda *a, inner=inner: checkpoint(
            inner, *a, use_reentrant=False, preserve_rng_state=False
        )
    torch.manual_seed(99)
    assert_same(run(model, name), wanted, 0.0)


@pytest.mark.parametrize("name", MODELS)
def test_recomputing_the_core_alone_changes_nothing(name):
    model = make_model(name)
    wanted = run(model, name)
    for block in model.blocks.values():
        inner = block.attention.core.forward
        block.attention.core.forward = lambda *a, inner=inner: checkpoint(
            inner, *a, use_reentrant=False, preserve_rng_state=False
        )
    assert_same(run(model, name), wanted, 0.0)


@pytest.mark.parametrize("name", MODELS)
def test_any_split_into_micro_batches_is_the_same_batch(name):
    """Sums of loss and gradients over micro-batches of 1 and 2 rows, dropout on."""
    model = make_model(name)

    def total(rows):
        inputs = {"documents": DOCUMENTS[rows]} if "documents" in name else {}
        keys = sample_keys(1, 2, torch.tensor([10, 11, 12]))[rows]
        term = model.loss(model(TOKENS[rows], keys=keys, **inputs), TARGETS[rows])["lm"]
        return term.sum, torch.autograd.grad(term.sum, list(model.parameters()))

    whole = total(slice(0, 3))
    first, second = total(slice(0, 1)), total(slice(1, 3))
    sums = first[0] + second[0], [a + b for a, b in zip(first[1], second[1], strict=True)]
    assert_same(sums, whole)


def test_dropout_acts_at_every_site():
    """Without one of the sites the loss would be another number."""
    model = make_model("bert wiring, dropped probabilities")
    losses = [run(model, "")[0].item()]
    sites = [
        model.drop_embedding,
        model.blocks["0"].drop_attention,
        model.blocks["0"].drop_mlp,
        model.blocks["0"].attention.core.drop,
        model.blocks["3"].drop_mlp,
    ]
    for site in sites:
        site.eval()
        losses.append(run(model, "")[0].item())
        site.train()
    assert len(set(losses)) == len(losses)
    assert run(model, "")[0].item() == losses[0]


def test_a_forward_leaves_no_trace_on_the_module():
    model = make_model("llama")
    before = {n: dict(m.__dict__) for n, m in model.named_modules()}
    run(model, "llama")
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys(), name
        for key, value in module.__dict__.items():
            assert value is before[name][key] or value == before[name][key], (name, key)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_compiled_for_real_is_the_same(name):
    """Through the C++ compiler: values, gradients, and the very same dropped elements."""
    torch.compiler.reset()
    model = make_model(name, layers=2)
    wanted = run(model, name)
    for block in model.blocks.values():
        block.forward = torch.compile(block.forward, fullgraph=True)
    assert_same(run(model, name), wanted, 1e-10)
    torch.compiler.reset()
