"""The command line: `key=value`, `+key=value`, `++key=value`, `~key`. Hydra's grammar, with its two traps taken out.

A value that the grammar cannot parse (a path with "=" in it), or that it takes for a sweep (900,50,50), is plain text:
nothing here runs a sweep. Knows no section: any key passes here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType, QuotedString
from hydra.errors import HydraException

from megalith.config.tree import Path
from megalith.errors import Problem

COMMAND_LINE = "command line"
_KEY = re.compile(r"^[A-Za-z_][\w-]*(?:\.[\w-]+)*$")


@dataclass(frozen=True)
class Override:
    """One argument: set `path` to `value`, or take `path` away (when `only_if` is given: only if it has that value)."""

    path: Path
    value: Any
    text: str
    delete: bool = False
    only_if: bool = False


def parse_overrides(arguments: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    """Every argument, and what is wrong with those that are not overrides."""
    parser = OverridesParser.create()
    found: list[Override] = []
    problems: list[Problem] = []
    for text in arguments:
        parsed = _parse(parser, text)
        if isinstance(parsed, Override):
            found.append(parsed)
        else:
            problems.append(parsed)
    return found, problems


def _parse(parser: OverridesParser, text: str) -> Override | Problem:
    said = f'"{text}" on the command line'
    key, equals, raw = text.partition("=")
    delete = key.startswith("~")
    name = key.strip().lstrip("~+").strip()
    if not text.strip():
        return Problem("an empty argument on the command line", "does nothing", "remove it")
    if not name and equals:
        return Problem(said, "has no key before the =", "model.hidden_size=768")
    if "@" in name or "/" in name:
        return Problem(
            said,
            "packages and config groups cannot be set like this",
            "write the dotted key: model.hidden_size=768",
        )
    if not _KEY.match(name):
        return Problem(said, _bad_key(name), "model.hidden_size=768")
    if not equals and not delete:
        return Problem(said, "is not key=value", f"{name}=VALUE to set it, ~{name} to go back to its default")
    path = tuple(name.split("."))
    if delete and not equals:
        return Override(path, None, text, delete=True)
    value = _value(parser, raw, said)
    if isinstance(value, Problem):
        return value
    return Override(path, value, text, delete=delete, only_if=delete)


def _value(parser: OverridesParser, raw: str, said: str) -> Any:
    try:
        override = parser.parse_override(f"key={raw}")
    except HydraException:
        return raw
    except RecursionError:
        return Problem(said, "is nested too deeply", "put it into a YAML file")
    if override.is_sweep_override():
        if re.match(r"^\s*(choice|range|interval|glob|shuffle|sort|tag)\s*\(", raw):
            return Problem(said, "is a sweep, and one run has one value", "start one run for each value")
        return raw
    if override.type is not OverrideType.CHANGE:
        return raw
    return _unquoted(override.value())


def _unquoted(value: Any) -> Any:
    """Plain Python values: keys of groups are texts, quoted strings lose their quotes."""
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, dict):
        return {str(_unquoted(k)): _unquoted(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_unquoted(v) for v in value]
    return value


def _bad_key(name: str) -> str:
    if "[" in name:
        return "sets an item of a list; a list is set as a whole: key=[a,b]"
    if " " in name:
        return "has a space in its key"
    return "is not a dotted key"
