"""The writer of Hugging Face folders, read back by transformers alone."""

from __future__ import annotations

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tests.golden import tiny  # noqa: E402
from tests.golden.huggingface_files import Folder, write_folder  # noqa: E402


@pytest.mark.parametrize(
    ("make", "layout"),
    [
        (tiny.gpt2, Folder()),
        (tiny.gpt2, Folder("safetensors", names="bare", buffers=True)),
        (tiny.llama, Folder("safetensors", sharded=True)),
        (tiny.mistral, Folder("bin", buffers=True, config="old")),
        (tiny.qwen2, Folder("bin", sharded=True, zipped=False)),
    ],
)
def test_transformers_reads_the_same_model(tmp_path, make, layout):
    model = make()
    write_folder(tmp_path, model, layout)
    files = sorted(tmp_path.glob("*model*"))
    assert (len(files) > 2) == layout.sharded
    assert any(file.suffix == f".{layout.form}" for file in files)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    error = tiny.logits(tiny.widened(again)) - tiny.logits(model)
    assert error.abs().max() < 1e-12


def test_old_settings_of_rotary_angles(tmp_path):
    scaling = {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}
    write_folder(tmp_path, tiny.llama(rope_parameters=scaling), Folder(config="old"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == {"type": "linear", "factor": 2.0}
    assert "rope_parameters" not in config


def test_wider_formulas_are_those_of_transformers(tmp_path):
    model = tiny.llama()
    model.save_pretrained(tmp_path)
    narrow = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    error = (tiny.logits(narrow) - tiny.logits(model)).abs().max()
    assert 1e-9 < error < 1e-4
