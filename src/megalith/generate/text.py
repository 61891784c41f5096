"""Text in, text out: prompts through a tokenizer, continuations back, stop strings, streaming.

Knows text and rows of tokens; `engine` does the decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megalith.errors import DataError
from megalith.generate.engine import Row, decode
from megalith.generate.loading import Loaded
from megalith.generate.sampling import Sampling
from megalith.tokenizers.base import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes half a character to."""
CONTEXT = 4
"""Tokens of the prompt that a continuation is spelled behind: some tokenizers write a space only between words."""


@dataclass(frozen=True)
class Completion:
    """One continuation: `text` without the prompt, its ids, why it ended, and where asked for their log-probabilities.

    `length` counts the tokens of prompt and continuation.
    """

    prompt: str
    text: str
    tokens: list[int]
    finished: str
    logprobs: list[float] | None = None
    length: int = 0

    @classmethod
    def of(cls, prompt: str, text: str, row: Row, *, logprobs: bool) -> Completion:
        """The finished `row` that spells `text`."""
        known = row.logprobs if logprobs else None
        return cls(prompt, text, row.continuation, row.finished, known, len(row.tokens))

    def to_json(self) -> dict[str, Any]:
        """{"prompt", "text", "tokens", "logprobs"?, "finished"}."""
        row: dict[str, Any] = {"prompt": self.prompt, "text": self.text, "tokens": self.tokens}
        if self.logprobs is not None:
            row["logprobs"] = [round(value, 6) for value in self.logprobs]
        return {**row, "finished": self.finished}


def complete(
    loaded: Loaded,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    numbers: Sequence[int] | None = None,
    attempt: int = 0,
    recompute: bool = False,
    logprobs: bool = False,
) -> list[Completion]:
    """Continues every prompt in one batch; a row's text does not depend on the rows beside it.

    `numbers`: which rows of a longer job these are, `attempt`: which try (see `engine.decode`).
    """
    tokenizer = loaded.needs_tokenizer()
    ids = [encoded(tokenizer, prompt) for prompt in prompts]
    spellers: dict[int, Speller] = {}

    def stopped(row: Row) -> bool:
        if id(row) not in spellers:
            spellers[id(row)] = Speller(tokenizer, row.tokens[: row.prompt_length], sampling.stop)
        return spellers[id(row)].push(row.tokens[-1])

    *_, rows = decode(
        loaded.model,
        ids,
        sampling,
        eod=tokenizer.eod,
        numbers=numbers,
        attempt=attempt,
        recompute=recompute,
        logprobs=logprobs,
        agree=loaded.crew.same,
        stopped=stopped if sampling.stop else None,
    )
    texts = [spelled(tokenizer, row, spellers.get(id(row))) for row in rows]
    return [
        Completion.of(prompt, text, row, logprobs=logprobs)
        for prompt, text, row in zip(prompts, texts, rows, strict=True)
    ]


def stream(
    loaded: Loaded,
    prompt: str,
    sampling: Sampling,
    *,
    number: int = 0,
    recompute: bool = False,
    logprobs: bool = False,
) -> Iterator[str | Completion]:
    """Continues one prompt, yielding pieces of text as they become certain and, last, the `Completion`.

    No piece ends in half a character or in what may become a stop string; all pieces together are the completion's text.
    """
    tokenizer = loaded.needs_tokenizer()
    ids = encoded(tokenizer, prompt)
    speller = Speller(tokenizer, ids, sampling.stop)
    states = decode(
        loaded.model,
        [ids],
        sampling,
        eod=tokenizer.eod,
        numbers=[number],
        recompute=recompute,
        logprobs=logprobs,
        agree=loaded.crew.same,
        stopped=lambda row: speller.push(row.tokens[-1]),
    )
    shown = 0
    for rows in states:
        row = rows[0]
        certain = len(speller.certain)
        if certain > shown:
            yield speller.text[shown:certain]
            shown = certain
    text = speller.finish()
    if len(text) > shown:
        yield text[shown:]
    yield Completion.of(prompt, text, row, logprobs=logprobs)


def encoded(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of a prompt; an empty one starts a new document. Errors: `DataError` when nothing can stand for that."""
    ids = tokenizer.encode(prompt)
    if ids:
        return ids
    if tokenizer.eod is None:
        raise DataError(
            "an empty prompt, and this tokenizer has no end-of-document token to start from", where="prompt"
        )
    return [tokenizer.eod]


class Speller:
    """Spells a growing row of ids, a token at a time, and finds stop strings, which may begin and end within tokens.

    Decodes only the last few tokens at each step: those not yet certain, behind those before them.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: tuple[str, ...]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.text, self.stopped = "", False
        self._longest = max(map(len, stop), default=0)
        beginning = list(prompt) == [tokenizer.eod]
        self._ids = [] if beginning else list(prompt[-CONTEXT:])
        self._certain = len(self._ids)

    def push(self, token: int) -> bool:
        """Takes the next token; returns whether a stop string is there, before which `text` ends."""
        self._ids.append(token)
        new = self._new()
        if not new.endswith(UNFINISHED):
            self._add(new)
            self._ids = self._ids[self._certain :]
            self._certain = len(self._ids)
        return self.stopped

    def extend(self, tokens: Sequence[int]) -> None:
        """Takes the remaining tokens at once."""
        self._ids += tokens

    def finish(self) -> str:
        """The whole text, with what was held back, but never with half a character at its end."""
        if not self.stopped:
            self._add(self._new().rstrip(UNFINISHED))
            self._ids, self._certain = [], 0
        return self.text

    @property
    def certain(self) -> str:
        """The text without an end that may be the beginning of a stop string."""
        for size in range(min(self._longest - 1, len(self.text)), 0, -1):
            if not self.stopped and any(stop.startswith(self.text[-size:]) for stop in self.stop):
                return self.text[:-size]
        return self.text

    def _new(self) -> str:
        """What the uncertain tokens spell behind the certain ones."""
        before = self.tokenizer.decode(self._ids[: self._certain])
        after = self.tokenizer.decode(self._ids)
        return (
            after[len(before) :]
            if after.startswith(before)
            else self.tokenizer.decode(self._ids[self._certain :])
        )

    def _add(self, new: str) -> None:
        begin = max(len(self.text) - self._longest + 1, 0)
        self.text += new
        places = [place for stop in self.stop if (place := self.text.find(stop, begin)) >= 0]
        if places:
            self.text, self.stopped = self.text[: min(places)], True


def spelled(tokenizer: Tokenizer, row: Row, speller: Speller | None) -> str:
    """The text of a finished row: without the end-of-document token, cut before a stop string."""
    if speller is None:
        speller = Speller(tokenizer, row.tokens[: row.prompt_length], ())
        ids = row.continuation[:-1] if row.finished == "eod" else row.continuation
        speller.extend(ids)
    return speller.finish()
