"""Tensors and saves that the checkpoint tests share. Content is a function of the step, so any load can be judged."""

from __future__ import annotations

from pathlib import Path

import torch

from megalith.checkpoint.native import Checkpointer
from megalith.checkpoint.retention import Policy, Retention
from megalith.topology.topology import Topology

TEMPLATE = "megatron_gpt--{val_loss:.2f}-{step}-{consumed_samples}"


def tensors_of(step: int, *, optimizer: bool = True) -> dict[str, torch.Tensor]:
    """Every kind of tensor that an engine may hand over, its numbers drawn from `step`."""
    draw = torch.Generator().manual_seed(step)
    out = {
        "model.token_embedding.weight": torch.randn(7, 4, generator=draw),
        "model.blocks.0.norm.weight": torch.randn(4, generator=draw).bfloat16(),
        "model.head.weight": torch.randn(4, 7, generator=draw).t(),
        "model.scale": torch.randn((), generator=draw, dtype=torch.float64),
        "model.empty": torch.empty(0, 3),
        "model.flags": torch.rand(5, generator=draw) < 0.5,
    }
    if optimizer:
        out |= {
            f"optim.{moment}": torch.randn(7, 4, generator=draw) for moment in ("w.exp_avg", "w.exp_avg_sq")
        }
    return out


def state_of(step: int) -> dict[str, object]:
    """What a training loop may save beside the tensors."""
    return {"consumed_samples": 8 * step, "loss": 0.1 * step, "nested": {"list": [1, None, "é"]}}


def checkpointer(root: Path, **options: object) -> Checkpointer:
    """A checkpointer of one process; `policy` is made into its retention."""
    policy = options.pop("policy", None)
    retention = Retention(policy) if isinstance(policy, Policy) else None
    return Checkpointer(root, Topology.single(), retention=retention, **options)  # type: ignore[arg-type]


def save(root: Path, *steps: int, saver: Checkpointer | None = None, **metrics: float) -> Path:
    """Saves `steps` and returns the folder of the last."""
    saver = saver or checkpointer(root)
    for step in steps:
        folder = saver.save(
            step, tensors_of(step), state_of(step), config_yaml=f"step: {step}\n", metrics=metrics
        )
    saver.wait()
    return folder


def blank(step: int = 0, **options: bool) -> dict[str, torch.Tensor]:
    """Tensors of the same shapes with other numbers, to load into."""
    return {name: torch.full_like(tensor, 1) for name, tensor in tensors_of(step, **options).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Equal names, dtypes, shapes and numbers."""
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


def snapshot(root: Path) -> dict[str, bytes | str]:
    """All that lies below a folder: content of files, targets of links."""
    return {
        str(path.relative_to(root)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or path.is_file()
    }
