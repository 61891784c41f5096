"""Whole lines → documents, line by line the same whether a batch is clean or not.

```
batch ─▶ one object a line, all UTF-8, every key there? ─ yes ─▶ decoded in one call
                                                        └ no ──▶ line by line: document, blank, or reject with reason
```
Knows JSON lines and plain text. Refuses to know files, tokens and where in a file a batch stands.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import numpy as np

from megalith.data.preprocess.wire import Reject

BOM = b"\xef\xbb\xbf"
_EXCERPT_BYTES = 120
_NEWLINE, _RETURN, _OPEN, _CLOSE = b"\n\r{}"
_BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
_LEADING_BLANK_LINES = re.compile(rb"(?:[ \t\r]*\n)*")


@dataclass
class Parsed:
    """Documents of a batch, as UTF-8 and by key, in order; every column has the same length."""

    columns: list[list[bytes]]
    lines: int = 0
    blank: int = 0
    rejects: list[Reject] = field(default_factory=list)


class Parser(Protocol):
    """Turns a batch of whole records into documents. `lines` are counted from 0 at the start of the batch."""

    def parse(self, batch: memoryview) -> Parsed: ...


class JsonLines:
    """One JSON object a line; the value of each key must be text, or the line is rejected whole."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self.keys = keys
        self._names = [f"key{number}" for number in range(len(keys))]
        fields: list[Any] = [
            (name, str, msgspec.field(name=key)) for name, key in zip(self._names, keys, strict=True)
        ]
        self._decoder = msgspec.json.Decoder(msgspec.defstruct("Line", fields, gc=False))
        self._plain = msgspec.json.Decoder(dict[str, Any])
        self._mostly_text = True

    def parse(self, batch: memoryview) -> Parsed:
        return self._parse_clean(batch) or self._parse_lines(batch)

    def _parse_clean(self, batch: memoryview) -> Parsed | None:
        """All lines at once, or None where one of them may be bad.

        `decode_lines` accepts an object on two lines and two on one line, hence the frame: between a closing and an
        opening brace with a newline between them there is always a line's end. It looks at the UTF-8 of values that it
        decodes, not of those it skips: so where the text is most of a line, everything is decoded, and where it is not,
        the whole batch is looked at beforehand.
        """
        lines = _framed_objects(np.frombuffer(batch, np.uint8))
        if lines == 0:
            return None
        try:
            if self._mostly_text:
                values = self._plain.decode_lines(batch)
                columns = [[value[key].encode() for value in values] for key in self.keys]
            else:
                _check_utf8(batch)
                objects = self._decoder.decode_lines(batch)
                columns = [[getattr(each, name).encode() for each in objects] for name in self._names]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError, AttributeError):
            return None
        if len(columns[0]) != lines:
            return None
        self._mostly_text = 2 * sum(len(text) for column in columns for text in column) > len(batch)
        return Parsed(columns, lines=lines)

    def _parse_lines(self, batch: memoryview) -> Parsed:
        parsed = Parsed([[] for _ in self.keys])
        for line in _split(batch):
            number, parsed.lines = parsed.lines, parsed.lines + 1
            if not line.strip():
                parsed.blank += 1
                continue
            try:
                line.decode("utf-8")
                document = self._decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                parsed.rejects.append(Reject(number, self.reason(line, error), excerpt(line)))
                continue
            for name, column in zip(self._names, parsed.columns, strict=True):
                column.append(getattr(document, name).encode())
        return parsed

    def reason(self, line: bytes, error: Exception) -> str:
        """Why a line is no document, in words."""
        if isinstance(error, UnicodeDecodeError):
            return f"invalid UTF-8 at byte {error.start}"
        if line.startswith(BOM):
            return "byte order mark (BOM) before the object"
        if isinstance(error, RecursionError):
            return "malformed JSON: nested too deeply"
        if isinstance(error, msgspec.ValidationError):
            return self._wrong_value(line, error)
        if "surrogate" in str(error) or ("truncated" in str(error) and _stdlib_accepts(line)):
            return "malformed JSON: a lone surrogate, which is no character"
        if "truncated" in str(error):
            return "malformed JSON: the line ends early"
        return "malformed JSON: " + str(error).removeprefix("JSON is malformed: ")

    def _wrong_value(self, line: bytes, error: Exception) -> str:
        try:
            values = self._plain.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return str(error)
        for key in self.keys:
            if key not in values:
                return f"no key {key!r}"
            if not isinstance(values[key], str):
                return f"the value of {key!r} is {_kind(values[key])}, not text"
        return str(error)


class TextLines:
    """Each line is a document, its line ending cut off."""

    def parse(self, batch: memoryview) -> Parsed:
        clean = not bad_utf8(batch)
        parsed = Parsed([[]])
        for number, line in enumerate(_split(batch)):
            parsed.lines += 1
            line = line.removesuffix(b"\r")
            if not line.strip():
                parsed.blank += 1
            elif clean or not (reason := bad_utf8(line)):
                parsed.columns[0].append(line)
            else:
                parsed.rejects.append(Reject(number, reason, excerpt(line)))
        return parsed


class Paragraphs:
    """Lines between blank lines are a document. A batch holds whole paragraphs."""

    def parse(self, batch: memoryview) -> Parsed:
        text = bytes(batch)
        parsed = Parsed([[]], lines=text.count(b"\n") + (not text.endswith(b"\n")))
        line = at = 0
        for start, end in _paragraphs(text):
            line += text.count(b"\n", at, start)
            at = start
            paragraph = text[start:end].rstrip(b"\r\n")
            if not paragraph.strip():
                continue
            if reason := bad_utf8(paragraph):
                parsed.rejects.append(Reject(line, reason, excerpt(paragraph)))
            else:
                parsed.columns[0].append(paragraph)
        return parsed


class WholeText:
    """The batch is one document, as it is."""

    def parse(self, batch: memoryview) -> Parsed:
        text = bytes(batch)
        parsed = Parsed([[]], lines=1)
        if reason := bad_utf8(text):
            parsed.rejects.append(Reject(0, reason, excerpt(text)))
        else:
            parsed.columns[0].append(text)
        return parsed


def _stdlib_accepts(line: bytes) -> bool:
    """The standard library lets lone surrogates through, which tells them from a line cut off."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def excerpt(line: bytes) -> str:
    """The start of a bad line, printable, bytes that are no text as `\\xNN`."""
    kept = line[:_EXCERPT_BYTES].decode("utf-8", errors="backslashreplace")
    return kept + ("…" if len(line) > _EXCERPT_BYTES else "")


def bad_utf8(text: bytes | memoryview) -> str:
    """Why bytes are not UTF-8, or ""."""
    try:
        codecs.utf_8_decode(text, "strict", True)
    except UnicodeDecodeError as error:
        return f"invalid UTF-8 at byte {error.start}"
    return ""


def _check_utf8(batch: memoryview) -> None:
    """UnicodeDecodeError if the bytes are not UTF-8."""
    if np.frombuffer(batch, np.int8).min() < 0:
        codecs.utf_8_decode(batch, "strict", True)


def _framed_objects(data: np.ndarray) -> int:
    """Number of lines if each begins with `{` and ends with `}` (and perhaps a carriage return), else 0."""
    ends = np.flatnonzero(data == _NEWLINE)
    if not len(ends) or ends[0] < 2 or ends[-1] != len(data) - 1:
        return 0
    if data[0] != _OPEN or (data[ends[:-1] + 1] != _OPEN).any():
        return 0
    last = data[ends - 1]
    if (last == _CLOSE).all():
        return len(ends)
    last = np.where(last == _RETURN, data[ends - 2], last)
    return len(ends) if (last == _CLOSE).all() else 0


def _split(batch: memoryview) -> Iterator[bytes]:
    """Lines without their newline; a newline at the end opens no further line."""
    lines = bytes(batch).split(b"\n")
    if not lines[-1]:
        lines.pop()
    return iter(lines)


def _paragraphs(text: bytes) -> Iterator[tuple[int, int]]:
    match = _LEADING_BLANK_LINES.match(text)
    start = match.end() if match else 0
    for match in _BLANK_LINES.finditer(text):
        yield start, match.start()
        start = match.end()
    yield start, len(text)


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", dict: "an object", list: "an array"}
    return names.get(type(value), "a number")
