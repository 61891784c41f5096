"""What a model is trained to do, one class a family: how many targets a batch has, and the loss terms of one micro-batch.

Knows the names of a batch's tensors and what goes into the model. Knows no division, no backward and no process: sums come
out of here, and the engine divides each once by its count over the whole global batch.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from megalith.models.bert_config import BertConfig
from megalith.models.config import ModelConfig
from megalith.models.encdec_config import EncoderDecoderConfig

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


class MaskedLanguageModel:
    """BERT's: guess the masked tokens, "lm"; with a binary head also whether two halves are in order, "sop"."""

    def __init__(self, *, binary_head: bool = True) -> None:
        self.binary_head = binary_head

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Targets and orders that are not −1."""
        counts = {"lm": (batch["targets"] >= 0).sum()}
        return counts | {"sop": (batch["order"] >= 0).sum()} if self.binary_head else counts

    def inputs(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Tokens; token types, lengths without the padding, and positions where the batch has them."""
        named = ("types", "lengths", "positions")
        return batch["tokens"], {name: batch[name] for name in named if name in batch}

    def terms(self, model: nn.Module, output: torch.Tensor, batch: Batch) -> dict[str, Any]:
        """The model's own: the head over the vocabulary sees the masked positions alone."""
        return model.loss(output, batch["targets"], batch["order"] if self.binary_head else None)


class SequenceToSequence:
    """T5's and BART's: predict the decoder's next token, "lm", of what the encoder has read."""

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Targets that are not −1."""
        return {"lm": (batch["targets"] >= 0).sum()}

    def inputs(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The encoder's tokens; the decoder's, the encoder's lengths without the padding, and positions of both."""
        named = ("tokens", "encoder_lengths", "positions", "encoder_positions")
        return batch["encoder_tokens"], {name: batch[name] for name in named if name in batch}

    def terms(self, model: nn.Module, output: torch.Tensor, batch: Batch) -> dict[str, Any]:
        """The model's own chunked cross-entropy over the decoder's hidden states."""
        return model.loss(output, batch["targets"])


def objective_of(config: ModelConfig) -> Objective:
    """What a model of this config is pretrained to do."""
    if isinstance(config, BertConfig):
        return MaskedLanguageModel(binary_head=config.bert_binary_head)
    return SequenceToSequence() if isinstance(config, EncoderDecoderConfig) else CausalLanguageModel()
