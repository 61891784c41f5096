"""Text in, text out: prompts through a tokenizer, continuations back, stop strings, streaming.

Knows text and rows of tokens; `asking` makes the rows, `engine` and `beam` do the decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megalith.generate.asking import Asked, ask
from megalith.generate.beam import search
from megalith.generate.blanks import spans
from megalith.generate.engine import Row, decode
from megalith.generate.loading import Loaded
from megalith.generate.prompting import Prompt, Tagged
from megalith.generate.sampling import Sampling
from megalith.models.encdec import EncoderDecoder
from megalith.models.gpt import GPT
from megalith.tokenizers.base import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes half a character to."""
CONTEXT = 4
"""Tokens of the prompt that a continuation is spelled behind: some tokenizers write a space only between words."""


@dataclass(frozen=True)
class Completion:
    """One answer: its text, its ids, why it ended, and where asked for their log-probabilities.

    `text` is what stands behind a GPT's prompt, what a decoder wrote, or, of a T5's prompt with blanks, the prompt with these
    filled. `decoded`: what an encoder-decoder's decoder wrote; None: there is none. `score`: a beam search's. `length` counts the
    tokens of prompt and continuation, of an encoder-decoder the longer of both sides. `row`: that of a job with tasks' prompts.
    """

    prompt: str
    text: str
    tokens: list[int]
    finished: str
    logprobs: list[float] | None = None
    length: int = 0
    decoded: str | None = None
    score: float | None = None
    row: Tagged | None = None

    @classmethod
    def of(cls, asked: Asked, spelled: str, row: Row, *, logprobs: bool) -> Completion:
        """The finished `row`, whose continuation is `spelled` so."""
        known, text, decoded, length = row.logprobs if logprobs else None, spelled, None, len(row.tokens)
        if asked.source is not None:
            decoded, length = spelled, max(length, len(asked.source))
        if asked.blanks is not None:
            text = asked.blanks.filled(spans(spelled, asked.blanks.numbers))
        made = row.continuation
        return cls(asked.prompt, text, made, row.finished, known, length, decoded, row.score, asked.row)

    def to_json(self) -> dict[str, Any]:
        """{"prompt", "text", "decoded"?, "tokens", "logprobs"?, "score"?, "finished"}; of a job with tasks' prompts
        {"prompt_tag", "text", "completion", "tokens", "token_logprobs"?, "finish_reason"}."""
        if self.row is not None:
            return self._of_task(self.row.tag)
        row: dict[str, Any] = {"prompt": self.prompt, "text": self.text}
        if self.decoded is not None:
            row["decoded"] = self.decoded
        row["tokens"] = self.tokens
        if self.logprobs is not None:
            row["logprobs"] = [round(value, 6) for value in self.logprobs]
        if self.score is not None:
            row["score"] = round(self.score, 6)
        return {**row, "finished": self.finished}

    def _of_task(self, tag: str | None) -> dict[str, Any]:
        row: dict[str, Any] = {
            "prompt_tag": tag,
            "text": self.prompt,
            "completion": self.text,
            "tokens": self.tokens,
        }
        if self.logprobs is not None:
            row["token_logprobs"] = [round(value, 6) for value in self.logprobs]
        return {**row, "finish_reason": self.finished}


def complete(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    numbers: Sequence[int] | None = None,
    attempt: int = 0,
    recompute: bool = False,
    logprobs: bool = False,
) -> list[Completion]:
    """Continues every prompt in one batch; a row's text does not depend on the rows beside it.

    `numbers`: which rows of a longer job these are, `attempt`: which try (see `engine.decode`). With `sampling.beams` the best
    text of each prompt's search.
    """
    if sampling.beams > 1:
        found = search_texts(loaded, prompts, sampling, recompute=recompute, logprobs=logprobs)
        return [best for best, *_ in found]
    asked = [ask(loaded, prompt) for prompt in prompts]
    tokenizer, spellers = loaded.needs_tokenizer(), {}
    of_row = dict(zip(range(len(asked)) if numbers is None else numbers, asked, strict=True))

    def stopped(row: Row) -> bool:
        if row.number not in spellers:
            spellers[row.number] = Speller(tokenizer, of_row[row.number].context, sampling.stop)
        return _push(spellers[row.number], row, of_row[row.number])

    *_, rows = decode(
        **_inputs(loaded, asked, sampling),
        numbers=numbers,
        attempt=attempt,
        recompute=recompute,
        logprobs=logprobs,
        agree=loaded.crew.same,
        stopped=stopped if sampling.stop else None,
    )
    return [
        Completion.of(each, spelled(tokenizer, each, row, spellers.get(row.number)), row, logprobs=logprobs)
        for each, row in zip(asked, rows, strict=True)
    ]


def search_texts(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    recompute: bool = False,
    logprobs: bool = False,
) -> list[list[Completion]]:
    """Of every prompt the `num_samples` best texts of a beam search, best first."""
    asked = [ask(loaded, prompt) for prompt in prompts]
    tokenizer = loaded.needs_tokenizer()
    found = search(**_inputs(loaded, asked, sampling), recompute=recompute, agree=loaded.crew.same)
    return [
        [Completion.of(each, spelled(tokenizer, each, row), row, logprobs=logprobs) for row in rows]
        for each, rows in zip(asked, found, strict=True)
    ]


def stream(
    loaded: Loaded,
    prompt: Prompt,
    sampling: Sampling,
    *,
    number: int = 0,
    recompute: bool = False,
    logprobs: bool = False,
) -> Iterator[str | Completion]:
    """Answers one prompt, yielding pieces of text as they become certain and, last, the `Completion`.

    No piece ends in half a character or in what may become a stop string; all pieces together are the completion's text. That
    of a beam search, or of a prompt with blanks, is one piece.
    """
    asked, tokenizer = ask(loaded, prompt), loaded.needs_tokenizer()
    if sampling.beams > 1:
        (found,) = complete(loaded, [prompt], sampling, recompute=recompute, logprobs=logprobs)
        yield from filter(None, (found.text, found))
        return
    speller = Speller(tokenizer, asked.context, sampling.stop)
    states = decode(
        **_inputs(loaded, [asked], sampling),
        numbers=[number],
        recompute=recompute,
        logprobs=logprobs,
        agree=loaded.crew.same,
        stopped=lambda row: _push(speller, row, asked),
    )
    shown = 0
    for rows in states:
        row = rows[0]
        certain = len(speller.certain)
        if certain > shown and asked.blanks is None:
            yield speller.text[shown:certain]
            shown = certain
    last = Completion.of(asked, speller.finish(), row, logprobs=logprobs)
    if len(last.text) > shown:
        yield last.text[shown:]
    yield last


def _inputs(loaded: Loaded, asked: Sequence[Asked], sampling: Sampling) -> dict[str, Any]:
    """What decoding and searching are given of prompts."""
    model = loaded.model
    assert isinstance(model, GPT | EncoderDecoder)
    sources = [each.source for each in asked] if isinstance(model, EncoderDecoder) else None
    manner = loaded.manner
    return {
        "model": model,
        "prompts": [each.tokens for each in asked],
        "sampling": sampling,
        "eod": manner.eod,
        "forced": manner.forced,
        "sources": sources,
        "relay": loaded.crew.relay,
    }


def _push(speller: Speller, row: Row, asked: Asked) -> bool:
    """Spells a row's newest token; returns whether a stop string is there."""
    return row.made > asked.unspelled and speller.push(row.tokens[-1])


class Speller:
    """Spells a growing row of ids, a token at a time, and finds stop strings, which may begin and end within tokens.

    Decodes only the last few tokens at each step: those not yet certain, behind those before them.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: tuple[str, ...]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.text, self.stopped = "", False
        self._longest = max(map(len, stop), default=0)
        self._ids = list(prompt[-CONTEXT:])
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


def spelled(tokenizer: Tokenizer, asked: Asked, row: Row, speller: Speller | None = None) -> str:
    """The text of a finished row: without the end-of-document token, cut before a stop string."""
    if speller is None:
        speller = Speller(tokenizer, asked.context, ())
        ids = row.continuation[:-1] if row.finished == "eod" else row.continuation
        speller.extend(ids[asked.unspelled :])
    return speller.finish()
