"""Several sources → one tree of values, later sources over earlier ones, each value with its origin.

    file layers, command line ─ deletions ─ foreign keys ─ implied values ─ alternatives ─▶ merged tree + origins + notices

Knows sections only through their foreign keys, their `implied` values and their `alternatives`. Judges no value: `judge` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megalith.config.overrides import COMMAND_LINE, Override
from megalith.config.schema import ForeignKey, Section
from megalith.config.sources import Layer, Value
from megalith.config.suggest import suggest
from megalith.config.tree import (
    Path,
    describe_value,
    dotted,
    fields_of,
    get,
    is_section,
    leaves,
    put,
    remove,
    section_of,
    sections_of,
)
from megalith.errors import Problem


@dataclass
class Merged:
    """The values of all sources. `foreign` are keys of other toolkits as written, for interpolations that name them."""

    tree: dict[str, Any] = field(default_factory=dict)
    foreign: dict[str, Any] = field(default_factory=dict)
    origin: dict[Path, str] = field(default_factory=dict)
    notices: dict[Path, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    broken: set[Path] = field(default_factory=set)
    """Keys whose value was already reported and dropped."""
    packaged: set[Path] = field(default_factory=set)
    """Keys whose value comes with Megalith: nobody typed it."""

    def set(self, value: Value) -> None:
        """Put a value over what was there."""
        there = get(self.tree, value.path)
        if value.value == {} and isinstance(there, dict):
            return
        for i in range(1, len(value.path)):
            self.origin.pop(value.path[:i], None)
        if isinstance(there, dict):
            for old in [path for path in self.origin if path[: len(value.path)] == value.path]:
                del self.origin[old]
        put(self.tree, value.path, value.value)
        self.origin[value.path] = value.origin

    def drop(self, path: Path) -> None:
        """Take a value out."""
        remove(self.tree, path)
        self.origin.pop(path, None)

    def where(self, path: Path) -> str:
        """A key and where it was written, for messages."""
        origin = self.origin.get(path) or next(
            (said for key, said in self.origin.items() if key[: len(path)] == path), ""
        )
        return f"{dotted(path)} ({origin})" if origin else dotted(path)


def merge(root: type[Section], files: Sequence[Layer], overrides: Sequence[Override]) -> Merged:
    """All sources in one tree. Problems (contradicting names, refused keys) are collected, not raised."""
    merged = Merged()
    packaged = merged.packaged
    layers = [*files, Layer(COMMAND_LINE, ())]
    layers = _with_command_line(root, layers, overrides, merged)
    for layer in layers:
        values = list(_translate(root, layer, merged))
        tree: dict[str, Any] = {}
        for value in values:
            put(tree, value.path, value.value)
        own = {value.path for value in values}  # who takes the other back in so many words need not be told
        _give_way(root, tree, merged, packaged - own)
        for value in (*_implied(root, tree), *values):
            merged.set(value)
            (packaged.add if layer.packaged else packaged.discard)(value.path)
    return merged


def _give_way(root: type[Section], tree: dict[str, Any], merged: Merged, packaged: set[Path]) -> None:
    """Takes out values that come with Megalith and of which this layer gives an alternative."""
    for path, section in sections_of(root):
        for group in section.alternatives:
            given = [(*path, name) for name in group if get(tree, (*path, name)) is not None]
            others = [(*path, name) for name in group if (*path, name) not in given]
            for other in others if given else ():
                value = get(merged.tree, other)
                if other not in packaged or value is None:
                    continue
                what = f"{describe_value(value)} ({merged.origin[other]}) gives way to {dotted(given[0])}"
                merged.notices.setdefault(other, f"{dotted(other)}: {what}")
                merged.drop(other)


def _with_command_line(
    root: type[Section], layers: list[Layer], overrides: Sequence[Override], merged: Merged
) -> list[Layer]:
    """Apply deletions to what came before them; the rest is the last layer."""
    for override in overrides:
        if override.delete:
            kept = [
                replace(la, values=tuple(v for v in la.values if not _covers(override, v))) for la in layers
            ]
            last = next(
                (v for la in reversed(layers) for v in reversed(la.values) if v.path == override.path), None
            )
            problem = _deletion_problem(root, override, last, found=kept != layers)
            if problem:
                merged.problems.append(problem)
            else:
                layers = kept
            continue
        added = _flat(override.path, override.value)
        layers[-1] = Layer(COMMAND_LINE, (*layers[-1].values, *added))
    return layers


def _flat(path: Path, value: Any) -> tuple[Value, ...]:
    if isinstance(value, dict) and value:
        return tuple(Value(p, v, COMMAND_LINE) for p, v in leaves(value, path))
    return (Value(path, value, COMMAND_LINE),)


def _covers(override: Override, value: Value) -> bool:
    return value.path[: len(override.path)] == override.path


def _deletion_problem(
    root: type[Section], override: Override, last: Value | None, *, found: bool
) -> Problem | None:
    said = f'"{override.text}" on the command line'
    if not found and _class_at(root, override.path[:-1], override.path[-1]) is None:
        near = suggest(root, override.path)
        fix = f"did you mean ~{near[0]}?" if near else "remove it"
        return Problem(said, f"there is no key {dotted(override.path)} to remove", fix)
    if override.only_if and (last is None or last.value != override.value):
        now = describe_value(last.value) if last else "not set"
        return Problem(
            said, f"removes the key only if it has that value, but it is {now}", f"~{dotted(override.path)}"
        )
    return None


def _class_at(root: type[Section], parents: Path, leaf: str) -> type[Section] | None:
    """The section that has this key, or None when there is no such key."""
    section: type[Section] | None = root
    for part in parents:
        info = section.model_fields.get(part) if section else None
        section = section_of(info.annotation) if info else None
    return section if section and (leaf in section.model_fields or leaf in section.foreign_keys) else None


# ---- keys of other toolkits ----


def _translate(root: type[Section], layer: Layer, merged: Merged) -> Iterator[Value]:
    """The layer in our own keys. Notices are kept once a key."""
    typed = {value.path: value for value in layer.values}
    for value in layer.values:
        found = _foreign(root, value.path)
        if found is None:
            yield from _whole_section(root, value, merged)
            continue
        path, key = found
        put(merged.foreign, value.path, value.value)
        for ours in _apply(path, key, value, merged):
            there = typed.get(ours.path)
            if there is not None and there.value != ours.value and not key.weak:
                merged.problems.append(_contradiction(value, there))
            elif there is None:
                yield ours


def _foreign(root: type[Section], path: Path) -> tuple[Path, ForeignKey] | None:
    section = root
    for i, part in enumerate(path):
        info = section.model_fields.get(part)
        if info is None:
            key = section.foreign_keys.get(part)
            return (path[: i + 1], key) if key else None
        inner = section_of(info.annotation)
        if inner is None:
            return None
        section = inner
    return None


def _apply(path: Path, key: ForeignKey, value: Value, merged: Merged) -> Iterable[Value]:
    """What a foreign key becomes here; nothing when it has no effect or is refused."""
    where = f"{dotted(path)} ({value.origin})"
    if key.action == "refused":
        if len(path) != len(value.path) or value.value not in key.harmless:
            merged.problems.append(Problem(where, f"refused: {key.note}", f"remove it: ~{dotted(path)}"))
        return ()
    if key.action == "ignored":
        if not key.silent:
            merged.notices.setdefault(path, f"{dotted(path)} has no effect: {key.note}")
        return ()
    if key.rewrite is None:
        raise TypeError(f"{dotted(path)}: a renamed key needs a rewrite")
    if not key.to and isinstance(value.value, str) and "${" in value.value:
        merged.problems.append(
            Problem(where, f"{key.note}; it cannot be translated from ${{…}}", "write the value out")
        )
        return ()
    try:
        rewritten = key.rewrite(value.value)
    except (ValueError, TypeError) as problem:
        merged.problems.append(Problem(where, str(problem), "see `megalith explain " + dotted(path) + "`"))
        return ()
    merged.notices.setdefault(path, f"{dotted(path)} {key.note}")
    tail = value.path[len(path) :]
    return [Value((*_target(path, name), *tail), v, value.origin) for name, v in rewritten.items()]


def _target(path: Path, name: str) -> Path:
    return tuple(name.split(".")) if "." in name else (*path[:-1], name)


def _contradiction(foreign: Value, ours: Value) -> Problem:
    what = (
        f"means the same as {dotted(ours.path)}, which is also given ({ours.origin}), "
        f"and they differ: {describe_value(foreign.value)} and {describe_value(ours.value)}"
    )
    return Problem(f"{dotted(foreign.path)} ({foreign.origin})", what, "keep one of them")


def _whole_section(root: type[Section], value: Value, merged: Merged) -> Iterator[Value]:
    """A value where a section belongs: `exp_manager: null` as the values that it means, anything else reported."""
    info = dict(fields_of(root)).get(value.path)
    if info is None or not is_section(info.annotation) or value.value == {}:
        yield value
        return
    meant = info.annotation.null_means
    if value.value is None and meant is not None:
        yield from (Value(inner, v, value.origin) for inner, v in leaves(dict(meant), value.path))
        return
    key = dotted(value.path)
    what = f"is a section (a group of keys), not {describe_value(value.value)}"
    fix = f"{key}.KEY=VALUE sets a key in it; ~{key} goes back to its defaults"
    merged.problems.append(Problem(f"{key} ({value.origin})", what, fix))


# ---- implied values ----


def _implied(root: type[Section], tree: dict[str, Any]) -> Iterator[Value]:
    for path, section in sections_of(root):
        values = get(tree, path, tree if not path else None)
        if isinstance(values, dict):
            for inner, value in leaves(dict(section.implied(values))):
                yield Value((*path, *inner), value, _because(section, values, path))


def _because(section: type[Section], values: dict[str, Any], path: Path) -> str:
    """The origin of implied values: the keys of this layer that make the difference."""
    reasons = [k for k in values if not section.implied({n: v for n, v in values.items() if n != k})]
    return " and ".join(f"{dotted((*path, k))}={values[k]}" for k in reasons) or dotted(path)
