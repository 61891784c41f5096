"""The shape of a configuration: paths, the schema's fields by path, and types in plain words.

Knows pydantic's field descriptions. Refuses to know files, the command line and any particular section.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megalith.config.schema import Section

Path = tuple[str, ...]
"""A key as its parts: ("model", "optim", "lr")."""


def dotted(path: tuple[Any, ...]) -> str:
    """model.optim.lr"""
    return ".".join(str(part) for part in path)


def leaves(tree: Mapping[str, Any], prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every value that is not a group of keys; an empty group counts as a value."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*prefix, str(key)))
        else:
            yield (*prefix, str(key)), value


def get(tree: Any, path: Path, default: Any = None) -> Any:
    """The value at a path, or `default`."""
    for part in path:
        if not isinstance(tree, Mapping) or part not in tree:
            return default
        tree = tree[part]
    return tree


def put(tree: dict[str, Any], path: Path, value: Any) -> None:
    """Set a value; a group of keys on the way is made where there is none."""
    for part in path[:-1]:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[path[-1]] = value


def remove(tree: dict[str, Any], path: Path) -> bool:
    """Take a value (or a whole group) out; False when it was not there."""
    parent = get(tree, path[:-1], tree) if path[:-1] else tree
    if not isinstance(parent, dict) or path[-1] not in parent:
        return False
    del parent[path[-1]]
    return True


def section_of(annotation: Any) -> type[Section] | None:
    """The section class that a field holds (`Section`, or `Section | None`), or None for an ordinary value."""
    if is_section(annotation):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):
        found = [section_of(a) for a in get_args(annotation)]
        return next((s for s in found if s), None)
    return None


def is_section(annotation: Any) -> TypeGuard[type[Section]]:
    """Always a section, never null: one that is there even when nothing is written in it."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def fields_of(section: type[Section], prefix: Path = ()) -> Iterator[tuple[Path, FieldInfo]]:
    """Every field of a section and of the sections within, sections first, in the order they are written."""
    for name, info in section.model_fields.items():
        yield (*prefix, name), info
        inner = section_of(info.annotation)
        if inner:
            yield from fields_of(inner, (*prefix, name))


def sections_of(section: type[Section], prefix: Path = ()) -> Iterator[tuple[Path, type[Section]]]:
    """The section itself and every section within."""
    yield prefix, section
    for name, info in section.model_fields.items():
        inner = section_of(info.annotation)
        if inner:
            yield from sections_of(inner, (*prefix, name))


def default_of(info: FieldInfo) -> Any:
    """A field's default as plain values; "???" when the key is mandatory."""
    value = info.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return "???"
    return value.model_dump(mode="json") if isinstance(value, Section) else value


def defaults_of(section: type[Section]) -> dict[str, Any]:
    """The whole tree of defaults, "???" where a key is mandatory."""
    tree: dict[str, Any] = {}
    for name, info in section.model_fields.items():
        tree[name] = defaults_of(info.annotation) if is_section(info.annotation) else default_of(info)
    return tree


# ---- types and values in plain words ----

WORDS: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    bool: ("true or false", "true or false"),
    type(None): ("null", "nulls"),
    dict: ("a group of keys", "groups of keys"),
    list: ("a list", "lists"),
    FilePath: ("a path", "paths"),
    Any: ("any value", "any values"),
}


def describe(annotation: Any, *, many: bool = False) -> str:
    """A type as a user would say it: "a whole number or null", "one of adam, sgd", "a list of numbers"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe(arguments[0], many=many) + limits(arguments[1:])
    if origin is Literal:
        return ("" if many or len(arguments) == 1 else "one of ") + ", ".join(plain(a) for a in arguments)
    if origin in (Union, types.UnionType):
        words = [describe(a, many=many) for a in arguments if a is not type(None)]
        words += ["null"] * (type(None) in arguments)
        return " or ".join(dict.fromkeys(words))
    if origin is tuple and arguments[-1:] != (...,):
        kinds = dict.fromkeys(describe(a, many=True) for a in arguments)
        return f"a list of {len(arguments)} {' and '.join(kinds)}"
    if origin in (list, tuple, set, frozenset) or getattr(origin, "__name__", "") in ("Sequence", "Iterable"):
        return ("lists of " if many else "a list of ") + describe(arguments[0], many=True)
    if section_of(annotation):
        return "a section (a group of keys)"
    words_of = WORDS.get(origin or annotation) or WORDS.get(annotation)
    return words_of[many] if words_of else getattr(annotation, "__name__", str(annotation))


def limits(metadata: tuple[Any, ...] | list[Any]) -> str:
    """Bounds of a field in words: " of at least 1", " above 0 and below 1"."""
    said = {
        "ge": "of at least",
        "gt": "above",
        "le": "of at most",
        "lt": "below",
        "multiple_of": "a multiple of",
    }
    bounds = [
        f"{words} {plain(bound)}"
        for item in metadata
        for name, words in said.items()
        if (bound := getattr(item, name, None)) is not None
    ]
    return f" {' and '.join(bounds)}" if bounds else ""


def describe_field(info: FieldInfo) -> str:
    """The type of a field with its bounds: "a whole number of at least 1, or null"."""
    words, bounds = describe(info.annotation), limits(info.metadata)
    if bounds and words.endswith(" or null"):
        return words.removesuffix(" or null") + bounds + ", or null"
    return words + bounds


def plain(value: Any) -> str:
    """A value as YAML would show it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(plain(v) for v in value) + "]"
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {plain(v)}" for k, v in value.items()) + "}"
    return str(value)


def shorten(text: str, width: int = 60) -> str:
    """One line of at most `width` characters."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def describe_value(value: Any) -> str:
    """A value with its kind: `the text "big"`, `the list [1, 2]`, `3`."""
    if isinstance(value, str):
        return f'the text "{shorten(value)}"' if value else "an empty text"
    if isinstance(value, Mapping):
        return (
            f"a group of keys ({shorten(', '.join(map(str, value)))})" if value else "an empty group of keys"
        )
    if isinstance(value, list | tuple):
        return f"the list {shorten(plain(value))}"
    return plain(value)
