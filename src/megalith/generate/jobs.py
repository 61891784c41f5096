"""Many continuations: the lines of a file, samples of one prompt, samples of nothing. Batched inside, in order outside.

Rows are batched with others of about their length, and handed out in the order given as soon as all before them are done.
A row's text is a function of the seed and of its place in the job, never of the batch size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from megalith.errors import ConfigError, DataError, Problem
from megalith.generate.loading import Loaded
from megalith.generate.sampling import Sampling
from megalith.generate.text import Completion, complete

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


def continue_all(
    loaded: Loaded, prompts: Sequence[str], sampling: Sampling, options: Options, *, first: int = 0
) -> Iterator[Completion]:
    """One completion a prompt, in order; prompt i draws as row `first` + i."""
    tokenizer, size = loaded.needs_tokenizer(), options.batch_size
    for begin in range(0, len(prompts), size * WINDOW):
        window = prompts[begin : begin + size * WINDOW]
        lengths = [len(ids) for ids in tokenizer.encode_batch(window)]
        order = sorted(range(len(window)), key=lambda i: lengths[i])
        batches = [order[at : at + size] for at in range(0, len(order), size)]

        def work(chosen: list[int], begin: int = begin, window: Sequence[str] = window) -> list[Completion]:
            return complete(
                loaded,
                [window[i] for i in chosen],
                sampling,
                numbers=[first + begin + i for i in chosen],
                recompute=options.recompute,
                logprobs=options.logprobs,
            )

        rows = chain.from_iterable(loaded.crew.divide(batches, work))
        done = dict(zip(chain.from_iterable(batches), rows, strict=True))
        yield from (done[i] for i in range(len(window)))


def sample_all(loaded: Loaded, count: int, sampling: Sampling, options: Options) -> Iterator[Completion]:
    """`count` unconditional samples, no two with the same text.

    Draws differ from row to row, so equal samples are rare but for short ones; one that came before is drawn anew, keyed by
    the number of the try. So this is sampling without replacement, and the same for every batch size.
    Errors: `ConfigError` when greedy, where all would be equal; `DataError` when no new sample is found.
    """
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
            recompute=options.recompute,
            logprobs=options.logprobs,
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
