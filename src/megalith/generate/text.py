"""Text in, text out: prompts through a tokenizer, continuations back, stop strings, streaming.

Knows text and rows of tokens; `engine` does the decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megalith.errors import DataError
from megalith.generate.engine import Row, decode
from megalith.generate.loading import Loaded
from megalith.generate.sampling import Sampling
from megalith.tokenizers.base import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes half a character to."""


@dataclass(frozen=True)
class Completion:
    """One continuation: `text` without the prompt, its ids, their log-probabilities, and why it ended."""

    prompt: str
    text: str
    tokens: list[int]
    logprobs: list[float]
    finished: str


def complete(
    loaded: Loaded, prompts: Sequence[str], sampling: Sampling, *, first_row: int = 0, recompute: bool = False
) -> list[Completion]:
    """Continues every prompt; row i's text does not depend on the other rows."""
    *_, last = stream(loaded, prompts, sampling, first_row=first_row, recompute=recompute)
    return last


def stream(
    loaded: Loaded, prompts: Sequence[str], sampling: Sampling, *, first_row: int = 0, recompute: bool = False
) -> Iterator[list[Completion]]:
    """The same, yielding what is there after every token."""
    tokenizer = loaded.needs_tokenizer()
    ids = [encoded(tokenizer, prompt) for prompt in prompts]
    states = decode(
        loaded.model,
        ids,
        sampling,
        eod=tokenizer.eod,
        first_row=first_row,
        recompute=recompute,
        stopped=stop_test(tokenizer, sampling.stop),
    )
    for rows in states:
        yield [completion(tokenizer, p, row, sampling.stop) for p, row in zip(prompts, rows, strict=True)]


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


def stop_test(tokenizer: Tokenizer, stop: tuple[str, ...]) -> Callable[[Row], bool] | None:
    """A test of a row for stop strings, which may span tokens; None without stop strings."""
    if not stop:
        return None
    return lambda row: any(s in tokenizer.decode(row.continuation) for s in stop)


def completion(tokenizer: Tokenizer, prompt: str, row: Row, stop: tuple[str, ...]) -> Completion:
    """Text of a row: without the end-of-document token, cut before a stop string."""
    ids = row.continuation
    if row.finished == "eod":
        ids = ids[:-1]
    text = tokenizer.decode(ids)
    cuts = [text.index(s) for s in stop if s in text]
    return Completion(
        prompt, text[: min(cuts)] if cuts else text, row.continuation, row.logprobs, row.finished
    )
