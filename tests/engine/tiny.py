"""A tiny GPT, its engine, and batches in which every micro-batch has another number of targets."""

from __future__ import annotations

from typing import Any

import torch

from megalith.engine.engine import Engine
from megalith.models.config import ModelConfig
from megalith.models.gpt import GPT
from megalith.optim.config import OptimConfig
from megalith.optim.schedule import make_schedule
from megalith.parallel.apply import build
from megalith.topology.topology import Topology

LENGTH, VOCABULARY = 8, 100


def tiny_config(**changes: Any) -> ModelConfig:
    shape = {
        "vocab_size": VOCABULARY,
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        "hidden_dropout": 0.1,
    }
    return ModelConfig(**{**shape, **changes})


def tiny_engine(
    *,
    precision: str = "64",
    seed: int = 7,
    optim: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    building: dict[str, Any] | None = None,
    **settings: Any,
) -> Engine:
    topology = Topology.single("cpu")
    config = tiny_config(**(model or {}))
    stages = build(GPT, config, topology, seed=seed, precision=precision, **(building or {}))
    # eps is large because Adam's first steps are the signs of gradients otherwise, which hides and inflates differences
    optimizer = OptimConfig(
        **{"name": "adamw", "lr": 1e-2, "eps": 1e-4, "weight_decay": 0.1, **(optim or {})}
    )
    schedule = make_schedule(optimizer, max_steps=20, global_batch=8, sequence_length=LENGTH)
    settings = {"micro_batch_size": 2, "clip": 0.5, **settings}
    return Engine(
        stages, topology, optim=optimizer, schedule=schedule, seed=seed, precision=precision, **settings
    )


def tiny_batch(step: int = 0, samples: int = 8) -> dict[str, torch.Tensor]:
    """Unequal target counts; samples 2 and 3, a whole micro-batch of two, have none."""
    generator = torch.Generator().manual_seed(1000 + step)
    text = torch.randint(VOCABULARY, (samples, LENGTH + 1), generator=generator)
    targets = text[:, 1:].clone()
    targets[2:4] = -1
    for row in range(samples):
        targets[row, : row % 5] = -1
    return {
        "tokens": text[:, :-1],
        "targets": targets,
        "sample": torch.arange(samples) + step * samples,
    }


def gradients(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in engine.trainable.items() if p.grad is not None}


def snapshot(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.tensors().items()}


def worst(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Largest difference, relative to the largest element of its tensor."""
    assert left.keys() == right.keys()
    return max(
        ((left[n] - right[n]).abs().max() / right[n].abs().max().clamp(min=1e-30)).item() for n in left
    )
