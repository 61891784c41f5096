"""Rows of tasks as token ids: virtual tokens where the tag's samples had them, and the text as in training.

    {"prompt_tag": "sst", "text": "A film. It was"} ─▶ v v v v │ A film. It was        virtual ids begin behind the vocabulary
    {"text": "Once upon"}                           ─▶ Once upon                         a row without a tag: the model alone

Rows of all tasks go into one batch. Knows tags, templates and ids; not what stands in the tables.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megalith.adapt.adapter import WITH_TAGS, Adapter
from megalith.adapt.prompts import virtual_ids
from megalith.data.tuning_samples import Maker, Rules
from megalith.data.tuning_tasks import TAG, Field, Task, parse_template, tagged
from megalith.errors import DataError
from megalith.generate.manner import Manner
from megalith.tokenizers.base import Tokenizer

TEXT = "text"
"""The field of a row without a template."""


@dataclass(frozen=True)
class Tagged:
    """A row that may ask for a prompt: its tag, None for the model alone, and its fields."""

    tag: str | None
    fields: Mapping[str, str]

    @property
    def text(self) -> str:
        """What is shown of it: its text, or where a template is filled with several fields, all of them."""
        return self.fields[TEXT] if TEXT in self.fields else " ".join(self.fields.values())


Prompt = str | Tagged
"""A text, or a row of a job with prompts."""


@dataclass(frozen=True)
class Reading:
    """A row as ids: `tokens` with virtual ones, of which there are `virtual`; `text`: those of its text; `start`: a decoder's."""

    tokens: list[int]
    virtual: int
    text: tuple[int, ...]
    start: tuple[int, ...]


@dataclass(frozen=True)
class Prompting:
    """The prompts of a loaded model: its `adapter`, and how rows of each of its tags are made. `tag`: that of texts that name none."""

    adapter: Adapter
    tasks: Mapping[str, Task] = field(default_factory=dict)
    tag: str | None = None

    @classmethod
    def of(cls, adapter: Adapter, vocabulary: int) -> Prompting:
        """For a model of so many true tokens."""
        if adapter.method not in WITH_TAGS:
            return cls(adapter)
        first = virtual_ids(vocabulary, adapter.tags)
        tasks = {
            tag.name: _task(tag.name, tag.length, adapter.tasks.get(tag.name, {})).at(first[tag.name].start)
            for tag in adapter.tags
        }
        return cls(adapter, tasks)

    def read(self, row: Tagged, tokenizer: Tokenizer, manner: Manner, *, two_sides: bool) -> Reading:
        """A row with a tag. Errors: `DataError` for a tag that is not there, and for fields that its template misses."""
        task = self._asked_for(row)
        said = self.adapter.tasks.get(task.name, {})
        before, behind, start = (
            tuple(said.get(name, usual))
            for name, usual in (("before", manner.before), ("behind", manner.behind), ("start", manner.start))
        )
        if manner.forced[0] is not None and start[-1:] == (manner.forced[0],):
            start = start[:-1]  # a word that a decoder is made to say first is said by it
        rules = Rules(sys.maxsize, before=before, behind=behind, start=start if two_sides else None)
        sample = Maker(tokenizer, [task], rules).sample(task, {**row.fields, task.answer: ""})
        tokens = (sample.tokens if sample.encoder is None else sample.encoder).tolist()
        last = max((at for at, token in enumerate(tokens) if token >= task.first_id), default=-1) + 1
        return Reading(tokens, task.virtual, tuple(tokens[last:]), start)

    def shown(self, row: Tagged) -> str:
        """What is shown of a row with a tag: its text, or the fields that its template asks with."""
        if TEXT in row.fields:
            return row.text
        task = self._asked_for(row)
        return " ".join(row.fields[name] for name in task.fields if name != task.answer)

    def _asked_for(self, row: Tagged) -> Task:
        task = self.tasks.get(str(row.tag))
        if task is None:
            known = ", ".join(self.tasks) or "none: what was given has no tags"
            raise DataError(
                f"asks for the prompt {row.tag!r}; there are {known}",
                where=TAG,
                fix="name one of them, or none",
            )
        missing = [name for name in task.fields if name != task.answer and name not in row.fields]
        if missing:
            raise DataError(
                f"has no {', '.join(missing)}, which {task.name} needs",
                where=TAG,
                fix="give all fields of its template, as rows of --input-file do",
            )
        return task


def _task(tag: str, length: int, said: Mapping[str, Any]) -> Task:
    template = said.get("prompt_template")
    if not template:
        return tagged(tag, length, answer_only=True)
    parts = parse_template(str(template), _numbers(said.get("virtual_token_splits") or (length,)))
    fields = [at for at, part in enumerate(parts) if isinstance(part, Field)]
    last = parts[fields[-1]]  # the answer, which the model is to say, and what stood behind it
    return Task(tag, parts[: fields[-1] + 1], str(said.get("answer_field") or last.name), key=TAG)


def _numbers(values: Sequence[Any]) -> list[int]:
    return [int(value) for value in values]
