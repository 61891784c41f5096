"""How much memory a conversion takes, the certificate included: the largest tensor twice and a constant. And what loading adds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megalith.models.config import num_parameters
from tests.checkpoint.convert.sparse import config_of, peak, write_sparse

ROOT = Path(__file__).parents[3]
CONSTANT = 256 << 20
"""Blocks on their way to the disk, a layer's part in fp32 and the next one's on both sides, programs of pickles, logits, what libraries
keep."""


def grown(work: str) -> int:
    """Bytes of memory that `work` took at most beyond what its imports did, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", peak(work)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)["grown"]


@pytest.mark.parametrize(
    ("ranks", "target"),
    [(8, '"megatron", Sizes(1)'), pytest.param(1, '"megatron", Sizes(8)', marks=pytest.mark.slow)],
)
def test_half_a_billion_parameters(tmp_path, ranks, target):
    """0.5B in bf16: 1.1 GB of tensors, of which the largest takes 131 MB."""
    config = config_of("0.5B")
    root = write_sparse(tmp_path / "in", config, ranks, torch.bfloat16)
    largest = 2 * config.padded_vocab_size * config.hidden_size
    assert (
        grown(f"convert({str(root)!r}, {str(tmp_path / 'out')!r}, Plan({target}))") < 2 * largest + CONSTANT
    )


def test_loading_takes_the_model_and_little_more(tmp_path):
    """Half of that in bf16, in 8 files, read as fp32 and made ready for reading: 1.3 GB of weights, and no second ones beside."""
    config = config_of("0.5B").model_copy(update={"num_layers": 4})
    root = write_sparse(tmp_path / "in", config, 8, torch.bfloat16)
    model = 4 * num_parameters(config, padded=True)
    largest = 2 * config.padded_vocab_size * config.hidden_size
    work = f"load_model({str(root)!r}, device='cpu', precision='fp32')"
    assert model - (64 << 20) < grown(work) < model + 2 * largest + CONSTANT
