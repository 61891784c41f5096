"""Damaged files of other programs: one error that names the file and says what to do, and nothing is loaded."""

from __future__ import annotations

import argparse
import contextlib
import json
import random

import pytest
import torch

from megalith.checkpoint.foreign import open_foreign
from megalith.errors import CheckpointError
from megalith.generate.loading import load_model
from megalith.models.config import ModelConfig
from tests.checkpoint.foreign_files import GPT2_LIKE, LLAMA_LIKE, hugging_face, megatron, random_model


@pytest.fixture(scope="module")
def model():
    return random_model(ModelConfig(**GPT2_LIKE))


def refusal(path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    assert caught.value.exit_code == 2
    return str(caught.value)


def shortened(file, keep):
    file.write_bytes(file.read_bytes()[:keep])


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_safetensors_cut_short(tmp_path, model, keep):
    shortened(hugging_face(tmp_path, model) / "model.safetensors", keep)
    said = refusal(tmp_path)
    assert "model.safetensors" in said
    assert "copy the folder again" in said


def test_safetensors_with_a_wrong_shape_or_name(tmp_path, model):
    file = hugging_face(tmp_path, model) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"shape":[16,64]', b'"shape":[64,16]', 1))
    assert "wrong shape: " in refusal(tmp_path)
    file.write_bytes(whole.replace(b"transformer.h.0.ln_1.weight", b"transformer.h.0.ln_0.weight", 1))
    said = refusal(tmp_path)
    assert "missing: transformer.h.0.ln_1.weight" in said
    assert "not known: transformer.h.0.ln_0.weight (as transformer.h.0.ln_1.weight?)" in said


@pytest.mark.parametrize("content", ["", "[]", "{", '{"model_type": 3}', '{"model_type": "gpt2"}', "\0\0"])
def test_a_damaged_configuration(tmp_path, model, content):
    hugging_face(tmp_path, model)
    (tmp_path / "config.json").write_text(content)
    assert "config.json" in refusal(tmp_path)


def test_no_weights(tmp_path, model):
    (hugging_face(tmp_path, model) / "model.safetensors").unlink()
    assert "there are no weights: model.safetensors" in refusal(tmp_path)


def test_sizes_that_are_absurd(tmp_path, model):
    hugging_face(tmp_path, model)
    values = json.loads((tmp_path / "config.json").read_text())
    for key, value in {"n_head": 5, "n_embd": -16, "n_layer": 2**40, "vocab_size": "many"}.items():
        (tmp_path / "config.json").write_text(json.dumps(values | {key: value}))
        assert str(tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize("keep", [0, 10, 300, -200])
def test_a_megatron_file_cut_short(tmp_path, model, keep):
    megatron(tmp_path, model, sizes=(2, 1))
    file = tmp_path / "iter_0000007/mp_rank_01/model_optim_rng.pt"
    shortened(file, keep)
    assert str(file) in refusal(tmp_path)


def test_files_of_different_checkpoints(tmp_path, model):
    megatron(tmp_path / "one", model, sizes=(2, 1))
    megatron(tmp_path / "other", random_model(ModelConfig(**GPT2_LIKE | {"num_layers": 3})), sizes=(2, 1))
    file = "iter_0000007/mp_rank_01/model_optim_rng.pt"
    (tmp_path / "one" / file).write_bytes((tmp_path / "other" / file).read_bytes())
    assert "the files belong to different checkpoints" in refusal(tmp_path / "one")


@pytest.mark.parametrize("seed", range(40))
def test_headers_with_random_bytes_changed(tmp_path, model, seed):
    """Whatever changes in the head of a file or in the configuration: it loads, or one error says why not."""
    hugging_face(tmp_path, model)
    draw = random.Random(seed)
    file = tmp_path / ("config.json" if seed % 2 else "model.safetensors")
    content = bytearray(file.read_bytes())
    for _ in range(3):
        content[draw.randrange(min(len(content), 3000))] = draw.randrange(256)
    file.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        loaded = load_model(tmp_path)
        assert all(isinstance(p, torch.nn.Parameter) for p in loaded.model.parameters())


ODD = [None, 0, -1, "x", 1.5, True, [], {}, 2**40, float("nan"), "rope", ["a"], 8]
"""What stands where a number, a name or a switch should."""


def test_arguments_of_any_kind(tmp_path, model):
    """Whatever Megatron's arguments say: a model that fits the tensors, or one error."""
    megatron(tmp_path, model)
    file = tmp_path / "iter_0000007/mp_rank_00/model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    said = vars(content["args"])
    more = [
        "kv_channels",
        "rotary_base",
        "norm_epsilon",
        "use_rope_scaling",
        "vocab_size",
        "num_experts",
        "glu_activation",
    ]
    refused = 0
    for seed in range(120):
        draw = random.Random(seed)
        changes = {draw.choice([*said, *more]): draw.choice(ODD) for _ in range(2)}
        torch.save(content | {"args": argparse.Namespace(**said | changes)}, file)
        try:
            assert open_foreign(tmp_path).tensors.keys() == dict(model.named_parameters()).keys()
        except CheckpointError:
            refused += 1
    assert 20 < refused < 120


def test_configurations_of_any_kind(tmp_path):
    hugging_face(tmp_path, random_model(ModelConfig(**LLAMA_LIKE)))
    values = json.loads((tmp_path / "config.json").read_text())
    more = ["rope_scaling", "head_dim", "sliding_window", "layer_types", "partial_rotary_factor"]
    refused = 0
    for seed in range(120):
        draw = random.Random(seed)
        changes = {draw.choice([*values, *more]): draw.choice(ODD) for _ in range(2)}
        (tmp_path / "config.json").write_text(
            json.dumps(values | changes | {"model_type": draw.choice(["llama", "qwen2"])})
        )
        try:
            assert "blocks.3.mlp.gate.weight" in open_foreign(tmp_path).tensors
        except CheckpointError:
            refused += 1
    assert 20 < refused < 120
