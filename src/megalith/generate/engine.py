"""Decoding: rows of token ids in, rows of token ids out, with a key/value cache or without.

Knows token ids only, no text (see `text.py`). Prompts of different lengths run together: the batch starts at the
shortest and longer prompts feed their own tokens until they end, so no padding ever enters the model.

    B rows, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from megalith.errors import DataError
from megalith.generate.sampling import Sampling, choose, draw, forbid, penalise
from megalith.models.gpt import GPT


@dataclass
class Row:
    """One sequence being continued. `tokens` holds prompt and continuation."""

    tokens: list[int]
    prompt_length: int
    logprobs: list[float] = field(default_factory=list)
    finished: str = ""
    """Why it ended: "eod", "stop", "length" (as many as asked for) or "positions" (the model's table is full)."""

    @property
    def continuation(self) -> list[int]:
        return self.tokens[self.prompt_length :]


@torch.inference_mode()
def decode(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    eod: int | None,
    first_row: int = 0,
    recompute: bool = False,
    stopped: Callable[[Row], bool] | None = None,
) -> Iterator[list[Row]]:
    """Continues every prompt; yields the live rows after each new token and, last, when all have ended.

    `first_row` numbers the rows of this call within a longer job (their draws follow it); `recompute` runs the
    whole prefix at every step instead of using the cache; `stopped` says whether a row has met its stop string.
    Raises `DataError` for an empty prompt or one that leaves no room to generate.
    """
    rows = [Row(list(p), len(p)) for p in prompts]
    limits = [length_limit(model, row, sampling) for row in rows]
    device = next(model.parameters()).device
    model.eval()
    length = min(row.prompt_length for row in rows)
    table = torch.zeros(len(rows), max(max(limits), length), dtype=torch.int64, device=device)
    for row, line in zip(rows, table, strict=True):
        line[: row.prompt_length] = torch.tensor(row.tokens, device=device)
    cache = None if recompute else model.new_cache(len(rows), table.shape[1])
    done = 0
    while length < table.shape[1] and not all(row.finished for row in rows):
        window = table[:, done:length] if cache is not None else table[:, :length]
        hidden = model(window, cache=cache)
        done = length if cache is not None else 0
        logits = adjusted(model.logits(hidden[:, -1:])[:, 0], table[:, :length], rows, sampling, eod)
        draws = [draw(sampling.seed, first_row + i, len(row.continuation)) for i, row in enumerate(rows)]
        chosen = choose(logits, sampling, draws)
        append(rows, table, length, chosen, logits)
        length += 1
        finish(rows, limits, eod, stopped)
        yield rows
    for row in rows:
        row.finished = row.finished or "length"
    yield rows


def max_positions(model: GPT) -> int | None:
    """The longest sequence the model can read; None where positions are computed, not looked up."""
    config = model.config
    return config.max_position_embeddings if config.position_embedding_type == "learned_absolute" else None


def length_limit(model: GPT, row: Row, sampling: Sampling) -> int:
    """How long a row may become, prompt included."""
    positions = max_positions(model)
    if row.prompt_length == 0:
        raise DataError(
            "an empty prompt has nothing to continue", where="prompt", fix="give at least one token of text"
        )
    if positions is not None and row.prompt_length >= positions:
        raise DataError(
            f"the prompt has {row.prompt_length} tokens, the model reads {positions} at most",
            where="prompt",
            fix=f"shorten it to fewer than {positions} tokens",
        )
    wanted = row.prompt_length + sampling.tokens_to_generate
    return wanted if positions is None else min(wanted, positions)


def adjusted(
    logits: torch.Tensor, seen: torch.Tensor, rows: list[Row], sampling: Sampling, eod: int | None
) -> torch.Tensor:
    """Repetition penalty, and no end before the least number of tokens."""
    if sampling.repetition_penalty != 1.0:
        mask = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, seen, True)
        logits = penalise(logits, mask, sampling.repetition_penalty)
    early = [len(row.continuation) < sampling.min_tokens_to_generate for row in rows]
    return forbid(logits, eod, torch.tensor(early, device=logits.device))


def append(
    rows: list[Row], table: torch.Tensor, length: int, chosen: torch.Tensor, logits: torch.Tensor
) -> None:
    """Writes column `length`: the chosen token where a row is past its prompt, its own token where it is not."""
    past = torch.tensor([row.prompt_length <= length for row in rows], device=table.device)
    table[:, length] = torch.where(past, chosen, table[:, length])
    logprobs = logits.float().log_softmax(-1).gather(-1, chosen[:, None])[:, 0].tolist()
    for row, token, logprob in zip(rows, table[:, length].tolist(), logprobs, strict=True):
        if length >= row.prompt_length and not row.finished:
            row.tokens.append(token)
            row.logprobs.append(logprob)


def finish(
    rows: list[Row], limits: list[int], eod: int | None, stopped: Callable[[Row], bool] | None
) -> None:
    """Marks the rows that have just ended, with the reason."""
    for row, limit in zip(rows, limits, strict=True):
        if row.finished or not row.continuation:
            continue
        if eod is not None and row.tokens[-1] == eod:
            row.finished = "eod"
        elif stopped is not None and stopped(row):
            row.finished = "stop"
        elif len(row.tokens) >= limit:
            row.finished = "length"
