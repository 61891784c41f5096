"""Greedy decoding on the device: with the key-value cache as without, in a batch as alone, and as on the CPU."""

from __future__ import annotations

import pytest
import torch

from megalith.generate.engine import decode
from megalith.generate.sampling import Sampling
from megalith.models.gpt import GPT
from megalith.parallel.apply import build
from megalith.topology.topology import Topology
from tests.device.small import small_config

pytestmark = pytest.mark.device
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7], [8, 8]]
VARIANTS = {
    "gpt2": {},
    "llama": {
        "position_embedding_type": "rope",
        "num_query_groups": 2,
        "normalization": "rmsnorm",
        "activation": "swiglu",
        "share_embeddings_and_output_weights": False,
    },
    "relative": {"position_embedding_type": "relative"},
}


def greedy(model, prompts, **options):
    *_, rows = decode(model, prompts, Sampling(tokens_to_generate=40), eod=None, **options)
    return [row.tokens for row in rows]


def make(name, device, precision="32"):
    """Larger weights than a fresh model's, so that the best token leads clearly."""
    (model,) = build(
        GPT, small_config(**VARIANTS[name]), Topology.single(device), seed=3, precision=precision
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model.eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_the_cache_changes_nothing(device, name):
    model = make(name, device)
    together = greedy(model, PROMPTS)
    assert together == greedy(model, PROMPTS, recompute=True)
    assert together == [greedy(model, [prompt])[0] for prompt in PROMPTS]
    assert together == greedy(make(name, torch.device("cpu")), PROMPTS)


def test_half_precision_decodes(device):
    (row, *_) = greedy(make("gpt2", device, "bf16-mixed"), PROMPTS)
    assert len(row) == len(PROMPTS[0]) + 40
