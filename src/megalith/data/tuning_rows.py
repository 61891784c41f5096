"""Rows of a tuning file: JSON objects, one a line (.jsonl, .json), or one list of them.

    {"prompt_tag": "Winogrande", "text": "The trophy … it is too big. Answer:", "answer": " trophy"}

A field is a text; a list of one text stands for it, a truth value or a number for its spelling in Python (as NeMo's `str()`).
Everything that is wrong in a file is told together, by line. Knows JSON and fields. Knows no tokenizer and no template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalith.errors import DataError

LONE = re.compile("[\ud800-\udfff]")
"""Halves of pairs: JSON may spell them, and no text has them."""
SHOWN = 5
"""Problems of a file that are written out; of the others only the number."""


@dataclass(frozen=True)
class Row:
    """One sample as it is written: `fields` by name, and the line (of a list: the number) where it stands, from 1."""

    file: str
    line: int
    fields: Mapping[str, str]

    @property
    def where(self) -> str:
        """file:line"""
        return f"{self.file}:{self.line}"


class Problems:
    """What is wrong in a file, gathered: `raise_if_any` tells the first few and how many there are."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.found: list[tuple[int, str]] = []

    def add(self, line: int, what: str) -> None:
        """One more."""
        self.found.append((line, what))

    def raise_if_any(self, fix: str) -> None:
        """Errors: `DataError`."""
        if not self.found:
            return
        lines = [f"line {line}: {what}" for line, what in self.found[:SHOWN]]
        more = len(self.found) - SHOWN
        if more > 0:
            lines.append(f"and {more} more")
        count = len({line for line, _ in self.found})
        head = f"{count} row{'' if count == 1 else 's'} of this file cannot be used"
        raise DataError("\n    ".join([head, *lines]), where=self.file, fix=fix)


def read_rows(path: str | Path, wanted: Sequence[str], *, optional: Sequence[str] = ()) -> list[Row]:
    """The rows of a file with the `wanted` fields, and of the `optional` ones those that are there; others are not looked at.

    Errors: `DataError` with all that is wrong: no file, not JSON, no object, a field that is missing or no text.
    """
    file, problems = str(path), Problems(str(path))
    rows = []
    for line, value in _values(Path(path).expanduser(), problems):
        if not isinstance(value, dict):
            problems.add(line, f"is {_kind(value)}, not an object {{…}}")
            continue
        fields = _fields(value, wanted, optional, lambda what, line=line: problems.add(line, what))
        rows.append(Row(file, line, fields))
    problems.raise_if_any(
        f'one object a line: {{{", ".join(f"""{json.dumps(n)}: "…" """.strip() for n in wanted)}}}'
    )
    return rows


def first_fields(path: str | Path) -> set[str]:
    """The names of the fields of a file's first row; none where that is no object."""
    first = next(_values(Path(path).expanduser(), Problems(str(path))), (0, None))[1]
    return set(first) if isinstance(first, dict) else set()


def _fields(
    value: Mapping[str, Any], wanted: Iterable[str], optional: Iterable[str], tell: Any
) -> dict[str, str]:
    found = {}
    for name in (*wanted, *(n for n in optional if n in value)):
        if name not in value:
            there = ", ".join(map(str, value)) or "nothing"
            tell(f'has no "{name}" (it has {there})')
            continue
        text = as_text(value[name])
        if text is None:
            tell(f'"{name}" is {_kind(value[name])}, not a text')
        elif lone := LONE.search(text):
            tell(f'"{name}" holds half a character (U+{ord(lone[0]):04X}), which is no text')
        else:
            found[name] = text
    return found


def as_text(value: Any) -> str | None:
    """The text that a value stands for; None where it stands for none."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool | int | float):
        return str(value)
    return value if isinstance(value, str) else None


def _values(path: Path, problems: Problems) -> Iterator[tuple[int, Any]]:
    """(line, JSON value) of each row."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError("no such file", where=str(path), fix="check the path") from None
    except OSError as error:
        fix = "give a .jsonl or .json file that can be read"
        raise DataError(f"cannot be read: {error.strerror}", where=str(path), fix=fix) from None
    data = data.removeprefix(b"\xef\xbb\xbf")
    if path.suffix == ".json" and data.lstrip()[:1] == b"[":
        yield from _list(data, path)
        return
    for line, text in enumerate(data.split(b"\n"), 1):
        if not text.strip():
            continue
        try:
            yield line, json.loads(text.decode())
        except UnicodeDecodeError:
            problems.add(line, "is not UTF-8 text")
        except ValueError as error:
            problems.add(line, f"is not JSON ({error})")
        except RecursionError:
            problems.add(line, "is nested too deeply")


def _list(data: bytes, path: Path) -> Iterator[tuple[int, Any]]:
    try:
        yield from enumerate(json.loads(data.decode()), 1)
    except (ValueError, RecursionError) as error:
        fix = "one object a line, or one list of objects"
        raise DataError(f"is not JSON ({error})", where=str(path), fix=fix) from None


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return {dict: "an object", type(None): "null", str: "a text"}.get(type(value), "a number")
