"""Answers: to one prompt, to the lines of a file, samples of nothing. Batched inside, in order outside.

Rows are batched with others of about their length, and handed out in the order given as soon as all before them are done.
A row's text is a function of the seed and of its place in the job, never of the batch size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any, TypeVar

from megalith.errors import ConfigError, DataError, Problem
from megalith.generate.asking import ask
from megalith.generate.guess import GUESSES, Guesses, guess
from megalith.generate.loading import Loaded
from megalith.generate.prompting import Prompt
from megalith.generate.sampling import Sampling
from megalith.generate.text import Completion, complete, stream

Answer = Completion | Guesses
Result = TypeVar("Result")
WINDOW = 16
"""Batches within which prompts are sorted by length before they are batched."""
ATTEMPTS = 100
"""How often a sample that came before is drawn anew before giving up."""


@dataclass(frozen=True)
class Options:
    """How a job runs, and what it keeps, beyond which tokens are chosen."""

    batch_size: int = 8
    recompute: bool = False
    logprobs: bool = False

    @property
    def how(self) -> dict[str, bool]:
        """What decoding is told."""
        return {"recompute": self.recompute, "logprobs": self.logprobs}


def unfit(family: str, sampling: Sampling, options: Options) -> list[str]:
    """Flags of settings that mean nothing to a model of this family: a BERT has guesses (`top_k` of them), no text."""
    if family != "bert":
        return []
    settings = [(sampling, Sampling()), (options, Options(options.batch_size))]
    changed = [
        f"--{each.name.replace('_', '-')}"
        for mine, usual in settings
        for each in fields(mine)
        if getattr(mine, each.name) != getattr(usual, each.name)
    ]
    return [flag for flag in changed if flag != "--top-k"]


def answer(
    loaded: Loaded, prompt: Prompt, sampling: Sampling, options: Options, *, number: int = 0
) -> Iterator[str | Answer]:
    """One prompt's answer: pieces of its text, and last all of it."""
    if loaded.family == "bert":
        (found,) = guess(loaded, [_plain(prompt)], sampling.top_k or GUESSES)
        yield from (found.text, found)
        return
    yield from stream(loaded, prompt, sampling, number=number, **options.how)


def answer_all(
    loaded: Loaded, prompts: Sequence[Prompt], sampling: Sampling, options: Options
) -> Iterator[Answer]:
    """One answer a prompt, in order."""
    if loaded.family != "bert":
        yield from continue_all(loaded, prompts, sampling, options)
        return

    def work(chosen: Sequence[int]) -> list[Guesses]:
        return guess(loaded, [_plain(prompts[i]) for i in chosen], sampling.top_k or GUESSES)

    yield from in_batches(loaded, prompts, options, work)


def _plain(prompt: Prompt) -> str:
    """A BERT reads no prompts of tasks."""
    return prompt if isinstance(prompt, str) else prompt.text


def continue_all(
    loaded: Loaded, prompts: Sequence[Prompt], sampling: Sampling, options: Options, *, first: int = 0
) -> Iterator[Completion]:
    """One completion a prompt, in order; prompt i draws as row `first` + i."""

    def work(chosen: Sequence[int]) -> list[Completion]:
        return complete(
            loaded,
            [prompts[i] for i in chosen],
            sampling,
            numbers=[first + i for i in chosen],
            **options.how,
        )

    yield from in_batches(loaded, prompts, options, work)


def in_batches(
    loaded: Loaded, prompts: Sequence[Prompt], options: Options, work: Callable[[Sequence[int]], list[Result]]
) -> Iterator[Result]:
    """What `work` makes of the prompts with these numbers, in order: those of about a length together, divided among copies."""
    size = options.batch_size
    for begin in range(0, len(prompts), size * WINDOW):
        window = range(begin, min(begin + size * WINDOW, len(prompts)))
        lengths = {i: ask(loaded, prompts[i]).length for i in window}
        order = sorted(window, key=lengths.__getitem__)
        batches = [order[at : at + size] for at in range(0, len(order), size)]
        rows = chain.from_iterable(loaded.crew.divide(batches, work))
        done = dict(zip(chain.from_iterable(batches), rows, strict=True))
        yield from (done[i] for i in window)


def sample_all(loaded: Loaded, count: int, sampling: Sampling, options: Options) -> Iterator[Completion]:
    """`count` unconditional samples, no two with the same text.

    Draws differ from row to row, so equal samples are rare but for short ones; one that came before is drawn anew, keyed by
    the number of the try. So this is sampling without replacement, and the same for every batch size.
    Errors: `ConfigError` when greedy, where all would be equal; `DataError` when no new sample is found.
    """
    if loaded.family != "gpt":
        problem = f"unconditional texts are a GPT's; this checkpoint is a {loaded.family.upper()}, which answers a prompt"
        raise ConfigError([Problem("--num-samples", problem, "give --prompt or --input-file")])
    if sampling.beams > 1:
        raise ConfigError(
            [Problem("--beams, --num-samples", "a search of nothing has one best text", "leave --beams out")]
        )
    sampling = replace(sampling, num_samples=count)
    if count > 1 and not sampling.samples:
        problem = f"greedy decoding would give {count} times the same text"
        raise ConfigError(
            [Problem("--num-samples", problem, "leave out what makes it greedy, or ask for one")]
        )
    seen: set[bytes] = set()
    step = options.batch_size * loaded.crew.topology.data_size
    for begin in range(0, count, step):
        size = min(step, count - begin)
        rows = continue_all(loaded, [""] * size, sampling, options, first=begin)
        for number, row in enumerate(rows, begin):
            if digest(row.text) in seen:
                row = _another(loaded, number, sampling, options, seen=seen)
            seen.add(digest(row.text))
            yield row


def _another(
    loaded: Loaded, number: int, sampling: Sampling, options: Options, *, seen: set[bytes]
) -> Completion:
    """Row `number`, drawn anew until it has a text that is not among those seen."""

    def draw_again(attempt: int) -> Completion:
        (row,) = complete(
            loaded,
            [""],
            sampling,
            numbers=[number],
            attempt=attempt,
            **options.how,
        )
        return row

    for attempt in range(1, ATTEMPTS + 1):
        (row,) = loaded.crew.divide([attempt], draw_again)
        if digest(row.text) not in seen:
            return row
    raise DataError(
        f"sample {number + 1} was drawn {ATTEMPTS} times and always equalled an earlier one",
        where="--num-samples",
        fix="ask for more tokens or fewer samples, raise the temperature, or loosen top-k and top-p",
    )


def digest(text: str) -> bytes:
    """Sixteen bytes that stand for a text, so that a million samples need no gigabytes."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def unconditional_json(row: Completion) -> dict[str, Any]:
    """The reference's line: {"text", "length", "finished"}.

    `length` counts the generated tokens, without the end of document; `finished` says that the row ended by itself. The
    reference leaves the last token out of every text; this does not.
    """
    length = len(row.tokens) - (row.finished == "eod")
    return {"text": row.text, "length": length, "finished": row.finished in ("eod", "stop")}
