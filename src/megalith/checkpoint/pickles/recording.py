"""Every name that the pickles of a file mention, whatever they are, and what loading them would do.

The machine runs them in a world where every name stands for nothing and every call gives a stub. Where it cannot go on (a
damaged file, or one made to stop it), the rest is read instruction by instruction.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from megalith.checkpoint.pickles.machine import Machine
from megalith.checkpoint.pickles.names import Verdict, verdict
from megalith.checkpoint.pickles.opcodes import ARGUMENTS
from megalith.checkpoint.pickles.reader import LEGACY
from megalith.checkpoint.pickles.source import PickleError, Refused, Stream, printable
from megalith.checkpoint.pickles.stub import Name, Stub
from megalith.checkpoint.pickles.world import inert

MAX_NAMES = 10_000
BROKEN = (ValueError, TypeError, LookupError, ArithmeticError)
"""What reading malformed bytes raises, `PickleError` among them."""
_DOTTED = re.compile(r"\w[\w.]*", re.ASCII)


@dataclass
class Recording:
    """`names` → what each would do."""

    names: dict[str, Verdict] = field(default_factory=dict)

    def find(self, module: str, name: str) -> Any:
        """Notes a name."""
        self.note(f"{module}.{name}", verdict(module, name))
        return Name(module, name)

    def note(self, name: str, found: Verdict) -> None:
        """Notes what a name would do; the worst counts."""
        name = printable(name)
        if len(self.names) < MAX_NAMES and self.names.get(name) is not Verdict.RUNS:
            self.names[name] = found

    def call(self, made_by: Any, args: tuple[Any, ...]) -> Any:
        """Notes a call that is worse than its name: of what another call gave, or one that reaches into something."""
        if not isinstance(made_by, Name):
            called = (
                f"{made_by.module}.{made_by.name}" if isinstance(made_by, Stub) else type(made_by).__name__
            )
            self.note(f"a call of what {called} gave", Verdict.RUNS)
            return Stub("", called)
        if verdict(made_by.module, made_by.name) is Verdict.INERT:
            try:
                return inert(made_by, args)
            except Refused as error:
                self.note(error.name, Verdict.RUNS)
        return Stub(made_by.module, made_by.name, args)

    def build(self, made: Any, state: Any) -> Any:
        """Nothing comes of a state."""
        return made

    def extend(self, made: Any, items: list[Any], *, pairs: bool) -> None:
        """Nor of items."""

    def outside(self, reference: Any) -> Any:
        """Nor of a storage."""
        return Stub("", "storage")


def record(stream: Stream, world: Recording, *, alone: bool = False) -> str:
    """Notes every name of the pickles that follow one another in a stream; what kept them from being read, or nothing.

    `alone`: there is only one. The raw storages of a legacy file are no pickles, and are not looked at.
    """
    try:
        first = Machine(stream, world).run()
        if type(first) is int and first == LEGACY:
            for _ in range(4):
                Machine(stream, world).run()
        elif alone and stream.left:
            return f"{stream.left} bytes follow its pickle"
        else:
            while stream.left:
                Machine(stream, world).run()
    except Refused as error:
        world.note(error.name, Verdict.RUNS)
        _rest(stream, world)
    except BROKEN as error:
        _rest(stream, world)
        return str(error) if isinstance(error, PickleError) else f"malformed ({printable(str(error))})"
    return ""


def _rest(stream: Stream, world: Recording) -> None:
    """Names in the instructions that follow, without running them: until the bytes are no instructions any more."""
    texts = ["", ""]
    try:
        while stream.left:
            code = stream.take(1)[0]
            argument = ARGUMENTS[code](stream)
            if isinstance(argument, str):
                texts = [texts[1], argument]
            if code in b"ci":
                _note(world, *argument)
            elif code == 0x93:
                _note(world, *texts)
    except BROKEN:
        return


def _note(world: Recording, module: str, name: str) -> None:
    if _DOTTED.fullmatch(module) and _DOTTED.fullmatch(name):
        world.find(module, name)
