"""LAMBADA: does a model guess the last word of a passage? One forward a batch, logits for the last words alone.

Loose: the label is the passage's last token. Strict (the published variant): the label is the last word, tokenized behind a
space, and the context what stands before it. A passage counts as right iff every token of its label is the most probable
one after the tokens before it.

    context ─┬─ label      inputs   c c c l l - -      the model is causal: what pads a row's end disturbs nobody
             │             targets  · · l l l - -

Legend: B batch, T time
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch

from megalith.errors import DataError
from megalith.evaluate.held_out import read_text
from megalith.evaluate.scoring import score_targets
from megalith.evaluate.windows import Progress, capped_exp, check_length
from megalith.generate.crew import Crew
from megalith.generate.loading import Loaded
from megalith.models.gpt import GPT
from megalith.nn.loss import NOT_COUNTED
from megalith.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Request:
    """The file (JSON lines with a "text") and how it is read. `seq_length` None: the length trained on."""

    data: str
    strict: bool = False
    seq_length: int | None = None
    batch_size: int = 8


class Example(NamedTuple):
    """Token ids of a context and of what should follow it."""

    context: list[int]
    label: list[int]


class Outcome(NamedTuple):
    """Was the whole label the model's guess; nats of the label."""

    right: bool
    loss: float


@dataclass(frozen=True)
class Report:
    """`perplexity` of the labels, per passage; `cut`: passages whose beginning was too long for the model."""

    source: str
    step: int
    strict: bool
    examples: int
    correct: int
    accuracy: float
    perplexity: float
    cut: int

    def to_json(self) -> dict[str, Any]:
        return {"task": "lambada", **asdict(self)}

    @property
    def line(self) -> str:
        """The reference's line, which scripts read."""
        return (
            f" validation results on LAMBADA | number correct: {self.correct:.4E} "
            f"| total examples: {self.examples:.4E} | avg accuracy: {self.accuracy:.4E}"
        )


def evaluate(loaded: Loaded, request: Request, progress: Progress | None = None) -> Report:
    """Scores a loaded checkpoint. `progress(done, all)` counts passages.

    Errors: `DataError` naming the first line that is no passage, or whose last word leaves no room for a context.
    """
    tokenizer = loaded.needs_tokenizer()
    longest = request.seq_length or loaded.trained_length
    check_length(loaded.model, longest)
    examples, cut = [], 0
    for where, text in passages(request.data):
        example = split(text, tokenizer, strict=request.strict, where=where)
        fitting = fit(example, longest, where)
        cut += fitting is not example
        examples.append(fitting)
    outcomes = score(loaded.model, examples, request.batch_size, progress, loaded.crew)
    correct = sum(outcome.right for outcome in outcomes)
    return Report(
        source=request.data,
        step=loaded.step,
        strict=request.strict,
        examples=len(examples),
        correct=correct,
        accuracy=correct / len(examples),
        perplexity=capped_exp(math.fsum(outcome.loss for outcome in outcomes) / len(examples)),
        cut=cut,
    )


def passages(path: str) -> list[tuple[str, str]]:
    """("file, line n", text) of every line that is not blank. Errors: `DataError` for one that is not {"text": …}."""
    found = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str) or not text.strip():
            what = 'is not a JSON object with a "text" that says something'
            raise DataError(what, where=where, fix="mend or remove the line")
        found.append((where, text))
    if not found:
        raise DataError("holds no passage", where=path, fix='give JSON lines with a "text"')
    return found


def split(text: str, tokenizer: Tokenizer, *, strict: bool, where: str) -> Example:
    """Context and label of a passage. Errors: `DataError` when nothing is left for the context."""
    if strict:
        word = text.split()[-1]
        example = Example(tokenizer.encode(text[: text.rfind(word)].strip()), tokenizer.encode(" " + word))
    else:
        tokens = tokenizer.encode(text)
        example = Example(tokens[:-1], tokens[-1:])
    if not example.context:
        raise DataError("has nothing before its last word", where=where, fix="remove the line")
    return example


def fit(example: Example, longest: int, where: str) -> Example:
    """The same example, or with a context cut at its beginning, so that the model reads `longest` tokens at most."""
    room = longest + 1 - len(example.label)
    if len(example.context) <= room:
        return example
    if room < 1:
        raise DataError(
            f"its last word has {len(example.label)} tokens, the model reads {longest}", where=where
        )
    return Example(example.context[-room:], example.label)


def score(
    model: GPT,
    examples: Sequence[Example],
    batch_size: int,
    progress: Progress | None = None,
    crew: Crew | None = None,
) -> list[Outcome]:
    """One outcome an example, in order, on every process. Rows are batched with others of about their length."""
    device, crew = next(model.parameters()).device, crew or Crew()
    order = sorted(range(len(examples)), key=lambda i: sum(map(len, examples[i])))
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]

    def work(chosen: list[int]) -> list[Outcome]:
        inputs, targets = padded([examples[i] for i in chosen])
        scored = score_targets(model, inputs.to(device), targets.to(device), crew.relay)
        sizes = [len(examples[i].label) for i in chosen]
        parts = zip(scored.right.split(sizes), scored.losses.split(sizes), strict=True)
        return [Outcome(bool(right.all()), float(losses.sum())) for right, losses in parts]

    def report(done: int) -> None:
        if progress is not None:
            progress(min(done * batch_size, len(order)), len(order))

    found = chain.from_iterable(crew.divide(batches, work, report))
    outcomes = dict(zip(chain.from_iterable(batches), found, strict=True))
    return [outcomes[i] for i in range(len(examples))]


def padded(examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (B, T): every token but the last, and the label where it is to be guessed; −1 elsewhere."""
    longest = max(len(e.context) + len(e.label) for e in examples) - 1
    inputs = torch.zeros(len(examples), longest, dtype=torch.int64)
    targets = torch.full((len(examples), longest), NOT_COUNTED)
    for row, (context, label) in enumerate(examples):
        length = len(context) + len(label) - 1
        inputs[row, :length] = torch.tensor((context + label)[:-1])
        targets[row, len(context) - 1 : length] = torch.tensor(label)
    return inputs, targets
