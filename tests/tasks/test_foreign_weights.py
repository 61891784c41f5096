"""Training that begins with weights that another program saved: they arrive, and the run goes on exactly."""

from __future__ import annotations

import pytest
import torch

from megalith.checkpoint.reading import read_tensors
from megalith.errors import EXIT_SUCCESS, CheckpointError
from megalith.models.config import ModelConfig
from megalith.tokenizers.load import load_tokenizer
from tests.checkpoint.foreign_files import hugging_face, megatron, random_model
from tests.tasks.nano import LENGTH, losses, make_corpus, pretrain


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("foreign-corpus"))


@pytest.fixture(scope="module")
def model(corpus):
    return random_model(
        ModelConfig(
            vocab_size=load_tokenizer(corpus / "tok").vocab_size,
            num_layers=2,
            hidden_size=16,
            num_attention_heads=2,
            ffn_hidden_size=32,
            max_position_embeddings=LENGTH,
        ),
        torch.float32,
    )


@pytest.mark.parametrize("kind", ["huggingface", "megatron"])
def test_weights_of_others_begin_a_run_that_resumes_exactly(corpus, model, tmp_path, kind):
    theirs = tmp_path / "theirs"
    if kind == "huggingface":
        hugging_face(theirs, model)
    else:
        megatron(theirs, model, version=0, sizes=(2, 2), args={})
    begin = f"model.init_from={theirs}" if kind == "huggingface" else f"restore_from_path={theirs}"

    still = tmp_path / "still"
    code, text = pretrain(corpus, still, begin, "model.optim.lr=0", steps=1)
    assert code == EXIT_SUCCESS
    assert "from the weights of" in text
    saved = {lazy.name: lazy.read() for lazy in read_tensors(still / "checkpoints/step_0000001")}
    for name, parameter in model.named_parameters():
        found = saved[f"model.{name}"]
        if name == "token_embedding.weight":
            found, parameter = found[: model.config.vocab_size], parameter[: model.config.vocab_size]
        assert torch.equal(found, parameter), name

    whole, parted = tmp_path / "whole", tmp_path / "parted"
    pretrain(corpus, whole, begin, steps=6)
    pretrain(corpus, parted, begin, steps=3)
    _, text = pretrain(corpus, parted, begin, steps=6)
    assert "going on from step 3" in text
    assert losses(parted) == losses(whole)


def test_another_model_is_refused_by_its_keys(corpus, model, tmp_path):
    hugging_face(tmp_path / "theirs", model)
    begin = f"model.init_from={tmp_path}/theirs"
    with pytest.raises(CheckpointError) as caught:
        pretrain(corpus, tmp_path / "run", begin, "model.num_layers=3", "model.activation=relu")
    assert "model.num_layers: 2 in the checkpoint, 3 here" in str(caught.value)
    assert "model.activation: gelu_tanh in the checkpoint, relu here" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"model\.init_from takes its weights to step 0"):
        pretrain(corpus, tmp_path / "run", f"model.resume_from_checkpoint={tmp_path}/theirs")
    assert not (tmp_path / "run").exists()
