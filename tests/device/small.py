"""A GPT small enough for every test here and wide enough for every kernel: heads of 32, three layers, 128 positions."""

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

LENGTH, VOCABULARY, SAMPLES = 128, 300, 4


def small_config(**changes: Any) -> ModelConfig:
    shape = {
        "vocab_size": VOCABULARY,
        "num_layers": 3,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        "hidden_dropout": 0.1,
    }
    return ModelConfig(**{**shape, **changes})


def small_engine(
    device: torch.device, precision: str, *, model: dict[str, Any] | None = None, **settings: Any
) -> Engine:
    """The same weights whatever the device and precision, but for rounding."""
    topology = Topology.single(device)
    compiled = settings.pop("compile", False)
    stages = build(
        GPT, small_config(**(model or {})), topology, seed=7, precision=precision, compile=compiled
    )
    # eps is large because Adam's first steps are the signs of gradients otherwise, which inflates differences
    optim = OptimConfig(name="adamw", lr=1e-2, eps=1e-4, weight_decay=0.1)
    schedule = make_schedule(optim, max_steps=100, global_batch=SAMPLES, sequence_length=LENGTH)
    settings = {"micro_batch_size": 2, "clip": 0.5, **settings}
    return Engine(stages, topology, optim=optim, schedule=schedule, seed=7, precision=precision, **settings)


def small_batch(step: int = 0, *, documents: bool = False) -> dict[str, torch.Tensor]:
    """On the CPU, as the loader leaves it. Unequal target counts; with documents, other borders in every row."""
    text = torch.randint(
        VOCABULARY, (SAMPLES, LENGTH + 1), generator=torch.Generator().manual_seed(1000 + step)
    )
    targets = text[:, 1:].clone()
    for row in range(SAMPLES):
        targets[row, : 5 * row] = -1
    batch = {
        "tokens": text[:, :-1],
        "targets": targets,
        "sample": torch.arange(SAMPLES) + step * SAMPLES,
    }
    return {**batch, "documents": document_numbers()} if documents else batch


def document_numbers() -> torch.Tensor:
    """(B, T) int32: three documents a row, none of which ends at a multiple of a kernel's tile."""
    borders = torch.tensor([[17, 70], [40, 101], [5, 66], [63, 65]])
    place = torch.arange(LENGTH)
    return (place >= borders[:, :1]).int() + (place >= borders[:, 1:]).int()


def gradients(engine: Engine) -> dict[str, torch.Tensor]:
    """On the CPU in float64, to be compared."""
    return {name: p.grad.double().cpu() for name, p in engine.trainable.items() if p.grad is not None}


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: p.detach().double().cpu() for name, p in engine.parameters.items()}


def worst(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Largest difference, relative to the largest element of its tensor."""
    assert left.keys() == right.keys()
    return max(
        ((left[n] - right[n]).abs().max() / right[n].abs().max().clamp(min=1e-30)).item() for n in left
    )
