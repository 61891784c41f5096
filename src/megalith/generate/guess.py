"""A BERT's guesses for the blanks of prompts: of each the most probable tokens, each blank on its own.

Knows prompts, blanks and probabilities. Several prompts are read in one forward, padded at their ends.

Legend: B prompts, T tokens of the longest, N blanks of all of them, K guesses
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megalith.generate.asking import Asked, ask
from megalith.generate.kept import table
from megalith.generate.loading import Loaded
from megalith.models.bert import Bert

GUESSES = 5
"""How many a blank gets where nobody says."""


@dataclass(frozen=True)
class Guess:
    """A token, how the vocabulary writes it, and its probability."""

    token: int
    text: str
    probability: float

    def to_json(self) -> dict[str, Any]:
        """{"token", "text", "probability"}."""
        return {"token": self.token, "text": self.text, "probability": round(self.probability, 6)}


@dataclass(frozen=True)
class Guesses:
    """Of one prompt: `text` with the best guess in each blank, and all of `masks`, the best first. `length`: tokens read."""

    prompt: str
    text: str
    masks: list[list[Guess]]
    length: int = 0
    finished: str = ""

    def to_json(self) -> dict[str, Any]:
        """{"prompt", "text", "masks": [[{"token", "text", "probability"}, …], …]}."""
        masks = [[guess.to_json() for guess in guesses] for guesses in self.masks]
        return {"prompt": self.prompt, "text": self.text, "masks": masks}


@torch.inference_mode()
def guess(loaded: Loaded, prompts: Sequence[str], count: int = GUESSES) -> list[Guesses]:
    """The `count` most probable tokens of every blank. Errors: `DataError` for a prompt without blanks, or too long."""
    model, mask = loaded.model, loaded.needs_tokenizer().mask
    assert isinstance(model, Bert)
    asked = [ask(loaded, prompt) for prompt in prompts]
    rows = [each.source or [] for each in asked]
    device = next(model.parameters()).device
    lengths = torch.tensor([len(row) for row in rows], device=device)
    relay = loaded.crew.relay
    hidden = relay.forward(model, table(rows, device), lengths=lengths)
    places = [(i, at) for i, row in enumerate(rows) for at, token in enumerate(row) if token == mask]
    chosen = torch.tensor(places, device=device)
    logits = relay.logits(model, hidden[chosen[:, 0], chosen[:, 1]], len(places))
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    found = wide.softmax(-1).topk(min(count, wide.shape[-1]))
    tokens, probabilities = loaded.crew.same(found.indices), found.values
    best = iter(zip(tokens.tolist(), probabilities.tolist(), strict=True))
    return [
        _guesses(loaded, each, [next(best) for _ in each.blanks.numbers]) for each in asked if each.blanks
    ]


def _guesses(loaded: Loaded, asked: Asked, found: Sequence[tuple[list[int], list[float]]]) -> Guesses:
    tokenizer = loaded.needs_tokenizer()
    masks = [
        [Guess(token, tokenizer.decode([token]), p) for token, p in zip(*each, strict=True)] for each in found
    ]
    assert asked.blanks is not None
    text = asked.blanks.filled([guesses[0].text for guesses in masks])
    return Guesses(asked.prompt, text, masks, asked.length)
