"""The stack machine that a pickle is a program for, with everything that could run code taken out.

    opcodes ─▶ plain values, lists, dicts, tuples ─▶ content
    a name, a call, a state, an outside reference ─▶ the `World` decides; the machine knows no module and imports none

Knows the protocols 0 to 5 and how much a pickle may ask for. Knows nothing of torch. An own machine rather than Python's with
`find_class` replaced: that one calls `__setstate__`, `append` and `extend` of whatever it made, and has no limits.
"""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import Any, Protocol

from megalith.checkpoint.pickles.keys import as_key, fill
from megalith.checkpoint.pickles.opcodes import ARGUMENTS
from megalith.checkpoint.pickles.source import PickleError, Refused, Stream

FREE_OBJECTS, BYTES_PER_OBJECT, MAX_OBJECTS = 200_000, 4, 6_000_000
"""Containers and calls of a pickle: so many are always allowed, then one for so many bytes of it, and never more than that."""
FREE_COPIES, COPIES_PER_BYTE = 1 << 20, 2
"""Values and bytes handed to calls and states: each may copy them, and one that is shared could be copied for ever."""
MAX_STACK = 250_000
"""Values on the stack at once: a pickler puts a tuple's there, and of a list or a dict a thousand at a time."""
MEMO_GAP = 16
"""How far ahead of the last a memo number may be: picklers count one by one."""

_MARK, _HOLE = object(), object()
_CONSTANTS = {ord("N"): None, 0x88: True, 0x89: False}
_VALUES = frozenset(b"FGIJKLMSTUVXBC\x8a\x8b\x8c\x8d\x8e")


class World(Protocol):
    """What names and calls mean."""

    def find(self, module: str, name: str) -> Any:
        """What a name stands for. Raises `Refused`."""
        ...

    def call(self, made_by: Any, args: tuple[Any, ...]) -> Any:
        """What a call gives. Raises `Refused`."""
        ...

    def build(self, made: Any, state: Any) -> Any:
        """`made` with its state: itself, or what stands for it from now on."""
        ...

    def extend(self, made: Any, items: list[Any], *, pairs: bool) -> None:
        """Adds items (or pairs of key and value) to something that is no list, dict or set."""
        ...

    def outside(self, reference: Any) -> Any:
        """What a reference out of the pickle stands for."""
        ...


class Machine:
    """Runs one pickle of a stream."""

    def __init__(self, stream: Stream, world: World) -> None:
        self._stream, self._world = stream, world
        self._stack: list[Any] = []
        self._memo: list[Any] = []
        self._left = min(MAX_OBJECTS, FREE_OBJECTS + stream.left // BYTES_PER_OBJECT)
        self._copies = FREE_COPIES + stream.left * COPIES_PER_BYTE
        self._does = self._actions()

    def run(self) -> Any:
        """Its content. Raises `PickleError`, and `Refused` before anything that would run is reached."""
        stream, stack, does = self._stream, self._stack, self._does
        while True:
            code = stream.take(1)[0]
            if code == 0x2E:
                break
            read = ARGUMENTS.get(code)
            if read is None:
                raise PickleError(f"byte {stream.position - 1} is {code:#x}, which is no instruction")
            argument = read(stream)
            if code in _VALUES:
                stack.append(argument)
            elif code in _CONSTANTS:
                stack.append(_CONSTANTS[code])
            else:
                does[code](argument)
            if len(stack) > MAX_STACK:
                raise PickleError(f"it puts more than {MAX_STACK} values on the stack")
        if len(stack) != 1:
            raise PickleError(f"it ends with {len(stack)} values")
        return self._pop()

    def _actions(self) -> dict[int, Callable[[Any], None]]:
        push = self._push
        return {
            ord("("): lambda _: self._stack.append(_MARK),
            ord("0"): lambda _: self._drop(),
            ord("1"): lambda _: self._above().clear(),
            ord("2"): lambda _: self._stack.append(self._top()),
            ord("]"): lambda _: push([]),
            ord("}"): lambda _: push({}),
            ord(")"): lambda _: self._stack.append(()),
            0x8F: lambda _: push(set()),
            ord("l"): lambda _: push(self._above()),
            ord("d"): lambda _: push(fill({}, self._above())),
            ord("t"): lambda _: push(tuple(self._above())),
            0x91: lambda _: push(frozenset(map(as_key, self._above()))),
            0x85: lambda _: push(tuple(self._last(1))),
            0x86: lambda _: push(tuple(self._last(2))),
            0x87: lambda _: push(tuple(self._last(3))),
            ord("a"): lambda _: self._append([self._pop()]),
            ord("e"): lambda _: self._append(self._above()),
            ord("s"): lambda _: self._set(self._last(2)),
            ord("u"): lambda _: self._set(self._above()),
            0x90: lambda _: self._add(self._above()),
            ord("c"): lambda name: push(self._world.find(*name)),
            0x93: lambda _: push(self._named(*self._last(2))),
            ord("R"): lambda _: self._call(*self._last(2)),
            0x81: lambda _: self._call(*self._last(2)),
            0x92: lambda _: self._call_with_names(*self._last(3)),
            ord("i"): lambda name: self._call(self._world.find(*name), tuple(self._above())),
            ord("o"): lambda _: self._call_above(self._above()),
            ord("b"): lambda _: self._build(self._pop()),
            ord("P"): lambda reference: push(self._world.outside(reference)),
            ord("Q"): lambda _: push(self._world.outside(self._pop())),
            **dict.fromkeys(b"hjg", self._get),
            **dict.fromkeys(b"qrp", self._put),
            0x94: lambda _: self._put(len(self._memo)),
            **dict.fromkeys(b"\x80\x95", lambda _: None),
            0x96: lambda content: push(bytearray(content)),
            **dict.fromkeys(b"\x82\x83\x84", _extension),
            **dict.fromkeys(b"\x97\x98", _buffer),
        }  # fmt: skip

    def _push(self, value: Any) -> None:
        self._left -= 1
        if self._left < 0:
            raise PickleError("it makes more objects than are read of a pickle of its length")
        self._stack.append(value)

    def _top(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise PickleError("it takes a value from an empty stack")
        return self._stack[-1]

    def _pop(self) -> Any:
        self._top()
        return self._stack.pop()

    def _drop(self) -> None:
        if not self._stack:
            raise PickleError("it takes a value from an empty stack")
        self._stack.pop()

    def _last(self, count: int) -> list[Any]:
        return [self._pop() for _ in range(count)][::-1]

    def _above(self) -> list[Any]:
        """Takes what lies above the last mark, and the mark."""
        above: list[Any] = []
        while self._stack:
            value = self._stack.pop()
            if value is _MARK:
                return above[::-1]
            above.append(value)
        raise PickleError("it goes back to a mark that it never made")

    def _append(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) is list:
            target.extend(items)
        else:
            self._world.extend(target, items, pairs=False)

    def _set(self, flat: list[Any]) -> None:
        target = self._top()
        if isinstance(target, dict):
            fill(target, flat)
        else:
            self._world.extend(target, list(fill({}, flat).items()), pairs=True)

    def _add(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) is not set:
            raise PickleError("it adds items to something that is no set")
        target.update(map(as_key, items))

    def _named(self, module: Any, name: Any) -> Any:
        if type(module) is not str or type(name) is not str:
            raise PickleError("it names something by other than text")
        return self._world.find(module, name)

    def _call(self, made_by: Any, args: Any) -> None:
        if type(args) is not tuple:
            raise PickleError("it calls something with other than a tuple")
        self._charge(args)
        self._push(self._world.call(made_by, args))

    def _charge(self, values: Any) -> None:
        self._copies -= sum(len(each) for each in values if isinstance(each, Sized))
        if self._copies < 0:
            raise PickleError("it copies more than a pickle of its length explains")

    def _call_with_names(self, made_by: Any, args: Any, named: Any) -> None:
        if type(args) is not tuple or type(named) is not dict:
            raise PickleError("it calls something with other than a tuple and names")
        self._call(made_by, (*args, named) if named else args)

    def _call_above(self, above: list[Any]) -> None:
        if not above:
            raise PickleError("it makes an object of nothing")
        self._call(above[0], tuple(above[1:]))

    def _build(self, state: Any) -> None:
        made = self._pop()
        self._charge(state if type(state) is tuple else ())
        after = self._world.build(made, state)
        self._stack.append(after)
        if after is not made:  # the memo got it just before its state
            for number in range(max(0, len(self._memo) - 64), len(self._memo)):
                if self._memo[number] is made:
                    self._memo[number] = after

    def _get(self, number: int) -> None:
        if not 0 <= number < len(self._memo) or self._memo[number] is _HOLE:
            raise PickleError(f"it takes number {number} from its memo, which is not there")
        self._stack.append(self._memo[number])

    def _put(self, number: int) -> None:
        gap = number - len(self._memo)
        if not number >= 0 or gap > MEMO_GAP:
            raise PickleError(f"it goes from {len(self._memo)} to {number} in its memo")
        self._memo.extend([_HOLE] * (gap + 1))
        self._memo[number] = self._top()


def _extension(code: int) -> None:
    raise Refused(f"number {code} of the extension registry (copyreg)")


def _buffer(_: None) -> None:
    raise PickleError("it refers to a buffer that lies outside the file")
