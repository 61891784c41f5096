"""Files and overrides → one checked configuration, or one report of everything that is wrong.

    defaults of the sections ◀ YAML files (defaults lists) ◀ command line        later wins, every value keeps its origin
      └ foreign keys translated ─ presets spread out ─ ${…} resolved ─ judged by the sections

Knows the steps and their order. The sections, and which root holds them, come as an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, Generic, TypeVar

import yaml

from megalith.config import sources
from megalith.config.interpolate import interpolate
from megalith.config.judge import judge
from megalith.config.layers import Merged, merge
from megalith.config.overrides import Override, parse_overrides
from megalith.config.schema import Section
from megalith.config.tree import defaults_of, dotted, fields_of, get, is_section, leaves, put
from megalith.errors import ConfigError

Root = TypeVar("Root", bound=Section)


@dataclass(frozen=True)
class Composed(Generic[Root]):
    """A checked configuration.

    `config` is the root section; `notices` are lines for the user (keys without effect, warnings); `origin` says of each
    dotted key where its value came from ("default", "gpt.yaml:12", "command line"); `resolved` is the whole tree of plain
    values, defaults included; `file` is the YAML file it started from.
    """

    config: Root
    notices: list[str]
    origin: dict[str, str]
    resolved: dict[str, Any]
    file: FilePath
    typed: list[str] = field(default_factory=list)

    def yaml(self) -> str:
        """The whole configuration as YAML. Composing that text gives the same configuration."""
        return to_yaml(self.resolved)


@dataclass
class Gathered:
    """All values before they are judged: what `explain` and `--print-config` show even when something is wrong."""

    merged: Merged
    file: FilePath
    overrides: list[str]


def gather(
    root: type[Section],
    *,
    config_name: str | None = None,
    config_path: str | FilePath | None = None,
    config_file: str | FilePath | None = None,
    overrides: Sequence[str] = (),
) -> Gathered:
    """Read and merge everything, translate foreign keys, resolve references. Only unreadable files raise."""
    file = sources.locate(
        config_name or (root.packaged if config_file is None else None), config_path, config_file
    )
    parsed, problems = parse_overrides(overrides)
    names = set(sources.groups(file))
    choices = {o.path[0]: str(o.value) for o in parsed if _chooses(o, names)}
    layers = sources.read(file, choices)
    merged = merge(root, layers, [o for o in parsed if not _chooses(o, names)])
    merged.problems[:0] = problems
    interpolate(root, merged)
    return Gathered(merged, file, list(overrides))


def compose(
    root: type[Root],
    *,
    config_name: str | None = None,
    config_path: str | FilePath | None = None,
    config_file: str | FilePath | None = None,
    overrides: Sequence[str] = (),
) -> Composed[Root]:
    """The checked configuration of a YAML file and overrides.

    `config_name` is looked up in `config_path` or among the packaged files (default: the root's own); `config_file`
    is a path of its own. Errors: one `ConfigError` with every problem.
    """
    gathered = gather(
        root, config_name=config_name, config_path=config_path, config_file=config_file, overrides=overrides
    )
    return settle(root, gathered)


def settle(root: type[Root], gathered: Gathered) -> Composed[Root]:
    """Judge what was gathered. Errors: one `ConfigError` with every problem."""
    merged = gathered.merged
    config = judge(root, merged)
    if config is None or not isinstance(config, root):
        raise ConfigError(merged.problems)
    resolved = config.model_dump(mode="json")
    there = (
        path
        for path, info in fields_of(root)
        if not is_section(info.annotation) and isinstance(get(resolved, path[:-1], resolved), dict)
    )
    return Composed(
        config=config,
        notices=list(merged.notices.values()),
        origin={dotted(path): merged.origin.get(path, "default") for path in there},
        resolved=resolved,
        file=gathered.file,
        typed=gathered.overrides,
    )


def preview(root: type[Section], gathered: Gathered) -> dict[str, Any]:
    """The tree of values as far as it is known: defaults, what was written over them, "???" where a value is missing."""
    tree = defaults_of(root)
    for path, value in leaves(gathered.merged.tree):
        if value != {} or not isinstance(get(tree, path), dict):
            put(tree, path, value)
    return tree


def _chooses(override: Override, names: set[str]) -> bool:
    return len(override.path) == 1 and override.path[0] in names and not override.delete


def check(root: type[Root], values: dict[str, Any], *, name: str = "configuration") -> Root:
    """A configuration from plain values (a checkpoint's config.yaml, a notebook). Errors: `ConfigError`."""
    layer = sources.Layer(name, tuple(sources.Value(p, v, name) for p, v in leaves(values)))
    merged = merge(root, [layer], [])
    interpolate(root, merged)
    return settle(root, Gathered(merged, FilePath(name), [])).config


# ---- YAML ----


class _Dumper(yaml.SafeDumper):
    """Lists of plain values on one line, null spelled out, keys in the order of the sections."""


def _list(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.Node:
    flat = not any(isinstance(v, list | dict) for v in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=flat)


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:float", repr(value))


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value.replace("${", "\\${"))


_Dumper.add_representer(list, _list)
_Dumper.add_representer(tuple, _list)
_Dumper.add_representer(float, _float)
_Dumper.add_representer(str, _text)
_Dumper.yaml_implicit_resolvers = sources.quoting_rules()


def to_yaml(tree: dict[str, Any]) -> str:
    """Plain values as YAML that `compose` reads back unchanged."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
