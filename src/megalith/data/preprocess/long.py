"""Records too large to load: found, checked and cut in constant memory.

```
{"id": 7, "text": "………2 GB………", …}      1. skeleton: the line with its long strings taken out, judged by the parser
          ╰── LongString (bytes of the file)    2. each long string wanted: checked to its end
                                                3. and only then handed out in pieces of a few MiB
```
A piece ends where the tokenizer starts a new word anyway, so that the pieces' ids are the ids of the whole: a place
counts only if the text around it encodes to the same ids cut and uncut.

Knows JSON strings, UTF-8 and where text may be cut. Refuses to know the rest of the pipeline.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec

from megalith.data.preprocess.batches import Limits, PlainFile, Span
from megalith.data.preprocess.parse import JsonLines, bad_utf8
from megalith.data.sentences import last_paragraph

_WINDOW = 256
_STRETCH = 1 << 16
_CANDIDATES = 8
_MARK = "\x00long string {} of this line\x00"

_STRING_BODY = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_ESCAPES = re.compile(
    rb"(?:[^\\]++|\\[^u]|\\u(?![dD][89abAB])[0-9a-fA-F]{4}|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[0-9a-fA-F]{4})*+",
    re.DOTALL,
)
_LONGEST_ESCAPE = 12
_CUTS = (
    re.compile(rb"(?<=[A-Za-z])(?= [A-Za-z])"),
    re.compile(rb"(?<=\n)(?=[A-Za-z\xc3-\xf4])"),
    re.compile(rb"(?<=[^\s])(?=\s[^\s])"),
)
"""Places where every known scheme starts a new word, surest first."""

Encode = Callable[[list[bytes]], list[list[int]]]


class BadRecord(Exception):
    """The record is no document; the message is the reason."""


@dataclass
class Skeleton:
    """A line without its long strings: `line` has a mark for each, `strings` where they are in the file."""

    limit: int
    line: bytearray = field(default_factory=bytearray)
    strings: list[Span] = field(default_factory=list)

    def add(self, part: bytes) -> None:
        if len(self.line) + len(part) > self.limit:
            raise BadRecord(f"longer than {_size(self.limit)} besides its long strings")
        self.line += part


class LongRecord:
    """One record of a plain file, `span`, as text pieces by key.

    `encode` maps texts to ids, to try places to cut. Every method may raise `BadRecord`.
    """

    def __init__(self, file: PlainFile, span: Span, encode: Encode, limits: Limits) -> None:
        self._file = file
        self._limits = limits
        self._span = span
        self._encode = encode

    def json(self, parser: JsonLines) -> list[bytes | Span]:
        """The value of each key: its text, or where in the file its JSON string is. Everything is checked."""
        skeleton = self._skeleton()
        line = bytes(skeleton.line)
        parsed = parser.parse(memoryview(line + b"\n"))
        if parsed.rejects:
            raise BadRecord(parsed.rejects[0].reason)
        marks = {_MARK.format(number).encode(): span for number, span in enumerate(skeleton.strings)}
        for span in skeleton.strings:
            for _ in self.pieces(span, json=True, cut=False):
                pass
        return [marks.get(column[0], column[0]) for column in parsed.columns]

    def pieces(self, span: Span, *, json: bool, cut: bool = True) -> Iterator[bytes]:
        """The text of a span in order, each piece cut at a safe place (`cut`), or just as it was read."""
        decoded = self._unescaped(span) if json else self._plain(span)
        return _cut(decoded, self._encode, self._limits) if cut else decoded

    def paragraphs(self, span: Span, *, json: bool) -> Iterator[bytes]:
        """As `pieces`, each some whole paragraphs: their sentences are those of the whole text."""
        held = ""
        for text in self.pieces(span, json=json, cut=False):
            held += text.decode()
            if len(held) < self._limits.piece:
                continue
            place = last_paragraph(held)
            if place:
                yield held[:place].encode()
                held = held[place:]
            elif len(held) >= self._limits.uncut:
                raise BadRecord(f"{_size(self._limits.uncut)} of text without a blank line to cut it at")
        yield held.encode()

    def excerpt(self) -> bytes:
        return self._file.read(self._span.start, min(1024, self._span.end - self._span.start))

    def _chunks(self, span: Span) -> Iterator[bytes]:
        for offset in range(span.start, span.end, self._limits.reading):
            yield self._file.read(offset, min(self._limits.reading, span.end - offset))

    def _skeleton(self) -> Skeleton:
        """Walk through the line, string by string."""
        skeleton = Skeleton(self._limits.skeleton)
        inside = False
        string_start = position = self._span.start
        held = b""  # of the string under way, while it is short, or a backslash whose partner is not read yet
        for chunk in self._chunks(self._span):
            data, at = held + chunk, 0
            base, held = position - len(held), b""
            position += len(chunk)
            while at < len(data):
                if not inside:
                    quote = data.find(b'"', at)
                    end = len(data) if quote < 0 else quote
                    skeleton.add(data[at:end])
                    at, inside, string_start = end + 1, quote >= 0, base + end + 1
                    continue
                match = _STRING_BODY.match(data, at)
                end = match.end() if match else at
                if end < len(data) and data[end : end + 1] == b'"':
                    self._close_string(skeleton, Span(string_start, base + end))
                    at, inside = end + 1, False
                else:
                    held, at = data[end:], len(data)
        if inside:
            raise BadRecord("malformed JSON: a string without its end")
        return skeleton

    def _close_string(self, skeleton: Skeleton, string: Span) -> None:
        if string.end - string.start <= self._limits.string:
            skeleton.add(b'"' + self._file.read(string.start, string.end - string.start) + b'"')
            return
        skeleton.add(msgspec.json.encode(_MARK.format(len(skeleton.strings))))
        skeleton.strings.append(string)

    def _plain(self, span: Span) -> Iterator[bytes]:
        """UTF-8 as it stands."""
        held = b""
        for chunk in self._chunks(span):
            data = held + chunk
            end = _whole_characters(data)
            if reason := bad_utf8(data[:end]):
                raise BadRecord(reason.partition(" at ")[0])
            yield data[:end]
            held = data[end:]
        if held:
            raise BadRecord("invalid UTF-8 at its end")

    def _unescaped(self, span: Span) -> Iterator[bytes]:
        """The text of a JSON string, between the quotes."""
        held = b""
        for chunk in self._chunks(span):
            data = held + chunk
            match = _ESCAPES.match(data)
            end = _whole_characters(data[: match.end() if match else 0])
            if len(data) - end > 2 * _LONGEST_ESCAPE:
                raise BadRecord("malformed JSON: a bad escape or a lone surrogate in a string")
            yield _decoded(data[:end])
            held = data[end:]
        if held:
            _decoded(held)  # raises with the better reason, if it knows one
            raise BadRecord("malformed JSON: a bad escape or a lone surrogate in a string")


def _decoded(body: bytes) -> bytes:
    try:
        return msgspec.json.decode(b'"' + body + b'"', type=str).encode()
    except UnicodeDecodeError:
        raise BadRecord("invalid UTF-8 in a string") from None
    except msgspec.DecodeError as error:
        what = str(error).removeprefix("JSON is malformed: ").partition(" (byte")[0]
        raise BadRecord("malformed JSON: " + what) from None


def _whole_characters(data: bytes) -> int:
    """Length of `data` without a character cut off at its end."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        needed = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return len(data) - back if needed > back else len(data)
    return len(data)


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"


def _cut(texts: Iterator[bytes], encode: Encode, limits: Limits) -> Iterator[bytes]:
    """Re-cut a stream of text at places that do not change ids."""
    held = b""
    for text in texts:
        held += text
        if len(held) < limits.piece:
            continue
        place = _place(held, encode)
        if place:
            yield held[:place]
            held = held[place:]
        elif len(held) >= limits.uncut:
            raise BadRecord(f"{_size(limits.uncut)} of text without a place between words to cut it")
    if held:
        yield held


def _place(text: bytes, encode: Encode) -> int:
    """The last place in `text` where a cut leaves the ids as they are; 0 if none was found."""
    last = len(text) - _WINDOW
    for pattern in _CUTS:
        for start in range(last - _STRETCH, -_STRETCH, -_STRETCH):
            stretch = pattern.finditer(text, max(1, start), start + _STRETCH)
            places = [match.start() for match in stretch]
            for place in reversed(places[-_CANDIDATES:]):
                if _harmless(text, place, encode):
                    return place
    return 0


def _harmless(text: bytes, place: int, encode: Encode) -> bool:
    left = text[max(0, place - _WINDOW) : place].decode(errors="ignore").encode()
    right = text[place : place + _WINDOW].decode(errors="ignore").encode()
    whole, first, second = encode([left + right, left, right])
    return whole == first + second
