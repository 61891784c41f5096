"""A tiny float64 GPT with larger weights (so that predictions differ), a tokenizer of its size, and a checkpoint of both."""

from __future__ import annotations

from pathlib import Path

import torch

from megalith.checkpoint.native import Checkpointer
from megalith.generate.loading import Loaded
from megalith.models.config import ModelConfig
from megalith.models.family import describe
from megalith.models.gpt import GPT
from megalith.parallel.apply import build
from megalith.tokenizers.bpe import DefinedTokenizer
from megalith.tokenizers.load import load_tokenizer
from megalith.tokenizers.train import TrainingOptions, train_bpe, write_trained
from megalith.topology.topology import Topology

CORPUS = ["the cat sat on the mat, a dog sat on the cat; naïve 中文 " * 9]
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


def tiny_model(vocab_size: int = 61, *, positions: int = 48, precision: str = "64", **options) -> GPT:
    config = ModelConfig(
        vocab_size=vocab_size,
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        max_position_embeddings=positions,
        **options,
    )
    (model,) = build(GPT, config, Topology.single(), seed=3, precision=precision)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model.eval()


def tiny_tokenizer(folder: Path) -> DefinedTokenizer:
    write_trained(train_bpe(CORPUS, TrainingOptions(280)), folder)
    return load_tokenizer(folder)


def tiny_loaded(folder: Path, **options) -> Loaded:
    """Model and tokenizer as `load_model` returns them, without a checkpoint on the disk."""
    tokenizer = tiny_tokenizer(folder / "tokenizer")
    model = tiny_model(tokenizer.vocab_size, **options)
    return Loaded(model, tokenizer, folder, {"step": 7, "seed": 3, **describe("gpt", model.config)})


def save_tiny(run: Path, **options) -> Path:
    """A run folder with one checkpoint, step 7."""
    loaded = tiny_loaded(run, precision="32", **options)
    tensors = {f"model.{name}": p.detach() for name, p in loaded.model.named_parameters()}
    keeper = Checkpointer(run / "checkpoints", Topology.single())
    keeper.save(7, tensors, dict(loaded.state), config_yaml="", tokenizer=run / "tokenizer")
    return run
