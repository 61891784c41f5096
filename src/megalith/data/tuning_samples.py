"""Rows → samples: token ids, and which of them count in the loss.

    GPT        v v v │ The trophy … Answer: trophy ␄        a token is predicted from the one before it: text token 0 from the
    answer     · · ·   · · · · · · · · · · 1      1         last virtual one
    all        · · ·   1 1 1 1 1 1 1 1 1 1 1      1

    T5, BART   encoder  v v v │ The trophy … Answer:        decoder  [start]  trophy [EOS]
                                                                        ·      1      1

Text and answer are tokenised together, as they will stand before the model when it is asked: where the answer begins, the
tokenizer's offsets say, never a tokenisation of the answer alone (NeMo's way, off by one where a token reaches across).
A sample is never changed once it is made. Knows ids and templates. Knows no files and no batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megalith.data.tuning_rows import Problems, Row, first_fields, read_rows
from megalith.data.tuning_tasks import Field, Task, Virtual
from megalith.errors import DataError
from megalith.tokenizers.base import Tokenizer

Ids = npt.NDArray[np.int64]
Marks = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Sample:
    """`tokens` int64[n], `scored` bool[n]: does the prediction of this token count? `encoder` int64[m] of an encoder-decoder,
    whose decoder reads `tokens`; `origin`: file:line."""

    tokens: Ids
    scored: Marks
    encoder: Ids | None
    origin: str
    task: str

    def __post_init__(self) -> None:
        for array in (self.tokens, self.scored, self.encoder):
            if array is not None:
                array.setflags(write=False)


@dataclass(frozen=True)
class Rules:
    """How samples are made. `before` and `behind`: ids around the text (a begin-of-sequence token, say); `eos` ends an answer,
    None: nothing does. `start`: what a decoder's row begins with; None: the model has no decoder of its own.

    `max_length`: tokens of a sample, virtual ones and all; of an encoder-decoder those of either side. `min_length`: tokens
    of text and answer.
    """

    max_length: int
    min_length: int = 1
    before: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()
    eos: int | None = None
    start: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Samples:
    """The samples of some files, in their order, and how many rows were left out for their length; too short is also one of which
    no token counts."""

    samples: tuple[Sample, ...]
    too_long: int = 0
    too_short: int = 0
    cut: int = 0
    """Samples of which `truncate_field` lost its end."""
    files: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def tasks(self) -> Mapping[str, int]:
        """Samples of each task."""
        return Counter(sample.task for sample in self.samples)


@dataclass
class _Left:
    too_long: int = 0
    too_short: int = 0
    cut: int = 0


@dataclass(frozen=True)
class Maker:
    """Makes samples of the rows of `tasks`."""

    tokenizer: Tokenizer
    tasks: Sequence[Task]
    rules: Rules
    _left: _Left = field(default_factory=_Left, repr=False, compare=False)

    def read(self, files: Sequence[str], *, training: bool) -> Samples:
        """The samples of all files. `training`: rows of tasks whose prompts do not change are refused.

        Errors: `DataError` with everything that is wrong in the rows of a file, or where no sample is left.
        """
        left, samples = _Left(), list[Sample]()
        for file in files:
            samples += list(self._of_file(file, training, left))
        found = Samples(tuple(samples), left.too_long, left.too_short, left.cut, tuple(files))
        if not samples:
            raise DataError(_nothing(found, self.rules), where=", ".join(files), fix=_more(found, self.rules))
        return found

    def sample(self, task: Task, fields: Mapping[str, str], origin: str = "") -> Sample:
        """One sample, however long."""
        parts = list(_stretches(task, fields))
        if self.rules.start is None:
            return self._one_side(task, parts, origin)
        return self._two_sides(task, parts, origin)

    def _of_file(self, file: str, training: bool, left: _Left) -> Iterator[Sample]:
        for task, row in self._rows(file, training):
            sample = self.sample(task, row.fields, row.where)
            if self._too_long(sample) and task.truncate is not None:
                sample, left.cut = self._shortened(task, row), left.cut + 1
                left.cut -= self._too_long(sample)
            if self._too_long(sample):
                left.too_long += 1
            elif _text_length(sample, task) < self.rules.min_length or not sample.scored[1:].any():
                left.too_short += 1
            else:
                yield sample

    def _rows(self, file: str, training: bool) -> list[tuple[Task, Row]]:
        """Each row with its task. Errors: `DataError`."""
        by_name = {task.name: task for task in self.tasks}
        key = self.tasks[0].key
        if key is None:  # rows of one kind; which of several spellings, the file's first row says
            there = first_fields(file)
            spelled = next((task for task in self.tasks if set(task.fields) <= there), self.tasks[0])
            return [(spelled, row) for row in read_rows(file, spelled.fields)]
        every = dict.fromkeys(name for task in self.tasks for name in task.fields)
        common = [name for name in every if all(name in task.fields for task in self.tasks)]
        others = [name for name in every if name not in common]
        problems, found = Problems(file), list[tuple[Task, Row]]()
        for row in read_rows(file, [key, *common], optional=others):
            task = by_name.get(row.fields[key])
            if task is None:
                problems.add(row.line, f'{key} "{row.fields[key]}" is none of {", ".join(by_name)}')
            elif training and task.frozen:
                problems.add(
                    row.line,
                    f'{key} "{task.name}" is tuned already and stays as it is: nothing learns from this',
                )
            elif missing := [name for name in task.fields if name not in row.fields]:
                problems.add(row.line, f"has no {', '.join(missing)}, which {task.name} needs")
            else:
                found.append((task, row))
        problems.raise_if_any("name the task in the configuration (model.new_prompt_tags, model.task_templates), or "
                              "take these rows out")  # fmt: skip
        return found

    # -- one sample ------------------------------------------------------------------------------------------------

    def _one_side(self, task: Task, parts: Sequence[_Stretch | Virtual], origin: str) -> Sample:
        tokens: list[int] = []
        scored: list[bool] = []
        before = list(self.rules.before)
        for part in parts:
            if isinstance(part, Virtual):
                first = task.first_id + part.first
                tokens += range(first, first + part.length)
                scored += [False] * part.length
                continue
            ids, begin = self.tokenizer.encode_from(part.text, part.answer)
            text = not task.answer_only
            tokens += [*before, *ids]
            scored += [text] * (len(before) + begin) + [True if part.answers else text] * (len(ids) - begin)
            before = []
        if self.rules.eos is not None:
            tokens.append(self.rules.eos)
            scored.append(True)
        return Sample(_ids(tokens), np.array(scored, np.bool_), None, origin, task.name)

    def _two_sides(self, task: Task, parts: Sequence[_Stretch | Virtual], origin: str) -> Sample:
        encoder: list[int] = []
        answer: list[int] = []
        before = list(self.rules.before)
        for part in parts:
            if isinstance(part, Virtual):
                first = task.first_id + part.first
                encoder += range(first, first + part.length)
                continue
            encoder += [*before, *self.tokenizer.encode(part.text[: part.answer])]
            before = []
            if part.answers:
                answer = self.tokenizer.encode(part.text[part.answer :])
        start = list(self.rules.start or ())
        end = [] if self.rules.eos is None else [self.rules.eos]
        tokens = [*start, *answer, *end]
        scored = np.arange(len(tokens)) >= len(start)
        return Sample(_ids(tokens), scored, _ids([*encoder, *before, *self.rules.behind]), origin, task.name)

    # -- lengths -----------------------------------------------------------------------------------------------------

    def _too_long(self, sample: Sample) -> bool:
        sides = [sample.tokens] if sample.encoder is None else [sample.tokens, sample.encoder]
        return max(map(len, sides)) > self.rules.max_length

    def _shortened(self, task: Task, row: Row) -> Sample:
        """The sample with as much of the beginning of its `truncate` field as there is room for; too long if there is none."""
        assert task.truncate is not None
        whole = row.fields[task.truncate]

        def of(length: int) -> Sample:
            return self.sample(task, {**row.fields, str(task.truncate): whole[:length]}, row.where)

        low, high = 0, len(whole)  # `high` is too long, and what is longer is so nearly always
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._too_long(of(middle)) else (middle, high)
        return of(low)


@dataclass(frozen=True)
class _Stretch:
    """Text without virtual tokens in it; `answer`: where in it the answer begins, its end where there is none."""

    text: str
    answer: int
    answers: bool


def _stretches(task: Task, fields: Mapping[str, str]) -> Iterator[_Stretch | Virtual]:
    """The row in its template, text between virtual tokens joined."""
    text, answer = "", None
    for part in task.parts:
        if isinstance(part, Virtual):
            if text:
                yield _Stretch(text, len(text), False)
            text = ""
            yield part
            continue
        if isinstance(part, Field) and part.name == task.answer:
            answer = len(text)
        text += fields[part.name] if isinstance(part, Field) else part
    if text or answer is not None:
        yield _Stretch(text, len(text) if answer is None else answer, answer is not None)


def _ids(tokens: Sequence[int]) -> Ids:
    return np.array(tokens, np.int64)


def _text_length(sample: Sample, task: Task) -> int:
    """Tokens of a sample without virtual ones: of both sides, where there are two."""
    read = 0 if sample.encoder is None else len(sample.encoder)
    return len(sample.tokens) + read - task.virtual


def _nothing(found: Samples, rules: Rules) -> str:
    if not found.too_long and not found.too_short:
        return "there is no row in it"
    return (
        f"no sample is left: {found.too_long} rows are longer than {rules.max_length} tokens (virtual ones and all), "
        f"{found.too_short} shorter than {rules.min_length}, or without a token that counts"
    )


def _more(found: Samples, rules: Rules) -> str:
    if not found.too_long and not found.too_short:
        return "give a file with rows"
    if not found.too_long:
        return "rows with answers, a smaller model.data.min_seq_length, or model.data.add_eos=true"
    return "a larger model.data.max_seq_length, fewer virtual tokens, or model.data.truncate_field=text, which cuts texts"
