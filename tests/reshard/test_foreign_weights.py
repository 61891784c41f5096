"""Weights that another program saved, put into engines of any layout: every process gets its part, bit for bit."""

from __future__ import annotations

import pytest
import torch

from megalith.models.config import ModelConfig
from megalith.testing.parity import Case
from megalith.topology.sizes import Sizes
from tests.checkpoint.foreign_files import GPT2_LIKE, LLAMA_LIKE, hugging_face, megatron, random_model
from tests.reshard.ranks import foreign_differences, on

LAYOUTS = {
    "one": Sizes(),
    "tensor4": Sizes(tensor=4),
    "tensor2-pipeline2": Sizes(tensor=2, pipeline=2),
    "pipeline2-interleaved": Sizes(pipeline=2, virtual_pipeline=2, schedule="interleaved"),
    "tensor2-shard2": Sizes(tensor=2, shard=2, zero_stage=3),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Three formats; in the second the table is padded further than ours, in the third less."""
    folder = tmp_path_factory.mktemp("foreign")
    gpt2 = ModelConfig(**GPT2_LIKE | {"make_vocab_size_divisible_by": 32})
    llama = ModelConfig(**LLAMA_LIKE | {"make_vocab_size_divisible_by": 32, "num_query_groups": 4})
    return {
        "version 0": (gpt2, megatron(folder / "0", random_model(gpt2), version=0, sizes=(4, 2))),
        "core": (llama, megatron(folder / "core", random_model(llama), core=True, sizes=(2, 2))),
        "huggingface": (llama, hugging_face(folder / "hf", random_model(llama))),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["version 0", "core", "huggingface"])
def test_every_process_gets_its_part(saved, rank_pool, kind, layout):
    config, path = saved[kind]
    expected = {name: p.detach() for name, p in random_model(config).named_parameters()}
    sizes = LAYOUTS[layout]
    for found in on(rank_pool, foreign_differences, sizes, Case(config), sizes, str(path), expected):
        assert found == []


def test_a_difference_is_seen(saved):
    config, path = saved["huggingface"]
    expected = {name: p.detach().clone() for name, p in random_model(config).named_parameters()}
    expected["blocks.1.mlp.up.weight"][3, 2] += torch.tensor(1e-9)
    assert foreign_differences(Case(config), Sizes(), str(path), expected) == ["model.blocks.1.mlp.up.weight"]
