"""Hidden states from pipeline stage to pipeline stage of one copy of a model, and what the last one makes of them to all.

    process 0   tokens ─ stage 0 ─ (B, T, D) ─┐
    process 1                                 └─▶ stage 1 ─ (B, T, D) ─┐
    process 2                                                          └─▶ stage 2 ─ logits ─▶ processes 0, 1, 2

One batch at a time: while a stage works, the others wait. Every process knows the rows and how long they are, so no message
says its shape. Without a pipeline nothing is sent. Knows stages and messages, no tokens.

Legend: B rows, T tokens, D width, V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megalith.models.stack import LanguageModel
from megalith.topology.topology import Topology


@dataclass(frozen=True)
class Relay:
    """The messages of stage `rank` of `size`. A mesh takes a tenth of a millisecond to name a group, so it is asked once."""

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, topology: Topology) -> Relay:
        """That of this process."""
        return cls(topology.group("pipeline"), topology.rank("pipeline"), topology.size("pipeline"))

    def forward(self, model: LanguageModel, tokens: torch.Tensor, **how: Any) -> torch.Tensor:
        """Tokens (B, T) through a model of one tower → (B, T, D): the last stage's hidden states; on others what they sent."""
        x = tokens if model.first else self.receive(model, *tokens.shape)
        return self.send(model, model(x, **how))

    def receive(self, model: LanguageModel, rows: int, length: int) -> torch.Tensor:
        """Hidden states (B, T, D) of the stage before."""
        weight = next(model.parameters())
        shape, dtype = (rows, length, model.config.hidden_size), model.residual_dtype or weight.dtype
        hidden = torch.empty(shape, dtype=dtype, device=weight.device)
        dist.recv(hidden, group=self.group, group_src=self.rank - 1)
        return hidden

    def send(self, model: LanguageModel, hidden: torch.Tensor) -> torch.Tensor:
        """The same hidden states (B, T, D); the stage behind, where there is one, gets them as well."""
        if not model.last:
            dist.send(hidden.contiguous(), group=self.group, group_dst=self.rank + 1)
        return hidden

    def logits(self, model: LanguageModel, hidden: torch.Tensor | None, rows: int) -> torch.Tensor:
        """(B, V) on every stage, of the last one's hidden states (B, D); what another gives for them does not matter."""
        if model.last and hidden is not None:
            return self.of_last(model.logits(hidden))
        weight = next(model.parameters())
        dtype = model.compute_dtype or weight.dtype
        return self.of_last(torch.empty(rows, model.config.vocab_size, dtype=dtype, device=weight.device))

    def of_last(self, numbers: torch.Tensor) -> torch.Tensor:
        """The last stage's numbers, on every stage; the others give as many, of the same dtype."""
        if self.group is None:
            return numbers
        numbers = numbers.contiguous()
        dist.broadcast(numbers, group=self.group, group_src=self.size - 1)
        return numbers
