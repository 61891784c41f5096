"""The base of every config section, and the ways in which a section says what it means and what it forbids.

A section is a frozen pydantic model that refuses unknown keys. It declares

- its fields, by `setting(default, "meaning", unit="…")`: what `megalith explain` prints;
- `foreign_keys`: keys that other toolkits (or older releases of them) write here, and what becomes of each;
- `implied(values)`: values that its own keys stand for (a preset), put beneath the keys typed beside them;
- `problems()`: combinations of values that cannot work, all of them, each with its fix.

Knows no section of its own: each lives with its owner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from megalith.errors import Problem

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding(Problem):
    """A problem that a section reports: `where` is a key relative to the section; a warning becomes a notice."""

    severity: Severity = "error"


def error(where: str, what: str, fix: str = "") -> Finding:
    """A combination of values that cannot work. The configuration is refused."""
    return Finding(where, what, fix, "error")


def warning(where: str, what: str, fix: str = "") -> Finding:
    """A combination that works but is probably not meant. Training goes on, with a notice."""
    return Finding(where, what, fix, "warning")


@dataclass(frozen=True)
class ForeignKey:
    """A key that is not ours: `renamed`, `ignored` (accepted without effect) or `refused`. Made by the functions below.

    `rewrite(value)` gives the keys to set instead: plain names are siblings, dotted names are full paths.
    """

    action: Literal["renamed", "ignored", "refused"]
    note: str
    rewrite: Callable[[Any], dict[str, Any]] | None = None
    to: str = ""
    silent: bool = False
    weak: bool = False
    harmless: tuple[Any, ...] = (None, False)


def renamed(to: str, note: str = "") -> ForeignKey:
    """The same value under our name: `to` is a sibling, or a full path when it has a dot."""
    return ForeignKey("renamed", note or f"is called {to} here", lambda value: {to: value}, to)


def translated(note: str, rewrite: Callable[[Any], dict[str, Any]], *, weak: bool = False) -> ForeignKey:
    """The value means other keys or other values here. `rewrite` may raise ValueError to refuse a value.

    A `weak` key gives way to ours in the same file; otherwise the two must not contradict each other.
    """
    return ForeignKey("renamed", note, rewrite, weak=weak)


def ignored(note: str, *, silent: bool = False) -> ForeignKey:
    """Accepted without effect, for the reason given; one notice a key unless `silent`."""
    return ForeignKey("ignored", note, silent=silent)


def refused(note: str, *, harmless: tuple[Any, ...] = ()) -> ForeignKey:
    """Refused, for the reason given, because going on would silently do something else.

    Null, false and the values of `harmless` ask for nothing and are let pass.
    """
    return ForeignKey("refused", note, harmless=(None, False, *harmless))


class Section(BaseModel):
    """A frozen config section. Unknown keys are refused; `compose` turns that into a did-you-mean."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=False,
        arbitrary_types_allowed=False,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        protected_namespaces=(),
    )

    foreign_keys: ClassVar[Mapping[str, ForeignKey]] = {}
    """Keys of other toolkits that may stand in this section."""
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Groups of keys of which one may be given: whoever gives one need not take back another that comes with Megalith."""
    packaged: ClassVar[str | None] = None
    """Of a root: the name of the packaged file that it starts from."""
    null_means: ClassVar[Mapping[str, Any] | None] = None
    """What the section holds when it is written as `null`; None: null is refused."""

    @classmethod
    def implied(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Values that `values` (this section's own keys in one file, or on the command line) stand for.

        They lie beneath that file's keys and above the files before it. Unknown names are left to the field's validator.
        """
        del values
        return {}

    def problems(self) -> Iterable[Problem]:
        """Every combination of this section's values that cannot work, or (as a `warning`) is probably not meant.

        Called on a section whose values all have the right type. `where` is relative to the section
        ("sched.warmup_steps"). The root's own method checks rules across sections.
        """
        return ()


def setting(default: Any = ..., meaning: str = "", *, unit: str = "", **constraints: Any) -> Any:
    """A field of a section.

    `default` is the value (omit it for a mandatory key, `???` in YAML), `meaning` one sentence, `unit` what a number
    counts ("steps", "samples", "tokens", "minutes"). `constraints` go to pydantic (`gt`, `ge`, `le`, `examples`, …).
    A mutable default (list, dict, section class) is copied for each instance.
    """
    extra: Any = {"unit": unit} if unit else None
    if callable(default) and default is not ...:
        return Field(default_factory=default, description=meaning, json_schema_extra=extra, **constraints)
    return Field(default, description=meaning, json_schema_extra=extra, **constraints)
