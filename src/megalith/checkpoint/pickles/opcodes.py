"""The instructions of pickles: how many bytes follow each, and what plain value those bytes are.

Written from the description of protocols 0 to 5 in Python's `pickletools`. Knows bytes and plain values; runs nothing.
Strings of Python 2 (`U`, `T`, `S`) were text or bytes, nobody knows: ASCII is read as text, anything else stays bytes.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

from megalith.checkpoint.pickles.source import PickleError, Stream

MAX_TEXT = 1 << 28
"""Bytes of one string or byte string."""
MAX_LONG = 1 << 10
"""Bytes of one whole number."""

_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|.?)", re.DOTALL)
_ESCAPES = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"\\": b"\\", b"'": b"'", b'"': b'"'}

Reader = Callable[[Stream], Any]


def _number(form: str) -> Reader:
    layout = struct.Struct("<" + form)
    return lambda stream: layout.unpack(stream.take(layout.size))[0]


def _bytes(form: str) -> Reader:
    count_of = _number(form)

    def read(stream: Stream) -> bytes:
        count = count_of(stream)
        if not 0 <= count <= MAX_TEXT:
            raise PickleError(f"a string of {count} bytes; {MAX_TEXT} are read at most")
        return stream.take(count)

    return read


def _text(form: str) -> Reader:
    content = _bytes(form)
    return lambda stream: content(stream).decode("utf-8", "surrogatepass")


def _either(content: bytes) -> str | bytes:
    return content.decode("ascii") if content.isascii() else content


def _old(form: str) -> Reader:
    content = _bytes(form)
    return lambda stream: _either(content(stream))


def _long(form: str) -> Reader:
    count_of = _number(form)

    def read(stream: Stream) -> int:
        count = count_of(stream)
        if not 0 <= count <= MAX_LONG:
            raise PickleError(f"a whole number of {count} bytes; {MAX_LONG} are read at most")
        return int.from_bytes(stream.take(count), "little", signed=True)

    return read


def _line(stream: Stream) -> str:
    return stream.line().decode("ascii")


def _int_line(stream: Stream) -> int | bool:
    line = stream.line()
    return line == b"01" if line in (b"00", b"01") else _digits(line)


def _digits(line: bytes) -> int:
    if len(line) > MAX_LONG:
        raise PickleError(f"a whole number of {len(line)} digits; {MAX_LONG} are read at most")
    return int(line.removesuffix(b"L"))


def _quoted(stream: Stream) -> str | bytes:
    line = stream.line().strip()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise PickleError("a string without its quotes")
    return _either(_ESCAPE.sub(_unescaped, line[1:-1]))


def _unescaped(found: re.Match[bytes]) -> bytes:
    code = found[1]
    if code[:1] == b"x":
        return bytes([int(code[1:], 16)])
    if code not in _ESCAPES:
        raise PickleError(f"a string with the escape {code!r}")
    return _ESCAPES[code]


def _pair(stream: Stream) -> tuple[str, str]:
    return stream.line().decode("utf-8"), stream.line().decode("utf-8")


def _none(stream: Stream) -> None:
    return None


ARGUMENTS: dict[int, Reader] = {
    **dict.fromkeys(b".(012NRabd}elo]Qst)u\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94\x97\x98", _none),
    **dict.fromkeys(b"Khq\x80\x82", _number("B")),
    **dict.fromkeys(b"M\x83", _number("H")),
    **dict.fromkeys(b"J\x84", _number("i")),
    **dict.fromkeys(b"jr", _number("I")),
    **dict.fromkeys(b"ci", _pair),
    **dict.fromkeys(b"gp", lambda stream: _digits(stream.line())),
    ord("F"): lambda stream: float(stream.line()),
    ord("G"): lambda stream: struct.unpack(">d", stream.take(8))[0],
    ord("I"): _int_line,
    ord("L"): lambda stream: _digits(stream.line()),
    ord("P"): _line,
    ord("S"): _quoted,
    ord("T"): _old("i"),
    ord("U"): _old("B"),
    ord("V"): lambda stream: stream.line().decode("raw-unicode-escape"),
    ord("X"): _text("I"),
    0x8C: _text("B"),
    0x8D: _text("Q"),
    ord("B"): _bytes("I"),
    ord("C"): _bytes("B"),
    0x8E: _bytes("Q"),
    0x96: _bytes("Q"),
    0x8A: _long("B"),
    0x8B: _long("i"),
    0x95: _number("Q"),
}
"""Opcode → what reads its argument."""
