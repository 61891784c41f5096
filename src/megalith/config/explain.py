"""`megalith explain KEY`: what a key means, its unit, type, default, present value and where that came from.

Knows what sections say of themselves. Prints nothing: the command does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic.fields import FieldInfo

from megalith.config.compose import Gathered, preview
from megalith.config.layers import Merged
from megalith.config.schema import Section
from megalith.config.suggest import search, suggest
from megalith.config.tree import (
    Path,
    default_of,
    describe_field,
    dotted,
    fields_of,
    get,
    plain,
    section_of,
    sections_of,
)


@dataclass(frozen=True)
class KeyHelp:
    """One key: a value, or a section with its keys (`keys`: name, value, meaning)."""

    key: str
    meaning: str
    type: str = ""
    unit: str = ""
    default: str = ""
    value: str = ""
    origin: str = ""
    examples: tuple[str, ...] = ()
    keys: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True)
class Explanation:
    """What was found for a question: the key itself, or what becomes of a foreign key, or what may have been meant."""

    found: KeyHelp | None = None
    foreign: str = ""
    nearest: tuple[str, ...] = ()
    containing: tuple[KeyHelp, ...] = field(default=())


def explain(root: type[Section], question: str, gathered: Gathered) -> Explanation:
    """The answer for a dotted key ("" is the root), a key of another toolkit, or any text to search for."""
    path: Path = tuple(part for part in question.strip().split(".") if part)
    values = preview(root, gathered)
    section = _section_at(root, path)
    if section is not None:
        return Explanation(found=_section_help(path, section, values, _field_at(root, path)))
    info = _field_at(root, path)
    if info is not None:
        return Explanation(found=_help(path, info, values, gathered.merged))
    leaf = [key for key, _ in fields_of(root) if path and key[-1:] == path]
    if len(leaf) == 1:
        return explain(root, dotted(leaf[0]), gathered)
    note = _foreign(root, path)
    if note:
        return Explanation(foreign=note)
    hits = search(root, question)
    near = [key for key in suggest(root, path) if key not in hits]
    found = (
        _help(tuple(k.split(".")), _field_at(root, tuple(k.split("."))), values, gathered.merged)
        for k in hits
    )
    return Explanation(nearest=tuple(near), containing=tuple(found))


def _field_at(root: type[Section], path: Path) -> FieldInfo | None:
    return dict(fields_of(root)).get(path)


def _section_at(root: type[Section], path: Path) -> type[Section] | None:
    return dict(sections_of(root)).get(path)


def _help(path: Path, info: FieldInfo | None, values: dict[str, Any], merged: Merged) -> KeyHelp:
    if info is None:
        raise KeyError(dotted(path))
    if section_of(info.annotation):
        return KeyHelp(dotted(path), info.description or "", "a section")
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    return KeyHelp(
        key=dotted(path),
        meaning=info.description or "",
        type=describe_field(info),
        unit=str(extra.get("unit", "")),
        default=_shown(default_of(info)),
        value=_shown(get(values, path)),
        origin=merged.origin.get(path, "default"),
        examples=tuple(plain(e) for e in info.examples or ()),
    )


def _section_help(
    path: Path, section: type[Section], values: dict[str, Any], info: FieldInfo | None
) -> KeyHelp:
    keys = []
    for name, inner in section.model_fields.items():
        is_section = section_of(inner.annotation) is not None
        value = "…" if is_section else _shown(get(values, (*path, name)))
        keys.append((name + ("." if is_section else ""), value, inner.description or ""))
    about = (info.description if info else None) or (section.__doc__ or "").strip().splitlines()[0]
    return KeyHelp(dotted(path), about, "a section", keys=tuple(keys))


def _shown(value: Any) -> str:
    return "none: it must be given" if value == "???" else plain(value)


def _foreign(root: type[Section], path: Path) -> str:
    """What becomes of a key of another toolkit; its section may be left out."""
    for prefix, section in sections_of(root):
        key = section.foreign_keys.get(path[-1]) if path else None
        if key is None or (len(path) > 1 and path[:-1] != prefix):
            continue
        name = dotted((*prefix, path[-1]))
        if key.action == "renamed":
            return f"{name} {key.note}"
        if key.action == "ignored":
            return f"{name} is accepted without effect: {key.note}"
        return f"{name} is refused: {key.note}"
    return ""
