"""A GPT of a few thousand parameters and batches that depend on the sample number alone, for loop tests."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megalith.checkpoint.native import Checkpointer
from megalith.engine.engine import Engine
from megalith.models.config import ModelConfig
from megalith.models.gpt import GPT
from megalith.optim.config import OptimConfig
from megalith.optim.schedule import make_schedule
from megalith.parallel.apply import build
from megalith.topology.topology import Topology
from megalith.training.metrics import Meter
from megalith.training.saving import Saver
from megalith.training.trainer import Batches, Run

VOCABULARY, LENGTH, BATCH = 37, 12, 4
CONFIG = ModelConfig(
    vocab_size=VOCABULARY, num_layers=2, hidden_size=16, num_attention_heads=2, max_position_embeddings=LENGTH,
    make_vocab_size_divisible_by=8, hidden_dropout=0.1,
)  # fmt: skip


def make_engine(*, steps: int = 100, lr: float = 1e-2, **options) -> Engine:
    topology = Topology.single()
    optim = OptimConfig(lr=lr, sched={"name": "CosineAnnealing", "warmup_steps": 3})
    stages = build(GPT, CONFIG, topology, seed=1)
    schedule = make_schedule(optim, max_steps=steps, global_batch=BATCH, sequence_length=LENGTH)
    return Engine(
        stages, topology, optim=optim, schedule=schedule, seed=1, micro_batch_size=2, **options
    )  # fmt: skip


def batch(first: int, size: int = BATCH) -> dict[str, torch.Tensor]:
    rows = []
    for sample in range(first, first + size):
        generator = torch.Generator().manual_seed(sample)
        rows.append(torch.randint(VOCABULARY, (LENGTH + 1,), generator=generator))
    text = torch.stack(rows)
    targets = text[:, 1:].clone()
    targets[0, : first % 7] = -1
    return {"tokens": text[:, :-1], "targets": targets, "sample": torch.arange(first, first + size)}


def stream(engine: Engine) -> Iterator[dict[str, torch.Tensor]]:
    first = engine.consumed_samples
    while True:
        yield batch(first)
        first += BATCH


def validation() -> Iterator[dict[str, torch.Tensor]]:
    yield from (batch(10_000 + i * BATCH) for i in range(3))


def make_saver(engine: Engine, root, **options) -> Saver:
    checkpointer = Checkpointer(root, engine.topology, **options)
    return Saver(
        engine, checkpointer, config_yaml="model: {}\n", extra={"data_plan": {"seed": 3}, "origin": {}}
    )


def make_run(engine: Engine, root, *, validate: bool = True, **options) -> Run:
    return Run(
        engine=engine,
        saver=options.pop("saver", None) or make_saver(engine, root / "checkpoints"),
        meter=Meter(flops_per_token=1e6),
        train=Batches(lambda: stream(engine)),
        validation=Batches(validation) if validate else None,
        folder=root,
        **options,
    )
