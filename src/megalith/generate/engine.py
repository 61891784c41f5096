"""Decoding: rows of token ids in, rows of token ids out, with a key-value cache or without.

Knows token ids only, no text (see `text.py`). Prompts of different lengths are read in one forward, padded at their ends:
the model is causal, so padding reaches nobody. From then on every row gets one token a step, and a row that has ended
leaves the batch. An encoder reads the sources of all rows once, before.

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
from megalith.generate.kept import Kept, Tokens, Writer, table
from megalith.generate.relay import Relay
from megalith.generate.sampling import Bounds, Sampling, choose, draw, restrict
from megalith.models.encdec import EncoderDecoder

Forced = tuple[int | None, int | None]
"""The first token of every row, and the last one of a row that is as long as asked for; None: whatever comes."""


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
    score: float | None = None
    """Of a beam search: log-probabilities over length ** length_penalty."""

    @property
    def continuation(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def made(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_length


@torch.inference_mode()
def decode(
    model: Writer,
    prompts: Tokens,
    sampling: Sampling,
    *,
    eod: int | None,
    forced: Forced = (None, None),
    sources: Tokens | None = None,
    numbers: Sequence[int] | None = None,
    attempt: int = 0,
    recompute: bool = False,
    logprobs: bool = False,
    stopped: Callable[[Row], bool] | None = None,
    agree: Callable[[torch.Tensor], torch.Tensor] | None = None,
    relay: Relay | None = None,
) -> Iterator[list[Row]]:
    """Continues every prompt; yields all rows, in the order given, after each new token.

    `sources` are what the encoder of an encoder-decoder reads: a prompt is then what its decoder's row begins with.
    `eod` ends a row; `forced`: the tokens that a row must begin and, when it is as long as asked for, end with.
    `numbers` says which row of a longer job each prompt is (default 0, 1, …) and `attempt` which try: their draws follow
    both. `recompute` reads the whole text again at every step instead of using the cache; `logprobs` keeps the model's own
    log-probability of each token, before temperature, filters and penalties; `stopped` says, after each token, whether a
    row has met its stop string; `agree` takes the tokens chosen here (B,) to those that every process goes on with; `relay`: of a
    model in pipeline stages, each of which decodes the same rows.
    Errors: `DataError` for an empty prompt or source, or one that leaves no room to generate.
    """
    check_sources(model, sources)
    numbers = range(len(prompts)) if numbers is None else numbers
    rows = [Row(list(p), len(p), n, attempt) for p, n in zip(prompts, numbers, strict=True)]
    room = {id(row): length_limit(model, row, sampling) for row in rows}
    longest = max(limit - len(row.tokens) for row, limit in zip(rows, room.values(), strict=True))
    model.eval()
    kept = Kept(model, prompts, 0 if recompute else longest, sources, relay)
    batch = Batch(rows, sampling, Bounds(eod, *forced), kept)
    if sampling.tokens_to_generate == 0:
        batch.rows = []
        for row in rows:
            row.finished = "length"
        yield rows
    while batch.rows:
        logits = batch.logits()
        chosen = batch.choose(logits)
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

    def __init__(self, rows: Sequence[Row], sampling: Sampling, bounds: Bounds, kept: Kept) -> None:
        self.rows, self.sampling, self.bounds, self.kept = list(rows), sampling, bounds, kept
        self.last: torch.Tensor | None = None
        self.seen: torch.Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self.seen = seen_tokens([row.tokens for row in rows], kept)

    def logits(self) -> torch.Tensor:
        """(B, V) logits of the next token of each row."""
        if self.kept.cached and self.last is not None:
            return self.kept.go_on(self.last)
        return self.kept.read([row.tokens for row in self.rows])

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """(B,) the next token of each row. Every row has been given as many tokens as the others."""
        made, tokens = self.rows[0].made, [row.tokens for row in self.rows]
        logits = restrict(logits, tokens, made, self.sampling, bounds=self.bounds, seen=self.seen)
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
            order[i], self.rows[i] = order[-1], self.rows[-1]  # the last takes its place, as in what is kept
            del order[-1], self.rows[-1]
            self.kept.drop(i)
        if len(order) < len(chosen):
            left = torch.tensor(order, dtype=torch.int64, device=chosen.device)
            chosen = chosen[left]
            self.seen = None if self.seen is None else self.seen[left]
        self.last = chosen


def seen_tokens(tokens: Tokens, kept: Kept) -> torch.Tensor:
    """(B, V) bool: which tokens each row holds. Virtual ones, whose ids are behind the vocabulary, are none."""
    size, longest = kept.model.config.vocab_size, max(map(len, tokens))
    seen = torch.zeros(len(tokens), size + 1, dtype=torch.bool, device=kept.device)
    alike = [[*row, *[row[0]] * (longest - len(row))] for row in tokens]
    return seen.scatter_(1, table(alike, kept.device).clamp(max=size), True)[:, :size]


def check_sources(model: Writer, sources: Tokens | None) -> None:
    """Errors: `DataError` for an empty source, or one longer than the encoder's positions."""
    positions = model.config.max_positions
    if (sources is not None) != isinstance(model, EncoderDecoder):
        raise ValueError("an encoder-decoder needs sources, a GPT has no encoder to read them")
    for source in sources or ():
        check_source(len(source), positions)


def check_source(tokens: int, positions: int | None) -> None:
    """Errors: `DataError` for a prompt of so many tokens where an encoder reads `positions` at most."""
    if not tokens:
        raise DataError(
            "an empty prompt is nothing to read", where="prompt", fix="give at least one token of text"
        )
    if positions is not None and tokens > positions:
        raise DataError(
            f"the prompt has {tokens} tokens, the encoder reads {positions} at most",
            where="prompt",
            fix=f"shorten it to {positions} tokens",
        )


def check_prompt(tokens: int, positions: int | None) -> None:
    """Errors: `DataError` for a prompt of so many tokens, which a model of `positions` is to continue."""
    if not tokens:
        raise DataError(
            "an empty prompt has nothing to continue", where="prompt", fix="give at least one token of text"
        )
    if positions is not None and tokens >= positions:
        raise DataError(
            f"the prompt has {tokens} tokens, the model reads {positions} at most",
            where="prompt",
            fix=f"shorten it to fewer than {positions} tokens",
        )


def length_limit(model: Writer, row: Row, sampling: Sampling) -> int:
    """How long a row may become, prompt included."""
    positions = model.config.max_positions
    check_prompt(row.prompt_length, positions)
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
