"""The configuration of a restored model: the archive's own keys first, the trainer's, and the user's on top.

    archive ─ keys that mean something here, its architecture ─┐
    Trainer(…), exp_manager(trainer, …) ───────────────────────┼─ merged, judged ─▶ Composed, or every problem at once
    override_config_path: a file, a mapping, a configuration ──┘

A key of the archive that cannot be here is left out, and told; a key that the user typed is answered as on the command line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalith.config import sources
from megalith.config.compose import Composed, Gathered, settle
from megalith.config.interpolate import interpolate
from megalith.config.layers import Merged, merge
from megalith.config.schema import Section
from megalith.config.sources import Layer, Value
from megalith.config.tree import fields_of, get, leaves, section_of
from megalith.data.config import PATH_KEYS
from megalith.errors import ConfigError, Problem
from megalith.nemo.archive import Archive
from megalith.tasks.pretrain_config import PretrainConfig

Keys = Mapping[str, Any]
Path_ = tuple[str, ...]
Override = str | Path | Keys | Section | Composed[Any] | None
LAYOUT = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
    "context_parallel_size", "sequence_parallel", "pipeline_layers", "pipeline_model_parallel_split_rank",
)  # fmt: skip
"""Keys of how processes share a model: the archive's where it fits the processes that there are."""
NO_FILES = "(no files)"
"""Where a configuration that a pretraining would need has no name of token files."""
NOT_ITS_OWN = {"tokenizer", "preset", "init_from", "resume_from_checkpoint", "vocab_size"}
"""Keys of an archive that say where it came from; its tokenizer is opened by itself."""
DECODER = ("model", "data", "seq_length_dec")
"""The length of a T5's other side, of which an archive may say nothing."""
WHOLE = {"model", "trainer", "exp_manager"}
"""A mapping with one of these is a whole configuration; any other holds keys of the model."""


@dataclass(frozen=True)
class Asked:
    """What was typed around an archive: keys of the sections trainer and exp_manager, and an override of anything."""

    sections: Mapping[str, Keys]
    override: Override = None
    world: int = 1

    @property
    def layers(self) -> list[Layer]:
        """In the order in which they apply."""
        given = [layer_of(name, {name: keys}) for name, keys in self.sections.items() if keys]
        return [*given, *layers_of(self.override)]


def configure(root: type[PretrainConfig], archive: Archive, asked: Asked) -> Composed[PretrainConfig]:
    """The configuration of an archive's model. Errors: `ConfigError` with every problem of what was typed."""
    name, layers = archive.folder.name, asked.layers
    typed = {value.path for layer in layers for value in layer.values}
    own = list(_own(root, archive, asked, typed))
    left: list[str] = []
    while True:
        try:
            composed = composed_of(root, [Layer(name, tuple(own)), *layers], Path(name))
            break
        except ConfigError as wrong:
            bad = {_key(problem, name) for problem in wrong.problems}
            kept = [
                v
                for v in own
                if not _below(v.path, bad) or v.path[1] in type(archive.architecture).model_fields
            ]
            if len(kept) == len(own):
                raise
            left += [".".join(value.path) for value in own if value not in kept]
            own = kept
    said = [f"{name}: {', '.join(left)} left out: not possible here"] if left else []
    composed.notices.extend(said)
    return composed


def composed_of(root: type[PretrainConfig], layers: Sequence[Layer], file: Path) -> Composed[PretrainConfig]:
    """Layers, the last on top, as one checked configuration. Errors: `ConfigError`."""
    merged = merge(root, layers, [])
    _stand_in(merged)
    interpolate(root, merged)
    return settle(root, Gathered(merged, file, []))


def _stand_in(merged: Merged) -> None:
    """A model that is only asked needs no token files; who reads some (`Restored.data`) finds that none are named."""
    own = [key for key in PATH_KEYS.values() if get(merged.tree, ("model", "data", key))]
    path = ("model", "data", PATH_KEYS["train"] if own else "data_prefix")
    if not get(merged.tree, ("model", "data", "data_prefix")) and not get(merged.tree, path):
        merged.set(Value(path, NO_FILES, "default"))


def layer_of(name: str, tree: Keys) -> Layer:
    """Plain values as a layer."""
    return Layer(name, tuple(Value(path, value, name) for path, value in leaves(plain(tree))))


def layers_of(override: Override) -> list[Layer]:
    """What a user gave as an override, in the words of the root configuration."""
    if override is None:
        return []
    if isinstance(override, str | Path):
        file = sources.locate(None, None, override)
        return [_whole(layer) for layer in sources.read(file)]
    if isinstance(override, Composed):
        packaged = override.file.name if override.file.is_relative_to(sources.PACKAGED) else None
        return [_typed_in(override, packaged)]
    tree = override.model_dump(exclude_unset=True) if isinstance(override, Section) else override
    return [_whole(layer_of("override_config_path", tree))]


def _typed_in(composed: Composed[Any], packaged: str | None) -> Layer:
    """What somebody typed into a composed configuration: neither defaults nor the packaged file."""
    values = []
    for key, origin in composed.origin.items():
        if origin == "default" or (packaged and origin.startswith(f"{packaged}:")) or "." not in key:
            continue
        value: Any = composed.resolved
        for part in key.split("."):
            value = value[part]
        values.append(Value(tuple(key.split(".")), value, origin))
    return Layer("override_config_path", tuple(values))


def _whole(layer: Layer) -> Layer:
    """The same, with keys of a model moved into its section."""
    if not layer.values or any(value.path[0] in WHOLE for value in layer.values):
        return Layer(layer.name, tuple(v for v in layer.values if v.path[0] != "restore_from_path"))
    return Layer(layer.name, tuple(Value(("model", *v.path), v.value, v.origin) for v in layer.values))


def plain(value: Any) -> Any:
    """Dictionaries and lists of whatever stands for them (OmegaConf's)."""
    if isinstance(value, Mapping):
        return {str(key): plain(value[key]) for key in value}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(each) for each in value]
    return value


def _own(root: type[PretrainConfig], archive: Archive, asked: Asked, typed: set[Path_]) -> Iterator[Value]:
    """The archive's keys that mean something here, and its architecture, which its tensors prove."""
    name = archive.folder.name
    architecture = archive.architecture.model_dump(mode="json")
    fits = asked.world % _processes(archive.keys) == 0
    for path, value in leaves(plain(archive.keys), ("model",)):
        foreign = path[1] in NOT_ITS_OWN or path[1] in architecture
        if not foreign and _means(root, path) and (path[1] not in LAYOUT or fits):
            yield Value(path, value, name)
    if archive.opened is not None and any(path[:2] == ("model", "tokenizer") for path in typed):
        del architecture["vocab_size"]  # that of its padded table: the tokenizer knows the true one
    for key, value in architecture.items():
        yield Value(("model", key), value, name)
    if ("model", "encoder_seq_length") not in typed and "encoder_seq_length" not in archive.keys:
        yield Value(("model", "encoder_seq_length"), archive.architecture.max_position_embeddings, name)
    length = dict(fields_of(root)).get(DECODER)
    if length is not None and DECODER not in typed and not get(archive.keys, DECODER[1:]):
        yield Value(DECODER, min(length.default, archive.architecture.max_position_embeddings), name)


def _processes(keys: Keys) -> int:
    """How many share one copy of the archive's model."""
    sizes = [keys.get(f"{axis}_model_parallel_size") for axis in ("tensor", "pipeline")]
    sizes.append(keys.get("context_parallel_size"))
    product = 1
    for size in sizes:
        product *= size if isinstance(size, int) and size > 0 else 1
    return product


def _means(root: type[Section], path: Path_) -> bool:
    """Is it a key of ours, or one that is only called otherwise here? (What NeMo's say of the architecture, its reader has said.)"""
    section: type[Section] | None = root
    for part in path:
        if section is None:
            return True
        info = section.model_fields.get(part)
        if info is None:
            key = section.foreign_keys.get(part)
            return key is not None and bool(key.to)
        section = section_of(info.annotation)
    return section is None


def _key(problem: Problem, name: str) -> Path_:
    """The key of the archive that a problem is about; () where it is somebody else's."""
    found = re.fullmatch(r"(\S+) \((.*)\)", problem.where)
    return tuple(found[1].split(".")) if found and found[2] == name else ()


def _below(path: Path_, bad: set[Path_]) -> bool:
    return any(each and path[: len(each)] == each for each in bad)
