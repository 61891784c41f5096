"""Files of lines: prompts in, one a line, every line checked before the first is continued; JSON out, one a line.

Plain text: a line is a prompt, without its line end (`\\n` or `\\r\\n`; nothing else ends a line). Names that end in .jsonl or
.json: a line is a JSON string or an object with the text under "prompt" or "text", so a prompt may hold line ends. In a job with
tasks' prompts an object has the tag under "prompt_tag" (or "taskname"), and the fields of its template.

Knows files, lines and the room that a model has. Knows no decoding.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megalith.data.tuning_rows import as_text
from megalith.data.tuning_tasks import TAG, TASK
from megalith.errors import DataError
from megalith.generate.asking import ask
from megalith.generate.loading import Loaded
from megalith.generate.prompting import TEXT, Prompt, Tagged

STANDARD = "-"
"""Standard input or output, as a file's name."""
SHOWN = 10
"""Bad lines named at most in an error."""
KEYS = ("prompt", "text")

Complaint = tuple[int, str]
"""Line number, from 1, and what is wrong with it."""


def read_prompts(path: str, *, tagged: bool = False) -> list[Prompt]:
    """The prompts of a file ("-": standard input), one a line; the last line needs no line end. `tagged`: as rows of tasks.

    Errors: `DataError` when it cannot be read, holds no line, or holds lines that are no prompts, each named.
    """
    lines = _lines(path)
    parse: Callable[[bytes], Prompt] = (
        _json_prompt if Path(path).suffix in (".jsonl", ".json") else _plain_prompt
    )
    if tagged:
        parse = _json_row if parse is _json_prompt else _plain_row
    prompts: list[Prompt] = []
    complaints: list[Complaint] = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(parse(line))
        except ValueError as error:
            complaints.append((number, _words(error)))
    _refuse(path, complaints, len(lines))
    return prompts


def check_prompts(loaded: Loaded, prompts: Sequence[Prompt], path: str) -> None:
    """Errors: `DataError` naming every line that the model cannot take: too long, empty, without a blank for a BERT."""
    loaded.manner  # noqa: B018  # what the tokenizer lacks is no line's fault
    complaints: list[Complaint] = []
    for number, prompt in enumerate(prompts, 1):
        try:
            ask(loaded, prompt)
        except DataError as error:
            complaints.append((number, error.problem.what))
    _refuse(path, complaints, len(prompts))


@contextmanager
def open_lines(path: str, *, not_over: str | None = None) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that writes one JSON object a line to a file ("-": standard output), each flushed when written.

    Errors: `DataError` when the file cannot be written, or is the one named by `not_over`.
    """
    if path == STANDARD:
        yield lambda row: print(json.dumps(row, ensure_ascii=False), flush=True)
        return
    target = Path(path).expanduser()
    if not_over and target.exists() and Path(not_over).exists() and os.path.samefile(target, not_over):
        raise DataError("is the file that is read", where=path, fix="name another output file")
    try:
        file = target.open("w", encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"cannot be written ({error.strerror})", where=path, fix="name another output file"
        ) from None
    try:
        with file:
            yield lambda row: print(json.dumps(row, ensure_ascii=False), file=file, flush=True)
    except OSError as error:
        if error.filename is not None:
            raise  # of another file, which the one who writes here was reading
        fix = "make room, or name another output file; the lines in it are whole but the last"
        raise DataError(f"cannot be written any further ({error.strerror})", where=path, fix=fix) from None


def _lines(path: str) -> list[bytes]:
    try:
        data = sys.stdin.buffer.read() if path == STANDARD else Path(path).expanduser().read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=path, fix="check the path") from None
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not lines[-1]:
        del lines[-1]  # what follows the last line end is no line
    if not lines:
        raise DataError("holds no line", where=path, fix="give one prompt a line")
    return [line.removesuffix(b"\r") for line in lines]


def _plain_prompt(line: bytes) -> str:
    return line.decode("utf-8")


def _json_prompt(line: bytes) -> str:
    found = json.loads(line.decode("utf-8"))
    if isinstance(found, dict):
        if tag := _tag(found):
            raise ValueError(f"asks for the prompt {tag!r}, and no prompts were given (--prompts FOLDER)")
        found = next((found[key] for key in KEYS if key in found), None)
    if not isinstance(found, str):
        raise ValueError('neither a string nor an object with a string under "prompt" or "text"')
    return found


def _plain_row(line: bytes) -> Tagged:
    return Tagged(None, {TEXT: _plain_prompt(line)})


def _json_row(line: bytes) -> Tagged:
    found = json.loads(line.decode("utf-8"))
    if isinstance(found, str):
        found = {TEXT: found}
    if not isinstance(found, dict):
        raise ValueError("neither a string nor an object")
    fields = {str(name): text for name, value in found.items() if (text := as_text(value)) is not None}
    if TEXT not in fields and "prompt" in fields:
        fields[TEXT] = fields["prompt"]
    tag = _tag(found)
    if tag is None and TEXT not in fields:
        raise ValueError('has neither a "prompt_tag" nor a "text"')
    return Tagged(tag, {name: text for name, text in fields.items() if name not in (TAG, TASK)})


def _tag(row: Mapping[str, Any]) -> str | None:
    """The tag that a row asks for; none where it is empty."""
    named = [row[key] for key in (TAG, TASK) if row.get(key) is not None]
    tags = [str(value) if as_text(value) is None else as_text(value) for value in named]
    return next(filter(None, tags), None)


def _words(error: ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start} of the line)"
    return f"not JSON ({error})" if isinstance(error, json.JSONDecodeError) else str(error)


def _refuse(path: str, complaints: Sequence[Complaint], total: int) -> None:
    if not complaints:
        return
    named = [f"line {number}: {what}" for number, what in complaints[:SHOWN]]
    more = [f"and {len(complaints) - SHOWN} more"] if len(complaints) > SHOWN else []
    count = f"{len(complaints)} of {total} lines cannot be continued; nothing was generated"
    raise DataError("\n    ".join([count, *named, *more]), where=path, fix="mend or remove these lines")
