"""`${model.hidden_size}`, `${.x}`, `${multiply:a,b}` → values, by OmegaConf. Every reference that fails is reported.

References see the defaults of the schema as well as what was written. Nothing is executed: resolvers are OmegaConf's own
(environment variables, decoding) and `multiply`, which NeMo's files use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import Container, OmegaConf
from omegaconf.errors import (
    GrammarParseError,
    InterpolationKeyError,
    InterpolationToMissingValueError,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)

from megalith.config.layers import Merged
from megalith.config.schema import Section
from megalith.config.suggest import suggest
from megalith.config.tree import Path, defaults_of, get, leaves, put
from megalith.errors import Problem

OmegaConf.register_new_resolver("multiply", lambda *factors: _product(factors), replace=True)


def _product(factors: tuple[Any, ...]) -> Any:
    result: Any = 1
    for factor in factors:
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            raise ValueError(f"multiply takes numbers, not {factor!r}")
        result *= factor
    return result


def interpolate(root: type[Section], merged: Merged) -> None:
    """Replace every reference in the tree by its value; those that fail are dropped and reported."""
    pending = [path for path, value in leaves(merged.tree) if _refers(value)]
    for path in list(pending):
        if problem := _grammar(get(merged.tree, path)):
            _fail(merged, path, problem, "")
            pending.remove(path)
    if not pending:
        return
    config = OmegaConf.create(_whole(root, merged))
    resolved: dict[Path, Any] = {}
    for path in pending:
        try:
            resolved[path] = _value(config, path)
        except (OmegaConfBaseException, RecursionError) as problem:
            _fail(merged, path, *_explain(root, problem, get(merged.tree, path)))
    for path, value in resolved.items():
        put(merged.tree, path, value)


def _refers(value: Any) -> bool:
    if isinstance(value, str):
        return "${" in value
    if isinstance(value, Mapping):
        return any(_refers(v) for v in value.values())
    return isinstance(value, list) and any(_refers(v) for v in value)


def _grammar(value: Any) -> str:
    try:
        OmegaConf.create({"value": value})
    except (GrammarParseError, OmegaConfBaseException) as problem:
        return f"cannot be read: {str(problem).splitlines()[0]}"
    return ""


def _whole(root: type[Section], merged: Merged) -> dict[str, Any]:
    """Defaults, foreign keys as written, and the tree on top, in types that OmegaConf holds."""
    whole: dict[str, Any] = {}
    for source in (defaults_of(root), merged.foreign, merged.tree):
        for path, value in leaves(source):
            if value != {} or not isinstance(get(whole, path), dict):
                put(whole, path, _simple(value))
    return whole


def _simple(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_simple(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _simple(v) for k, v in value.items()}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _value(config: Any, path: Path) -> Any:
    node = config
    for part in path:
        node = node[part]
    return OmegaConf.to_container(node, resolve=True) if isinstance(node, Container) else node


def _explain(root: type[Section], problem: BaseException, written: Any) -> tuple[str, str]:
    said = str(problem).splitlines()[0] if str(problem) else ""
    quoted = said.split("'")[1] if said.count("'") >= 2 else ""
    if isinstance(problem, InterpolationToMissingValueError):
        return f"{written} refers to a key without a value (???)", "give that key a value"
    if isinstance(problem, RecursionError) or "ecursi" in said:
        return f"{written} refers to itself in a circle", "write one of the values out"
    if isinstance(problem, InterpolationKeyError):
        near = suggest(root, tuple(quoted.split(".")))
        fix = (
            f"did you mean ${{{near[0]}}}?"
            if near
            else "references are full paths, or start with a dot: ${.name}"
        )
        return f"{written} refers to {quoted or 'a key'}, which does not exist", fix
    if isinstance(problem, UnsupportedInterpolationType):
        return (
            f"{written} uses {said.removeprefix('Unsupported interpolation type ')}, which is not known",
            "write it out",
        )
    return f"{written} cannot be resolved: {said}", "write the value out"


def _fail(merged: Merged, path: Path, what: str, fix: str) -> None:
    merged.problems.append(Problem(merged.where(path), what, fix))
    merged.broken.add(path)
    merged.drop(path)
