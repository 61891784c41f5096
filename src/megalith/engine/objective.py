"""What a model is trained to do: how many targets a batch has, and the loss terms of one micro-batch.

Knows the names of a batch's tensors and how to call the model. Knows no division, no backward and no process: sums come
out of here, and the engine divides each once by its count over the whole global batch.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

Batch = dict[str, torch.Tensor]
"""Tensors with the sample first: tokens, targets, sample, and what the objective needs besides."""


class Objective(Protocol):
    """An objective names its terms; `counts` and `terms` use the same names."""

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Number of targets of each term in a batch, from the data alone: known before the first forward."""
        ...

    def terms(self, model: nn.Module, batch: Batch, keys: torch.Tensor | None) -> dict[str, Any]:
        """Loss terms (sum, count, weight) of one micro-batch; `keys` (B,) drive dropout, None switches it off."""
        ...


class CausalLanguageModel:
    """Predict the next token: one term, "lm"."""

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Targets that are not −1."""
        return {"lm": (batch["targets"] >= 0).sum()}

    def terms(self, model: nn.Module, batch: Batch, keys: torch.Tensor | None) -> dict[str, Any]:
        """The model's own chunked cross-entropy; the whole logits never exist."""
        positions, documents = batch.get("positions"), batch.get("documents")
        hidden = model(batch["tokens"], keys=keys, positions=positions, documents=documents)
        return model.loss(hidden, batch["targets"])
