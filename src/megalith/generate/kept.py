"""What is kept of every row between two tokens, for models that write behind a prompt and for those that read it first.

    GPT                keys and values of the row
    encoder-decoder    keys and values of the row, and those of the encoder's memory, which each layer makes once

Without a cache nothing is kept but the memory, and the whole row is read again. A pipeline stage keeps what its own layers
need, so the encoder's stages keep nothing. Knows rows of tokens and models; chooses nothing.

Legend: B rows, S tokens of the longest source, D width, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megalith.generate.relay import Relay
from megalith.models.encdec import EncoderDecoder
from megalith.models.gpt import GPT
from megalith.nn.cache import KVCache

Tokens = Sequence[Sequence[int]]
Writer = GPT | EncoderDecoder
"""A model that writes one token after the other."""


@dataclass
class Memory:
    """What an encoder made of its sources: (B, S, D), and how many of its columns each row has (B,)."""

    states: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def of(cls, model: EncoderDecoder, sources: Tokens, relay: Relay) -> Memory | None:
        """The encoder's one run over them, padded at their ends; None on a stage that holds a part of the encoder alone."""
        device = next(model.parameters()).device
        lengths = torch.tensor([len(source) for source in sources], device=device)
        states = table(sources, device)
        if not model.first:
            states = relay.receive(model, *states.shape)
        if model.encoder is not None:
            states = model.encode(states, lengths)
        relay.send(model, states)
        return None if model.decoder is None else cls(states, lengths)

    def select(self, rows: torch.Tensor) -> None:
        """Goes on with these rows (N,), in this order."""
        self.states, self.lengths = self.states[rows], self.lengths[rows]


class Kept:
    """What is kept of rows of which all have `tokens` so far and room for `room` more; `room` 0: no cache.

    `relay`: of a model in pipeline stages, each of which keeps its own and does everything here at the same time.
    """

    def __init__(
        self,
        model: Writer,
        tokens: Tokens,
        room: int,
        sources: Tokens | None = None,
        relay: Relay | None = None,
    ) -> None:
        self.model, self.device = model, next(model.parameters()).device
        self.relay, self.cached = relay or Relay(), bool(room)
        self.memory: Memory | None = None
        if isinstance(model, EncoderDecoder) and sources:
            self.memory = Memory.of(model, sources, self.relay)
        self.cache: KVCache | None = None
        if not room:
            return
        longest, dtype = max(map(len, tokens)) + room, attention_dtype(model, self.device)
        if isinstance(model, GPT):
            self.cache = model.new_cache(len(tokens), longest, dtype)
        elif self.memory is not None:
            self.cache = model.new_cache(self.memory.states, self.memory.lengths, longest, dtype)
            self.memory = None

    def read(self, tokens: Tokens) -> torch.Tensor:
        """(B, V) logits behind whole rows, of any lengths: padding at their ends reaches nobody."""
        lengths = [len(row) for row in tokens]
        hidden = self._hidden(table(tokens, self.device))
        if self.cache is not None:
            self.cache.align_right(lengths)
        if hidden is not None:
            ends = torch.tensor(lengths, device=self.device) - 1
            hidden = hidden[torch.arange(len(lengths), device=self.device), ends]
        return self.relay.logits(self.model, hidden, len(lengths))

    def go_on(self, last: torch.Tensor) -> torch.Tensor:
        """(B, V) logits behind one token more of each row (B,), where there is a cache."""
        hidden = self._hidden(last[:, None])
        return self.relay.logits(self.model, None if hidden is None else hidden[:, -1], len(last))

    def drop(self, row: int) -> None:
        """Forgets one row; the last row takes its place."""
        if self.cache is not None:
            self.cache.drop(row)
        elif self.memory is not None:
            order = list(range(len(self.memory.lengths) - 1))
            if row < len(order):
                order[row] = len(order)
            self.memory.select(torch.tensor(order, dtype=torch.int64, device=self.device))

    def select(self, rows: torch.Tensor, *, moved: bool = False) -> None:
        """Goes on with these rows (N,), each as often as it is named; `moved`: within rows of the same source."""
        if self.cache is not None:
            self.cache.select(rows, moved=moved)
        elif self.memory is not None and not moved:
            self.memory.select(rows)

    def _hidden(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """(B, T, D) behind this stage's layers; None where it has none that rows go through."""
        if isinstance(self.model, GPT):
            return self.relay.forward(self.model, tokens, cache=self.cache)
        if self.model.decoder is None:
            return None
        begun = self.relay.receive(self.model, *tokens.shape) if "tokens" in self.model.takes else None
        if self.cache is not None:
            hidden = self.model.go_on(tokens, self.cache, begun)
        else:
            assert self.memory is not None
            hidden = self.model.decode(tokens, self.memory.states, self.memory.lengths, hidden=begun)
        return self.relay.send(self.model, hidden)


def table(rows: Tokens, device: torch.device) -> torch.Tensor:
    """All tokens (B, longest), padded at the end with 0."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


def attention_dtype(model: Writer, device: torch.device) -> torch.dtype | None:
    """The cache's dtype: fp32 for half precisions on a CPU, None (the compute dtype) otherwise.

    PyTorch's CPU attention over one query is six times slower in bf16 than in fp32 (measured, 8 heads of 64, 64–190 keys).
    """
    half = model.compute_dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and device.type == "cpu" else None
