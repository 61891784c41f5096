"""The tree of values against the sections: every unknown key, wrong type, missing value and impossible combination.

pydantic judges; this page translates its verdict into plain words. When values are wrong, the rest is still checked for
combinations: wrong values are replaced by stand-ins, and findings that mention them are left out.
"""

from __future__ import annotations

import copy
import re
import types
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from megalith.config.layers import Merged
from megalith.config.schema import Finding, Section
from megalith.config.suggest import suggest
from megalith.config.tree import (
    Path,
    default_of,
    describe_field,
    describe_value,
    dotted,
    fields_of,
    get,
    is_section,
    leaves,
    plain,
    put,
    remove,
    section_of,
)
from megalith.errors import Problem


def judge(root: type[Section], merged: Merged) -> Section | None:
    """The configuration, or None with everything that is wrong added to `merged.problems`. Warnings become notices."""
    _none_as_null(root, merged)
    _unset(root, merged)
    _open_sections(root, merged.tree)
    broken = set(merged.broken)
    for path, problem in _verdict(root, merged.tree, merged):
        if path not in broken:
            merged.problems.append(problem)
            broken.add(path)
    config = _mended(root, merged.tree, broken) if broken else root.model_validate(merged.tree)
    if config is not None:
        _report(config, merged, broken)
    return None if merged.problems else config


def _none_as_null(root: type[Section], merged: Merged) -> None:
    """`key=None` is Python; where the key takes null, that is what was meant."""
    for path, info in fields_of(root):
        if get(merged.tree, path) == "None" and type(None) in get_args(info.annotation):
            put(merged.tree, path, None)
            merged.notices.setdefault(path, f"{dotted(path)}: None is read as null")


def _unset(root: type[Section], merged: Merged) -> None:
    """`???` says that a value must come from elsewhere; nothing did."""
    known = dict(fields_of(root))
    for path, value in list(leaves(merged.tree)):
        if value == "???":
            fix = f"{dotted(path)}={_placeholder(known.get(path))} on the command line, or in a YAML file"
            merged.problems.append(
                Problem(merged.where(path), "has no value yet, and it must have one (???)", fix)
            )
            merged.broken.add(path)
            merged.drop(path)


def _open_sections(section: type[Section], tree: dict[str, Any]) -> None:
    """A section that nobody mentions is empty, not missing: its mandatory keys are what is missing."""
    for name, info in section.model_fields.items():
        if is_section(info.annotation) and isinstance(tree.setdefault(name, {}), dict):
            _open_sections(info.annotation, tree[name])


# ---- pydantic's verdict in plain words ----


def _verdict(root: type[Section], tree: dict[str, Any], merged: Merged) -> Iterator[tuple[Path, Problem]]:
    """One problem a key, in the order of the schema."""
    for path, info in fields_of(root):
        if _truth_for_number(info, get(tree, path)):
            yield path, _wrong_value(merged, path, info, get(tree, path))
    try:
        root.model_validate(tree)
    except ValidationError as failure:
        grouped: dict[Path, list[ErrorDetails]] = {}
        for item in failure.errors(include_url=False):
            grouped.setdefault(_key(root, item["loc"], item["type"]), []).append(item)
        for path, items in grouped.items():
            yield path, _problem(root, path, items, merged)


def _key(root: type[Section], loc: tuple[int | str, ...], kind: str) -> Path:
    """The key that an error location means: without the list indices and union branches behind it."""
    section: type[Section] | None = root
    path: Path = ()
    for part in loc:
        if section is None:
            break
        info = section.model_fields.get(str(part))
        if info is None:
            return (*path, str(part)) if kind == "extra_forbidden" else path
        path = (*path, str(part))
        section = section_of(info.annotation)
    return path


def _problem(root: type[Section], path: Path, items: list[ErrorDetails], merged: Merged) -> Problem:
    kinds = {item["type"] for item in items}
    if "extra_forbidden" in kinds:
        return _unknown(root, path, merged)
    info = dict(fields_of(root)).get(path)
    if "missing" in kinds and (info is None or get(merged.tree, path) is None):
        fix = f"{dotted(path)}={_placeholder(info)} on the command line, or in a YAML file"
        what = "has no value, and it must have one"
        meaning = f" ({info.description.rstrip('.')})" if info and info.description else ""
        return Problem(merged.where(path), what + meaning, fix)
    said = [_said(item) for item in items if item["type"] in ("value_error", "assertion_error")]
    if said:
        what, _, fix = " ".join(said).partition("\n")
        return Problem(
            merged.where(path) if path else "configuration", what, fix.removeprefix("fix:").strip()
        )
    value = get(merged.tree, path)
    if info is None or section_of(info.annotation):
        fix = f"{dotted(path)}.KEY=VALUE sets a key in it; ~{dotted(path)} goes back to its defaults"
        return Problem(
            merged.where(path), f"is a section (a group of keys), not {describe_value(value)}", fix
        )
    return _wrong_value(merged, path, info, value)


def _wrong_value(merged: Merged, path: Path, info: FieldInfo, value: Any) -> Problem:
    what = f"expected {describe_field(info)}, got {describe_value(value)}"
    return Problem(merged.where(path), what, _fix(path, info, value))


def _fix(path: Path, info: FieldInfo, value: Any) -> str:
    choices = [plain(c) for c in _choices(info.annotation)]
    near = get_close_matches(str(value).lower(), [c.lower() for c in choices], n=1, cutoff=0.5)
    if near:
        meant = next(c for c in choices if c.lower() == near[0])
        return f"did you mean {dotted(path)}={meant}?"
    kinds = {get_origin(a) or a for a in _branches(info.annotation)}
    if isinstance(value, str) and kinds & {list, tuple}:
        if value.startswith("["):
            return "quote items that hold = or other signs: " + f"\"{dotted(path)}=['a=b',c]\""
        return f"a list is written {dotted(path)}=[{value}]"
    if isinstance(value, str) and re.fullmatch(r"[\d_.,]+[kKmMbB]?", value) and kinds & {int, float}:
        return "write the number out, without commas and letters"
    return ""


def _placeholder(info: FieldInfo | None) -> str:
    kinds = {get_origin(b) or b for b in _branches(info.annotation)} if info else set()
    return "[…]" if kinds & {list, tuple} else "…"


def _said(item: ErrorDetails) -> str:
    problem = item.get("ctx", {}).get("error")
    return str(problem) if problem is not None else item["msg"]


def _unknown(root: type[Section], path: Path, merged: Merged) -> Problem:
    value = get(merged.tree, path)
    full = path
    while isinstance(value, dict) and len(value) == 1:
        key = next(iter(value))
        full, value = (*full, key), value[key]
    if "." in path[-1]:
        return Problem(
            merged.where(path), "has dots in its name", "in a YAML file keys are nested: one level a line"
        )
    near = suggest(root, path) if full == path else (suggest(root, full) or suggest(root, path))
    what = "is not a section" if isinstance(get(merged.tree, path), dict) else "is not a key"
    if near:
        return Problem(merged.where(full), what, f"did you mean {' or '.join(near)}?")
    parent = dotted(path[:-1])
    names = ", ".join(get_close_matches(path[-1], _names(root, path[:-1]), n=4, cutoff=0.4))
    listing = f"`megalith explain {parent}`" if parent else "`megalith explain`"
    return Problem(
        merged.where(full), what, f"{listing} lists the keys" + (f" (there are {names})" if names else "")
    )


def _names(root: type[Section], path: Path) -> list[str]:
    return [key[-1] for key, _ in fields_of(root) if key[:-1] == path]


def _branches(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _branches(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [b for a in get_args(annotation) for b in _branches(a)]
    return [annotation]


def _choices(annotation: Any) -> list[Any]:
    return [c for b in _branches(annotation) if get_origin(b) is Literal for c in get_args(b)]


def _truth_for_number(info: FieldInfo, value: Any) -> bool:
    """true where a number is wanted: pydantic would read 1."""
    branches = _branches(info.annotation)
    return (
        isinstance(value, bool)
        and bool({int, float} & set(branches))
        and bool not in branches
        and value not in [c for c in _choices(info.annotation) if isinstance(c, bool)]
    )


# ---- combinations ----


def _report(config: Section, merged: Merged, broken: set[Path]) -> None:
    """Ask every section for its findings, each once; leave out those about keys that are wrong anyway."""
    doubtful = {path[-1] for path in broken}
    told: set[tuple[Path, str]] = set()
    for path, section in _sections(config, ()):
        for found in section.problems():
            where = (*path, *found.where.split(".")) if found.where else path
            words = set(re.findall(r"\w+", f"{dotted(where)} {found.what} {found.fix}"))
            if words & doubtful or (where, found.what) in told:
                continue
            told.add((where, found.what))
            if isinstance(found, Finding) and found.severity == "warning":
                fix = f" ({found.fix})" if found.fix else ""
                merged.notices.setdefault((*where, found.what), f"{dotted(where)}: {found.what}{fix}")
            else:
                merged.problems.append(Problem(merged.where(where), found.what, found.fix))


def _sections(section: Section, path: Path) -> Iterator[tuple[Path, Section]]:
    for name in type(section).model_fields:
        inner = getattr(section, name)
        if isinstance(inner, Section):
            yield from _sections(inner, (*path, name))
    yield path, section


def _mended(root: type[Section], tree: dict[str, Any], broken: set[Path]) -> Section | None:
    """The configuration with stand-ins for what is wrong; None when even that does not hold together."""
    tree = copy.deepcopy(tree)
    known = dict(fields_of(root))
    for path in broken:
        if path:
            remove(tree, path)
    _open_sections(root, tree)
    for path, info in known.items():
        parent = get(tree, path[:-1]) if path[:-1] else tree
        mandatory = section_of(info.annotation) is None and default_of(info) == "???"
        if mandatory and isinstance(parent, dict) and path[-1] not in parent:
            put(tree, path, _stand_in(info.annotation))
    try:
        return root.model_validate(tree)
    except ValidationError:
        return None


def _stand_in(annotation: Any) -> Any:
    """Some value of the right type."""
    kind = _branches(annotation)[0]
    origin = get_origin(kind) or kind
    if origin is Literal:
        return get_args(kind)[0]
    simple = {int: 1, float: 1.0, bool: False, str: "?", list: ["?"], tuple: (), dict: {}}
    return simple.get(origin, "?")
