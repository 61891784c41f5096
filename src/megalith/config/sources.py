"""YAML files → plain values, each with the line that it stands on. Follows `defaults:` lists.

Knows YAML 1.1 as OmegaConf reads it (1e-4 is a number, dates and 12:30:00 are text). Refuses what could be read in two
ways (a key twice) or executed (tags), and knows no section: any key passes here.

    defaults: [base, model_size: small, _self_]      →  base.yaml, model_size/small.yaml, then the file itself
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from megalith.config.tree import Path as KeyPath
from megalith.config.tree import dotted
from megalith.errors import ConfigError, Problem

PACKAGED = Path(__file__).resolve().parent.parent / "conf"
"""The configurations that come with Megalith."""
SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Value:
    """A value and where it was written ("gpt.yaml:12")."""

    path: KeyPath
    value: Any
    origin: str


@dataclass(frozen=True)
class Layer:
    """What one file says, in its order. Later layers win."""

    name: str
    values: tuple[Value, ...]
    packaged: bool = False
    """It comes with Megalith: nobody's own words."""


class _Loader(yaml.SafeLoader):
    """Safe YAML, with numbers and texts told apart as OmegaConf does."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":int", ":float"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?
              |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
              |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
        re.X,
    ),
    list("-+0123456789."),
)


def quoting_rules() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """What a writer must quote so that text stays text for this reader and for any other reader of YAML 1.1."""
    ours, standard = _Loader.yaml_implicit_resolvers, yaml.SafeLoader.yaml_implicit_resolvers
    return {first: [*ours.get(first, []), *standard.get(first, [])] for first in {*ours, *standard}}


def locate(config_name: str | None, config_path: str | Path | None, config_file: str | Path | None) -> Path:
    """The file that is meant. Names are looked up in `config_path`, or else among the packaged configurations."""
    if config_file is not None:
        if config_name or config_path:
            raise _wrong(
                "--config", "cannot be given together with --config-name or --config-path", "keep one"
            )
        return _existing(Path(config_file).expanduser(), str(config_file))
    folder = Path(config_path).expanduser() if config_path is not None else PACKAGED
    if not folder.is_dir():
        raise _wrong(
            str(folder), "is not a folder", "--config-path names the folder, --config-name the file in it"
        )
    name = config_name or "megatron_gpt_config"
    for candidate in _candidates(folder, name):
        if candidate.is_file():
            return candidate
    known = sorted(p.stem for p in folder.iterdir() if p.suffix in SUFFIXES)
    near = get_close_matches(name, known, n=1)
    fix = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known) or 'no YAML files'}"
    if Path(name).is_file():
        fix = f"it is a file here: use --config {name}"
    where = "the packaged configurations" if config_path is None else str(folder)
    raise _wrong(f"--config-name {name}", f"no such file in {where}", fix)


def read(file: Path, choices: Mapping[str, str] | None = None) -> list[Layer]:
    """The layers of a file: those of its `defaults:` list and its own, in the order in which they apply.

    `choices` replaces what a group of the defaults list names. Errors: `ConfigError` with file and line.
    """
    return list(_read(file, dict(choices or {}), ()))


def groups(file: Path) -> list[str]:
    """Names of the groups in a file's own defaults list: what `group=name` on the command line may choose."""
    entries = load_yaml(file).get("defaults") or []
    return [next(iter(entry)).split("@")[0] for entry in entries if isinstance(entry, dict) and entry]


def load_yaml(file: Path) -> dict[str, Any]:
    """A file's values without their lines."""
    values, _ = _parse(file)
    return values


def _read(file: Path, choices: dict[str, str], above: tuple[Path, ...]) -> Iterator[Layer]:
    if file in above:
        chain = " → ".join(p.name for p in (*above, file))
        raise _wrong(str(file), f"its defaults list comes back to itself: {chain}", "remove one entry")
    values, lines = _parse(file)
    label = _label(file)
    entries = values.pop("defaults", None)
    entries = [] if entries is None else entries
    if not isinstance(entries, list):
        raise _wrong(
            f"{label}:{lines.get(('defaults',), 1)}", "defaults must be a list", "defaults: [base, _self_]"
        )
    own = Layer(label, tuple(_own(values, lines, label)), packaged=file.is_relative_to(PACKAGED))
    if "_self_" not in entries:
        entries = [*entries, "_self_"]
    for entry in entries:
        if entry == "_self_":
            yield own
        else:
            yield from _follow(entry, file, choices, above, where=f"{label}:{lines.get(('defaults',), 1)}")


def _own(values: dict[str, Any], lines: dict[KeyPath, int], label: str) -> Iterator[Value]:
    def walk(tree: dict[str, Any], prefix: KeyPath) -> Iterator[Value]:
        for key, value in tree.items():
            path = (*prefix, key)
            if isinstance(value, dict) and value:
                yield from walk(value, path)
            else:
                yield Value(path, value, f"{label}:{lines.get(path, 1)}")

    return walk(values, ())


def _follow(
    entry: Any, file: Path, choices: dict[str, str], above: tuple[Path, ...], *, where: str
) -> Iterator[Layer]:
    """The layers of one entry of a defaults list: a file name, or {group: name}, or {group@package: name}."""
    if isinstance(entry, str):
        key, name = "", entry
    elif isinstance(entry, dict) and len(entry) == 1:
        key, name = next(iter(entry.items()))
    else:
        raise _wrong(
            where, f"a defaults list holds names and group: name, not {entry!r}", "- model_size: small"
        )
    key = str(key).removeprefix("override ")
    if key.startswith("hydra/"):
        return
    optional, key = key.startswith("optional "), key.removeprefix("optional ")
    group, _, package = key.partition("@")
    name = choices.get(group, name) if group else name
    if name is None or name == "null":
        return
    if "${" in str(name):
        raise _wrong(
            where, f"interpolation in a defaults list is not supported: {name}", "write the name out"
        )
    target = _find(file.parent, group, str(name), where, optional=optional)
    if target is None:
        return
    header = _package_of(target)
    prefix = tuple((package or header or group.replace("/", ".")).split("."))
    prefix = () if prefix in (("",), ("_global_",)) else prefix
    for layer in _read(target, choices, (*above, file)):
        moved = (Value((*prefix, *v.path), v.value, v.origin) for v in layer.values)
        yield replace(layer, values=tuple(moved))


def _find(folder: Path, group: str, name: str, where: str, *, optional: bool) -> Path | None:
    for base in (folder, PACKAGED):
        for candidate in _candidates(base / group, name):
            if candidate.is_file():
                return candidate.resolve()
    if optional:
        return None
    places = {p.parent for base in (folder, PACKAGED) for p in _candidates(base / group, name)}
    known = sorted(
        {p.stem for place in places if place.is_dir() for p in place.iterdir() if p.suffix in SUFFIXES}
    )
    near = get_close_matches(name, known, n=1)
    fix = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known) or 'none'}"
    raise _wrong(
        where, f"the defaults list names {group + '/' if group else ''}{name}, and no such file exists", fix
    )


def _package_of(file: Path) -> str:
    """The package that Hydra's header line names: `# @package _global_`."""
    head = file.read_text(encoding="utf-8", errors="replace")[:400]
    found = re.search(r"^#\s*@package\s+(\S+)", head, re.M)
    return "" if not found or found[1] == "_group_" else found[1]


def _candidates(folder: Path, name: str) -> list[Path]:
    if name.endswith(SUFFIXES):
        return [folder / name]
    return [folder / f"{name}{suffix}" for suffix in SUFFIXES]


def _existing(file: Path, said: str) -> Path:
    if file.is_file():
        return file
    if file.is_dir():
        raise _wrong(said, "is a folder, not a file", f"--config-path {said} --config-name NAME")
    siblings = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
    near = get_close_matches(file.name, siblings, n=1)
    raise _wrong(said, "no such file", f"did you mean {file.parent / near[0]}?" if near else "check the path")


def _label(file: Path) -> str:
    """How a file is called in messages: its bare name when it is packaged, else the shortest path to it."""
    if file.is_relative_to(PACKAGED):
        return str(file.relative_to(PACKAGED))
    try:
        return str(file.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(file)


# ---- one file ----


def _parse(file: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    label = _label(file)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as problem:
        line = file.read_bytes()[: problem.start].count(b"\n") + 1
        raise _wrong(f"{label}:{line}", "is not UTF-8 text", "save the file as UTF-8") from None
    except OSError as problem:
        raise _wrong(
            str(file), f"cannot be read: {problem.strerror}", "check the path and its permissions"
        ) from None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.YAMLError as problem:
        raise _malformed(label, problem) from None
    if node is None or (node.tag.endswith(":null") and node.id == "scalar"):
        return {}, {}
    if not isinstance(node, yaml.MappingNode):
        kind = {"sequence": "a list", "scalar": "a single value"}[node.id]
        raise _wrong(
            f"{label}:1", f"holds {kind}; a configuration is keys and values", "trainer:\n  max_steps: 100"
        )
    reader = _Reader(loader, label)
    try:
        values = reader.mapping(node, ())
    except yaml.YAMLError as problem:
        raise _malformed(label, problem) from None
    if reader.problems:
        raise ConfigError(reader.problems)
    return values, reader.lines


class _Reader:
    """Walks the nodes of one file: values, lines, and what is wrong with the file itself."""

    def __init__(self, loader: _Loader, label: str) -> None:
        self.loader, self.label = loader, label
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[Problem] = []
        self._open: set[int] = set()

    def mapping(self, node: yaml.MappingNode, prefix: KeyPath) -> dict[str, Any]:
        if id(node) in self._open:
            self._say(node, "an anchor refers to itself", "write the values out")
            return {}
        self._open.add(id(node))
        self._refuse_duplicates(node, prefix)
        self.loader.flatten_mapping(node)
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            path = (*prefix, key)
            self.lines[path] = key_node.start_mark.line + 1
            values[key] = self.value(value_node, path)
        self._open.discard(id(node))
        return values

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        if node.id != "scalar" and node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            self._say(node, _bad_tag(node.tag), _NO_TAGS)
            return None
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            if id(node) in self._open:
                self._say(node, "an anchor refers to itself", "write the values out")
                return []
            self._open.add(id(node))
            items = [self.value(item, (*path, str(i))) for i, item in enumerate(node.value)]
            self._open.discard(id(node))
            return items
        return self.loader.construct_object(node)

    def _key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            self._say(node, "a key must be a name", "quote it")
            return "?"
        return str(node.value)

    def _refuse_duplicates(self, node: yaml.MappingNode, prefix: KeyPath) -> None:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen and key != "<<":
                name = dotted((*prefix, key))
                self._say(
                    key_node, f"{name} is written twice (first on line {seen[key]})", "remove one of them"
                )
            seen.setdefault(key, line)

    def _say(self, node: yaml.Node, what: str, fix: str) -> None:
        self.problems.append(Problem(f"{self.label}:{node.start_mark.line + 1}", what, fix))


_NO_TAGS = "a configuration holds values only; nothing in it is executed"


def _bad_tag(tag: str) -> str:
    return f"the tag {tag.replace('tag:yaml.org,2002:', '!!')} is not allowed"


def _malformed(label: str, problem: yaml.YAMLError) -> ConfigError:
    mark = getattr(problem, "problem_mark", None) or getattr(problem, "context_mark", None)
    where = f"{label}:{mark.line + 1}" if mark else label
    said = str(getattr(problem, "problem", None) or problem).splitlines()[0]
    if "could not determine a constructor" in said:
        tag = re.search(r"tag '?([^']+)'?", said)
        return _wrong(where, _bad_tag(tag[1] if tag else ""), _NO_TAGS)
    fix = (
        "indent with spaces"
        if "\\t" in said
        else "check colons, quotes and indentation on this line and the one before"
    )
    begun = getattr(problem, "context_mark", None)
    if begun and mark and begun.line != mark.line:
        said += f" (in what begins on line {begun.line + 1})"
    return _wrong(where, f"is not valid YAML: {said}", fix)


def _wrong(where: str, what: str, fix: str = "") -> ConfigError:
    return ConfigError([Problem(where, what, fix)])
