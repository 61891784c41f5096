"""The passes know every layer of BERT and of encoder-decoders: nothing that the rules share stays whole, and numbers do not change."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor

from megalith.nn.block import Block
from megalith.parallel.apply import build
from megalith.parallel.memory import Recompute
from megalith.parallel.rules import shared_dim
from megalith.parallel.tensor import share_tensors
from megalith.topology.launch import fake
from megalith.topology.sizes import Sizes
from megalith.topology.topology import Topology
from tests.parallel.families import MODELS, config_of, in_process, mean_loss, record


def close(found, wanted, tolerance=1e-12):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        error = (found[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-30)
        assert error <= tolerance, (name, error)


@pytest.mark.parametrize("name", MODELS)
def test_two_tensor_ranks_share_what_the_rules_say(name):
    model_class, config = config_of(name)
    with torch.device("meta"):
        whole, model = model_class(config), model_class(config)
    with fake(2):
        share_tensors(model, Topology.of(Sizes(tensor=2)))
    for key, layer in model.named_modules():
        axes = getattr(layer, "axes", None)
        if axes is None:
            continue
        dim = shared_dim(axes, "tensor")
        plain = whole.get_submodule(key)
        for kind, parameter in layer.named_parameters(recurse=False):
            shape = list(getattr(plain, kind).shape)
            held = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if dim is not None and (kind == "weight" or dim == 0):
                shape[dim] //= 2
            assert list(held.shape) == shape, (key, kind)


@pytest.mark.parametrize("name", MODELS)
def test_two_tensor_ranks_compute_the_same(name, rank_pool):
    wanted = record(name)
    for found in rank_pool.run(in_process, 2, name, {"tensor": 2}):
        close({key: torch.tensor(value, dtype=torch.float64) for key, value in found.items()}, wanted, 1e-10)


@pytest.mark.parametrize("name", ["bert", "bert-original", "megatron-t5", "t5-1.1", "bart"])
def test_two_tensor_ranks_share_the_sequences(name, rank_pool):
    """The encoder's and the decoder's, which have lengths of their own; BERT's heads see a part each."""
    wanted = record(name)
    for found in rank_pool.run(in_process, 2, name, {"tensor": 2, "sequence_parallel": True}):
        close({key: torch.tensor(value, dtype=torch.float64) for key, value in found.items()}, wanted, 1e-10)


@pytest.mark.parametrize("name", ["bert", "t5-1.0"])
def test_two_data_ranks_share_the_weights(name, rank_pool):
    wanted = {key: value if key == "loss" else 2 * value for key, value in record(name).items()}
    for found in rank_pool.run(in_process, 2, name, {"shard": 2, "zero_stage": 3}):
        close({key: torch.tensor(value, dtype=torch.float64) for key, value in found.items()}, wanted, 1e-10)


@pytest.mark.parametrize("name", ["bert", "megatron-t5"])
@pytest.mark.parametrize(
    "how",
    [Recompute(), Recompute(layers=2), Recompute(method="block"), Recompute(granularity="selective")],
    ids=str,
)
def test_recomputing_changes_nothing(name, how):
    close(record(name, recompute=how), record(name))


@pytest.mark.parametrize("name", ["bert", "t5-1.1"])
def test_a_block_is_one_graph(name):
    """Compiled whole, it gives the same numbers (traced only: code for a CPU would cost seconds)."""
    model_class, config = config_of(name)
    (model,) = build(model_class, config, Topology.single("cpu"), seed=3, precision="64")
    wanted = mean_loss(model)
    for module in model.modules():
        if isinstance(module, Block):
            module.forward = torch.compile(module.forward, fullgraph=True, backend="eager")
    assert (mean_loss(model) - wanted).abs() <= 1e-12 * wanted
