"""What stands in a pickle's content for a class that is not loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle only names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Stub:
    """An object that was never made: its class, what it was made with (`args`) and what it held (`state`).

    An enum has its value as its one argument, an `argparse.Namespace` its values in `state`, a subclass of dict or list its
    content in `pairs` or `entries`. It can do nothing.
    """

    module: str
    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    pairs: list[tuple[Any, Any]] = field(default_factory=list)
    entries: list[Any] = field(default_factory=list)

    def children(self) -> list[Any]:
        """Everything it holds."""
        return [self.args, self.state, *(side for pair in self.pairs for side in pair), *self.entries]

    def value(self, key: str, default: Any = None) -> Any:
        """One of its attributes as saved."""
        return self.state.get(key, default) if isinstance(self.state, dict) else default

    def __repr__(self) -> str:
        return f"<{self.module}.{self.name}, not loaded>"


Maker = Callable[[tuple[Any, ...]], Any]
"""What stands for a call of an allowed name: gets its arguments, raises `PickleError` where they are not as expected."""
