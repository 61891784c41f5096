"""What a model is trained to do: how many targets a batch has, and the loss terms of one micro-batch.

Knows the names of a batch's tensors and what goes into the model. Knows no division, no backward and no process: sums come
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

    def inputs(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What the first stage reads, and the keyword arguments of every stage; all with the sample first."""
        ...

    def terms(self, model: nn.Module, output: torch.Tensor, batch: Batch) -> dict[str, Any]:
        """Loss terms (sum, count, weight) of the last stage's output for one micro-batch."""
        ...


class CausalLanguageModel:
    """Predict the next token: one term, "lm"."""

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Targets that are not −1."""
        return {"lm": (batch["targets"] >= 0).sum()}

    def inputs(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Tokens; positions and documents where the batch has them."""
        return batch["tokens"], {name: batch[name] for name in ("positions", "documents") if name in batch}

    def terms(self, model: nn.Module, output: torch.Tensor, batch: Batch) -> dict[str, Any]:
        """The model's own chunked cross-entropy; the whole logits never exist."""
        return model.loss(output, batch["targets"])
