"""Decoding: rows of token ids in, rows of token ids out, with a key-value cache or without.

Knows token ids only, no text (see `text.py`). Prompts of different lengths are read in one forward, padded at their ends:
the model is causal, so padding reaches nobody. From then on every row gets one token a step, and a row that has ended
leaves the batch.

    prompts ─▶ one forward over all ─▶ logits of each row's last token ─▶ choose ─┬─▶ yield ─▶ rows that ended leave ─┐
                                    ▲                                            │                                 │
                                    └────────── one forward over the new tokens ◀─┴─────────────────────────────────┘

Legend: B rows, V vocabulary
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
    """One sequence being continued. `tokens` holds prompt and continuation; `number` and `attempt` key its draws."""

    tokens: list[int]
    prompt_length: int
    number: int = 0
    attempt: int = 0
    logprobs: list[float] = field(default_factory=list)
    finished: str = ""
    """Why it ended: "eod", "stop", "length" (as many as asked for) or "positions" (the model's table is full)."""

    @property
    def continuation(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def made(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_length


@torch.inference_mode()
def decode(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    eod: int | None,
    numbers: Sequence[int] | None = None,
    attempt: int = 0,
    recompute: bool = False,
    logprobs: bool = False,
    stopped: Callable[[Row], bool] | None = None,
    agree: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Iterator[list[Row]]:
    """Continues every prompt; yields all rows, in the order given, after each new token.

    `numbers` says which row of a longer job each prompt is (default 0, 1, …) and `attempt` which try: their draws follow
    both. `recompute` reads the whole text again at every step instead of using the cache; `logprobs` keeps the model's own
    log-probability of each token, before temperature, filters and penalties; `stopped` says, after each token, whether a
    row has met its stop string; `agree` takes the tokens chosen here (B,) to those that every process goes on with.
    Errors: `DataError` for an empty prompt or one that leaves no room to generate.
    """
    numbers = range(len(prompts)) if numbers is None else numbers
    rows = [Row(list(p), len(p), n, attempt) for p, n in zip(prompts, numbers, strict=True)]
    room = {id(row): length_limit(model, row, sampling) for row in rows}
    longest = max(limit - len(row.tokens) for row, limit in zip(rows, room.values(), strict=True))
    model.eval()
    batch = Batch(model, rows, sampling, room=0 if recompute else longest)
    if sampling.tokens_to_generate == 0:
        batch.rows = []
        for row in rows:
            row.finished = "length"
        yield rows
    while batch.rows:
        logits = batch.logits()
        chosen = batch.choose(logits, eod)
        chosen = chosen if agree is None else agree(chosen)
        tokens = chosen.tolist()
        known = log_probabilities(logits, chosen) if logprobs else None
        for i, row in enumerate(batch.rows):
            row.tokens.append(tokens[i])
            if known is not None:
                row.logprobs.append(known[i])
            row.finished = reason(row, eod, stopped) or full(row, room[id(row)], sampling)
        batch.go_on(chosen)
        yield rows


class Batch:
    """The rows that are still being continued, and what is kept for each of them between two tokens."""

    def __init__(self, model: GPT, rows: Sequence[Row], sampling: Sampling, *, room: int) -> None:
        """`room`: how many tokens more the cache must hold; 0 for no cache."""
        self.model, self.rows, self.sampling = model, list(rows), sampling
        self.device = next(model.parameters()).device
        self.last: torch.Tensor | None = None
        self.seen: torch.Tensor | None = None
        self.cache = None
        if room:
            longest = max(row.prompt_length for row in rows)
            self.cache = model.new_cache(len(rows), longest + room, attention_dtype(model, self.device))
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(len(rows), model.config.vocab_size, dtype=torch.bool, device=self.device)
            self.seen.scatter_(1, self.table(repeat_first=True), True)

    def table(self, *, repeat_first: bool = False) -> torch.Tensor:
        """All tokens of the rows (B, longest), padded at the end with 0, or with each row's own first token."""
        longest = max(len(row.tokens) for row in self.rows)
        lines = [
            row.tokens + [row.tokens[0] * repeat_first] * (longest - len(row.tokens)) for row in self.rows
        ]
        return torch.tensor(lines, device=self.device)

    def logits(self) -> torch.Tensor:
        """(B, V) logits of the next token of each row."""
        if self.cache is not None and self.last is not None:
            hidden = self.model(self.last[:, None], cache=self.cache)[:, -1]
            return self.model.logits(hidden)
        lengths = [len(row.tokens) for row in self.rows]
        hidden = self.model(self.table(), cache=self.cache)
        if self.cache is not None:
            self.cache.align_right(lengths)
        ends = torch.tensor(lengths, device=self.device) - 1
        return self.model.logits(hidden[torch.arange(len(lengths), device=self.device), ends])

    def choose(self, logits: torch.Tensor, eod: int | None) -> torch.Tensor:
        """(B,) the next token of each row."""
        if self.seen is not None:
            logits = penalise(logits, self.seen, self.sampling.repetition_penalty)
        # Every row has been given as many tokens as the others.
        if eod is not None and self.rows[0].made < self.sampling.min_tokens_to_generate:
            logits = forbid(logits, eod)
        if not self.sampling.samples:
            return choose(logits, self.sampling, ())
        draws = [draw(self.sampling.seed, row.number, row.made, row.attempt) for row in self.rows]
        return choose(logits, self.sampling, draws)

    def go_on(self, chosen: torch.Tensor) -> None:
        """Takes the chosen tokens (B,) as the next input, and lets the rows that have ended go."""
        if self.seen is not None:
            self.seen.scatter_(1, chosen[:, None], True)
        order = list(range(len(self.rows)))
        for i in reversed(range(len(self.rows))):
            if not self.rows[i].finished:
                continue
            order[i], self.rows[i] = order[-1], self.rows[-1]  # the last takes its place, as in the cache
            del order[-1], self.rows[-1]
            if self.cache is not None:
                self.cache.drop(i)
        if len(order) < len(chosen):
            kept = torch.tensor(order, dtype=torch.int64, device=self.device)
            chosen = chosen[kept]
            self.seen = None if self.seen is None else self.seen[kept]
        self.last = chosen


def attention_dtype(model: GPT, device: torch.device) -> torch.dtype | None:
    """The cache's dtype: fp32 for half precisions on a CPU, None (the compute dtype) otherwise.

    PyTorch's CPU attention over one query is six times slower in bf16 than in fp32 (measured, 8 heads of 64, 64–190 keys).
    """
    half = model.compute_dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and device.type == "cpu" else None


def length_limit(model: GPT, row: Row, sampling: Sampling) -> int:
    """How long a row may become, prompt included."""
    positions = model.config.max_positions
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


def log_probabilities(logits: torch.Tensor, chosen: torch.Tensor) -> list[float]:
    """The model's own log-probability of each chosen token."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (wide.gather(-1, chosen[:, None])[:, 0] - wide.logsumexp(-1)).tolist()


def reason(row: Row, eod: int | None, stopped: Callable[[Row], bool] | None) -> str:
    """How a row has ended itself with its newest token; empty when it has not."""
    if row.tokens[-1] == eod:
        return "eod"
    return "stop" if stopped is not None and stopped(row) else ""


def full(row: Row, limit: int, sampling: Sampling) -> str:
    """Why there is no room for another token; empty when there is."""
    if row.made >= sampling.tokens_to_generate:
        return "length"
    return "positions" if len(row.tokens) >= limit else ""
