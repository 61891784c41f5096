"""Hugging Face folders in the forms found in the wild: `load_model` computes what `transformers` does, to 1e-10 in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from megalith.errors import CheckpointError
from megalith.generate.loading import load_model
from tests.reference.common import missing_pairs, rows

pytest.importorskip("transformers")

from tests.golden import tiny
from tests.golden.huggingface_files import Folder, write_folder

TOLERANCE = 1e-10
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS = {
    "gpt2": tiny.gpt2,
    "gpt2-erf": partial(tiny.gpt2, "gelu"),
    "gpt2-odd": partial(tiny.gpt2, n_inner=48, layer_norm_epsilon=1e-3, scale_attn_weights=False),
    "neox": tiny.neox,
    "llama": partial(tiny.llama, rms_norm_eps=1e-6),
    "llama-tied": partial(tiny.llama, tied=True, head_dim=12),
    "llama-base": partial(tiny.llama, 4, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "llama-linear": partial(
        tiny.llama, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}
    ),
    "llama-3.1": partial(tiny.llama, rope_parameters=LLAMA3),
    "llama-biases": partial(tiny.llama, attention_bias=True, mlp_bias=True),
    "mistral": tiny.mistral,
    "qwen2": tiny.qwen2,
    "qwen2-untied": partial(tiny.qwen2, tied=False),
}
FACTORS = {
    "model": list(MODELS),
    "form": ["safetensors", "bin"],
    "files": ["one", "shards"],
    "config": ["new", "old"],
    "buffers": ["none", "stored"],
    "names": ["full", "bare"],
    "pickle": ["zip", "legacy"],
}
TABLE = """
    gpt2         safetensors  one     new  none    full  zip
    gpt2         safetensors  one     old  stored  bare  zip
    gpt2         bin          shards  new  stored  bare  legacy
    gpt2-erf     bin          one     old  none    bare  zip
    gpt2-erf     safetensors  shards  new  stored  full  zip
    gpt2-odd     safetensors  one     old  none    full  zip
    gpt2-odd     bin          shards  new  none    full  zip
    neox         safetensors  shards  old  none    full  zip
    neox         bin          one     new  none    full  legacy
    llama        safetensors  shards  new  none    full  zip
    llama        bin          one     old  stored  full  legacy
    llama-tied   safetensors  one     old  none    full  zip
    llama-tied   bin          shards  new  stored  full  zip
    llama-base   safetensors  one     new  none    full  zip
    llama-base   bin          shards  old  stored  full  zip
    llama-linear safetensors  shards  old  none    full  zip
    llama-linear bin          one     new  none    full  legacy
    llama-3.1    safetensors  one     old  stored  full  zip
    llama-3.1    bin          shards  new  none    full  legacy
    llama-biases safetensors  shards  new  none    full  zip
    llama-biases bin          one     old  none    full  zip
    mistral      safetensors  shards  new  none    full  zip
    mistral      bin          one     old  stored  full  legacy
    qwen2        safetensors  one     new  none    full  zip
    qwen2        bin          shards  old  none    full  zip
    qwen2-untied safetensors  shards  old  none    full  zip
    qwen2-untied bin          one     new  stored  full  legacy
"""


def test_every_pair_that_matters_meets():
    """Names without the prefix are GPT-2's alone; how a pickle lies and whether buffers do is not asked of every model."""
    apart = {"names", "pickle", "buffers"}
    open_pairs = missing_pairs(rows(TABLE, FACTORS), FACTORS)
    assert [(a, b) for a, b in open_pairs if a[0] not in apart and b[0] not in apart] == []


@pytest.mark.parametrize("row", rows(TABLE, FACTORS), ids=lambda row: "-".join(row.values()))
def test_logits(tmp_path, row):
    model = MODELS[row["model"]]()
    layout = Folder(
        form=row["form"],
        sharded=row["files"] == "shards",
        names=row["names"],
        buffers=row["buffers"] == "stored",
        config=row["config"],
        zipped=row["pickle"] == "zip",
    )
    theirs = tiny.logits(model)
    loaded = load_model(write_folder(tmp_path, model, layout), device="cpu", precision="64")
    with torch.no_grad():
        ours = loaded.model.logits(loaded.model(tiny.tokens()))
    assert ours.dtype == torch.float64
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= TOLERANCE


def test_a_window_of_attention_is_refused(tmp_path):
    """Ours sees every position: a model that saw fewer would read other logits."""
    write_folder(tmp_path, tiny.mistral(sliding_window=8), Folder())
    with pytest.raises(CheckpointError, match="sliding_window: 8"):
        load_model(tmp_path, device="cpu", precision="64")
