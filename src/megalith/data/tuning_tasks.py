"""What a sample of a task is made of: its template, where virtual tokens stand in it, and which field is the answer.

    {"taskname": "sst", "prompt_template": "<|VIRTUAL_PROMPT_0|>{sentence} It was{label}", "total_virtual_tokens": 10,
     "virtual_token_splits": [10], "truncate_field": "sentence", "answer_field": "label", "answer_only_loss": true}

    parts     virtual 0 … 9 │ {sentence} " It was" {label}        stretches of text between virtual tokens
                              └───── one text, tokenised whole ─┘  so that words are cut as anywhere else

The documented rows {prompt_tag, text, answer} are the template `<|VIRTUAL_PROMPT_0|>{text}{answer}`. Knows no tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

MARK = re.compile(r"<\|VIRTUAL_PROMPT_(\d+)\|>|\{(\w+)\}")
TAG, TASK = "prompt_tag", "taskname"
"""The fields that say which task a row is of."""


@dataclass(frozen=True)
class Virtual:
    """Virtual tokens in a template: `length` of the task's, from its `first` on."""

    first: int
    length: int


@dataclass(frozen=True)
class Field:
    """A field of the row."""

    name: str


Part = Virtual | Field | str


@dataclass(frozen=True)
class Task:
    """One task. `parts` in their order; the ids of its virtual tokens begin at `first_id`; `frozen`: they are not trained.

    `answer_only`: of a sample only the answer counts in the loss. `truncate`: the field whose end is cut off where a sample is
    too long; None: such samples are left out.
    """

    name: str
    parts: tuple[Part, ...]
    answer: str = "answer"
    answer_only: bool = False
    truncate: str | None = None
    first_id: int = 0
    key: str | None = None
    """The field that names the task in a row; None: rows of this file need not say."""
    frozen: bool = False

    @property
    def virtual(self) -> int:
        """Virtual tokens of a sample."""
        return sum(part.length for part in self.parts if isinstance(part, Virtual))

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that a row must have, each once."""
        return tuple(dict.fromkeys(part.name for part in self.parts if isinstance(part, Field)))

    def at(self, first_id: int, *, frozen: bool = False) -> Task:
        """The same with its virtual tokens' ids."""
        return replace(self, first_id=first_id, frozen=frozen)


def plain(text: str, answer: str, *, answer_only: bool, truncate: str | None = None) -> Task:
    """Rows of two fields, with no virtual token."""
    return Task("", (Field(text), Field(answer)), answer, answer_only, truncate)


def tagged(tag: str, length: int, *, answer_only: bool, truncate: str | None = None) -> Task:
    """The documented rows: all virtual tokens before the text."""
    parts = (Virtual(0, length), Field("text"), Field("answer"))
    return Task(tag, parts, "answer", answer_only, truncate, key=TAG)


def parse_template(template: str, splits: Sequence[int]) -> tuple[Part, ...]:
    """The parts of a template; virtual tokens in the numbers of `splits`. Whether they make sense, `template_problems` says."""
    starts = [sum(splits[:k]) for k in range(len(splits))]
    parts: list[Part] = []
    at = 0
    for found in MARK.finditer(template):
        if found.start() > at:
            parts.append(template[at : found.start()])
        at = found.end()
        number = found[1]
        if number is None:
            parts.append(Field(found[2]))
        elif int(number) < len(splits):
            parts.append(Virtual(starts[int(number)], splits[int(number)]))
    if at < len(template):
        parts.append(template[at:])
    return tuple(parts)


def template_problems(
    template: str, splits: Sequence[int], total: int, answer: str | None, truncate: str | None
) -> Iterator[tuple[str, str, str]]:
    """(key, what, fix) of everything in a template that cannot be."""
    numbers = [int(found[1]) for found in MARK.finditer(template) if found[1] is not None]
    fields = [found[2] for found in MARK.finditer(template) if found[2] is not None]
    if sum(splits) != total:
        what = f"{list(splits)} add up to {sum(splits)}, and total_virtual_tokens is {total}"
        yield "virtual_token_splits", what, f"numbers that add up to {total}"
    if any(split < 1 for split in splits):
        yield "virtual_token_splits", f"{list(splits)} has a number below 1", "leave it and its mark out"
    if sorted(numbers) != list(range(len(splits))):
        wanted = ", ".join(f"<|VIRTUAL_PROMPT_{k}|>" for k in range(len(splits))) or "none"
        what = f"its virtual prompts are {', '.join(map(str, numbers)) or 'none'}, and there are {len(splits)} splits"
        yield "prompt_template", what, f"each once: {wanted}"
    if not fields:
        yield "prompt_template", "has no field", 'as "<|VIRTUAL_PROMPT_0|>{text}{answer}"'
    elif answer is None and fields.count(fields[-1]) > 1:
        yield (
            "answer_field",
            f"{fields[-1]} is the answer, being last, and stands in it before",
            "name it once",
        )
    if answer is not None and answer not in fields:
        yield "answer_field", f"{answer} is no field of the template", f"one of {', '.join(fields)}"
    elif answer is not None and (fields.count(answer) > 1 or not template.endswith(f"{{{answer}}}")):
        yield "answer_field", f"{{{answer}}} must end the template, and stand in it once", f"…{{{answer}}}"
    if truncate is not None and truncate not in fields:
        yield (
            "truncate_field",
            f"{truncate} is no field of the template",
            f"one of {', '.join(fields)}, or null",
        )
    elif truncate is not None and truncate == answer:
        yield "truncate_field", f"{truncate} is the answer, which must stay whole", "another field, or null"
