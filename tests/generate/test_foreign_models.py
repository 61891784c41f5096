"""Models that other programs saved, read for generation: whole, shared among processes, and through the public face."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import megalith
from megalith.cli.generate import generate
from megalith.errors import CheckpointError, DataError
from megalith.generate.loading import load_model
from megalith.models.config import ModelConfig
from megalith.tokenizers.train import TrainingOptions, train_bpe, write_trained
from megalith.topology.sizes import Sizes
from tests.checkpoint.foreign_files import GPT2_LIKE, LLAMA_LIKE, hugging_face, megatron, random_model
from tests.generate import ranks

TOKENS = torch.arange(24).view(2, 12)


def logits(model):
    with torch.no_grad():
        return model.logits(model(TOKENS))


@pytest.mark.parametrize("kind", ["huggingface", "core"])
def test_shared_by_four_processes_as_by_one(tmp_path, rank_pool, kind):
    model = random_model(
        ModelConfig(**LLAMA_LIKE | {"num_query_groups": 4, "make_vocab_size_divisible_by": 32})
    )
    if kind == "huggingface":
        hugging_face(tmp_path, model)
    else:
        megatron(tmp_path, model, core=True, sizes=(2, 2))
    alone = load_model(tmp_path, precision="64").model
    assert (logits(alone)[..., :29] - logits(model)).abs().max() < 1e-12
    for sizes in (Sizes(tensor=4), Sizes(tensor=2, replicate=2), Sizes(tensor=2, pipeline=2)):
        for found in rank_pool.run(ranks.logits_of, 4, str(tmp_path), TOKENS, sizes):
            assert (found - logits(alone)).abs().max() < 1e-12


def test_float64_files_stay_so_and_others_are_read_as_asked(tmp_path):
    model = random_model(ModelConfig(**GPT2_LIKE))
    assert logits(megalith.load(hugging_face(tmp_path / "wide", model)).model).dtype == torch.float64
    half = hugging_face(tmp_path / "half", random_model(ModelConfig(**GPT2_LIKE), torch.bfloat16))
    read = megalith.load(half, device="cpu", precision="32").model
    assert read.token_embedding.weight.dtype == torch.float32
    assert torch.equal(
        read.token_embedding.weight[:29],
        random_model(ModelConfig(**GPT2_LIKE), torch.bfloat16).token_embedding.weight[:29].float(),
    )


@pytest.fixture
def spelled(tmp_path):
    """A folder of transformers with the tokenizer that it was made for."""
    tokenizer = train_bpe(["the cat sat on the mat " * 20], TrainingOptions(vocab_size=270))
    config = ModelConfig(**GPT2_LIKE | {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 32})
    folder = hugging_face(tmp_path / "model", random_model(config))
    write_trained(tokenizer, folder)
    return folder, tokenizer


def test_the_folders_tokenizer_comes_with_it(spelled):
    folder, tokenizer = spelled
    loaded = megalith.load(folder)
    assert loaded.tokenizer.encode("the cat") == tokenizer.encode("the cat")
    assert loaded.notices == ()
    result = CliRunner().invoke(
        command(), ["--checkpoint", str(folder), "--prompt", "the cat", "--tokens-to-generate", "3"]
    )
    assert result.exit_code == 0, result.output
    assert result.output.startswith("the cat")


def test_megatrons_true_vocabulary_is_the_tokenizers(tmp_path, spelled):
    folder, tokenizer = spelled
    megatron(tmp_path / "run", random_model(ModelConfig(**GPT2_LIKE | {"vocab_size": tokenizer.vocab_size})))
    loaded = load_model(tmp_path / "run", tokenizer=str(folder))
    assert loaded.model.config.vocab_size == tokenizer.vocab_size
    (tmp_path / "run/tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    loaded = load_model(tmp_path / "run")
    assert loaded.model.config.vocab_size == loaded.tokenizer.vocab_size == tokenizer.vocab_size
    assert loaded.step == 7


def test_weights_load_without_a_tokenizer_that_cannot_be_read(spelled):
    folder, _ = spelled
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {}}}))
    loaded = megalith.load(folder)
    assert loaded.tokenizer is None
    assert any("its tokenizer is left out" in notice for notice in loaded.notices)
    with pytest.raises(CheckpointError, match="give --tokenizer FILE"):
        loaded.needs_tokenizer()
    with pytest.raises(DataError):
        load_model(folder, tokenizer=str(folder))


def test_the_package_is_there_before_torch():
    code = "import sys, megalith; assert 'torch' not in sys.modules; assert callable(megalith.load)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'loda'"):
        megalith.loda  # noqa: B018


def command():
    import typer

    app = typer.Typer()
    app.command()(generate)
    return app
