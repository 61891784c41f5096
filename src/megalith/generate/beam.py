"""Beam search: of each prompt the best few beginnings go on side by side, and the best few that ended are kept.

    beams of a prompt ─ score + log-probability of every next token ─▶ best 2 × beams ─┬─ those that ended, of the best half
                 ▲                                                                    │         ─▶ kept, the best by score
                 └────────── the best that go on ◀────────────────────────────────────┘

A text's score is the sum of its tokens' log-probabilities over (number of tokens) ** length_penalty. When a search ends, and
what may end in a step, is as in `transformers` 5, token for token. Knows token ids only.

Legend: B prompts, N beams, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from megalith.generate.engine import Forced, Row, check_sources, length_limit, seen_tokens
from megalith.generate.kept import Kept, Tokens, Writer
from megalith.generate.relay import Relay
from megalith.generate.sampling import Bounds, Sampling, restrict

Agree = Callable[[torch.Tensor], torch.Tensor]
NEVER = -1e9
"""The score of what stands in a beam's place until there is one."""


@torch.inference_mode()
def search(
    model: Writer,
    prompts: Tokens,
    sampling: Sampling,
    *,
    eod: int | None,
    forced: Forced = (None, None),
    sources: Tokens | None = None,
    recompute: bool = False,
    agree: Agree = lambda tensor: tensor,
    relay: Relay | None = None,
) -> list[list[Row]]:
    """Of every prompt the best `num_samples` rows of `sampling.beams` beams, best first, each with its score and log-probabilities.

    Other arguments and errors are `engine.decode`'s.
    """
    check_sources(model, sources)
    model.eval()
    searches = [Search.of(model, list(prompt), sampling, eod) for prompt in prompts]
    if sampling.tokens_to_generate == 0:
        return [[search.running[0].row(search.prompt_length, "length")] for search in searches]
    room = max(search.limit - search.prompt_length for search in searches)
    kept = Kept(model, prompts, 0 if recompute else room, sources, relay)
    bounds, living = Bounds(eod, *forced), list(searches)
    logits = spread(kept.read(prompts), sampling.beams)
    kept.select(spread(torch.arange(len(prompts), device=kept.device), sampling.beams))
    while True:
        choices = best(logits, living, kept, bounds=bounds, agree=agree)
        parents = [search.take(found) for search, found in zip(living, choices, strict=True)]
        first = range(0, len(living) * sampling.beams, sampling.beams)
        order = [at + p for at, s, ps in zip(first, living, parents, strict=True) if not s.over for p in ps]
        before, living = len(living), [search for search in living if not search.over]
        if not living:
            return [search.rows() for search in searches]
        kept.select(torch.tensor(order, device=kept.device), moved=before == len(living))
        tokens = [beam.tokens for search in living for beam in search.running]
        newest = torch.tensor([row[-1] for row in tokens], device=kept.device)
        logits = kept.go_on(newest) if kept.cached else kept.read(tokens)


class Choice(NamedTuple):
    """A beam's number, a token behind it, the score of both, and the model's own log-probability of the token."""

    beam: int
    token: int
    score: float
    logprob: float


@dataclass(frozen=True)
class Beam:
    """A beginning, or a whole text whose score has had its length penalty."""

    tokens: list[int]
    score: float
    logprobs: list[float]

    def row(self, prompt_length: int, finished: str) -> Row:
        return Row(self.tokens, prompt_length, logprobs=self.logprobs, finished=finished, score=self.score)


@dataclass
class Search:
    """One prompt's. `limit`: how long a text may become, prompt included."""

    prompt_length: int
    limit: int
    sampling: Sampling
    eod: int | None
    running: list[Beam]
    ended: list[Beam] = field(default_factory=list)
    over: bool = False

    @classmethod
    def of(cls, model: Writer, prompt: list[int], sampling: Sampling, eod: int | None) -> Search:
        """With one real beam; Errors: `DataError` for a prompt that leaves no room."""
        limit = length_limit(model, Row(prompt, len(prompt)), sampling)
        others = [Beam(prompt, NEVER, [])] * (sampling.beams - 1)
        return cls(len(prompt), limit, sampling, eod, [Beam(prompt, 0.0, []), *others])

    def take(self, choices: Sequence[Choice]) -> list[int]:
        """Goes on with the best of the choices, which are in order; returns the beams that they come from."""
        made = len(self.running[0].tokens) + 1 - self.prompt_length
        full = self.prompt_length + made >= self.limit
        for choice in choices[: self.sampling.beams]:
            if full or choice.token == self.eod:
                self.ended.append(self._behind(choice, choice.score / made**self.sampling.length_penalty))
        self.ended = sorted(self.ended, key=lambda beam: -beam.score)[: self.sampling.beams]
        going = [choice for choice in choices if choice.token != self.eod][: self.sampling.beams]
        self.running = [self._behind(choice, choice.score) for choice in going]
        self.over = full or self._decided(made)
        return [choice.beam for choice in going]

    def rows(self) -> list[Row]:
        """The best texts."""
        found = [beam for beam in self.ended if beam.score > NEVER / 10][: self.sampling.num_samples]
        return [beam.row(self.prompt_length, self._reason(beam)) for beam in found]

    def _behind(self, choice: Choice, score: float) -> Beam:
        beam = self.running[choice.beam]
        return Beam([*beam.tokens, choice.token], score, [*beam.logprobs, choice.logprob])

    def _decided(self, made: int) -> bool:
        """Can no running beam become better than the worst text that is kept?"""
        if len(self.ended) < self.sampling.beams:
            return False
        if self.sampling.early_stopping == "yes":
            return True
        penalty = self.sampling.length_penalty
        # Where length pays, "never" asks what the longest text could score; "no" takes today's length for it.
        if self.sampling.early_stopping == "never" and penalty > 0:
            made = self.limit - self.prompt_length
        return self.running[0].score / made**penalty <= self.ended[-1].score

    def _reason(self, beam: Beam) -> str:
        if beam.tokens[-1] == self.eod:
            return "eod"
        made = len(beam.tokens) - self.prompt_length
        return "length" if made >= self.sampling.tokens_to_generate else "positions"


def best(
    logits: torch.Tensor, searches: Sequence[Search], kept: Kept, *, bounds: Bounds, agree: Agree
) -> list[list[Choice]]:
    """Of logits (B · N, V) each search's 2 · N best choices, in order."""
    sampling, vocabulary = searches[0].sampling, logits.shape[-1]
    beams = [beam for search in searches for beam in search.running]
    tokens = [beam.tokens for beam in beams]
    made = len(tokens[0]) - searches[0].prompt_length
    known = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    seen = seen_tokens(tokens, kept) if sampling.repetition_penalty != 1.0 else None
    scores = restrict(known, tokens, made, sampling, bounds=bounds, seen=seen)
    scores = scores + scores.new_tensor([beam.score for beam in beams])[:, None]
    totals = scores.view(len(searches), -1)
    values, places = totals.topk(min(2 * sampling.beams, totals.shape[-1]))
    values, places = agree(values), agree(places)
    logprobs = known.view(len(searches), -1).gather(1, places)
    table = zip(places.tolist(), values.tolist(), logprobs.tolist(), strict=True)
    return [
        [Choice(*divmod(p, vocabulary), score, own) for p, score, own in zip(*row, strict=True)]
        for row in table
    ]


def spread(rows: torch.Tensor, times: int) -> torch.Tensor:
    """Each row `times` times, one copy behind the other."""
    return rows.repeat_interleave(times, dim=0)
