"""What a Megatron checkpoint's files hold, put together: every tensor by its whole-model name, a part for each tensor rank.

    mp_rank files ─ flatten ─ join stages ─┐
    torch_dist folder ─ layers apart ──────┴─▶ Read

Knows the shape of the contents; not what names or arguments mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalith.checkpoint.formats.megatron_files import Grid, grid
from megalith.checkpoint.formats.megatron_stages import join
from megalith.checkpoint.lazy import Lazy
from megalith.checkpoint.mapped import Parts
from megalith.checkpoint.pickles.distributed import is_distributed, open_distributed
from megalith.checkpoint.pickles.reader import open_pickle
from megalith.errors import CheckpointError

_STACKED = re.compile(r"((?:en|de)coder\.layers)\.(?!\d+\.)")


@dataclass(frozen=True)
class Read:
    """`tensors` by whole-model names; `common`, what the first rank's file says beside them; `sizes`, ranks and stages.

    `source`: what its arguments stand in. `tokenizer`: its own, where it does not lie beside it.
    """

    tensors: dict[str, Parts]
    common: Mapping[str, Any]
    kind: str
    sizes: tuple[int, int]
    source: str = "args"
    tokenizer: Path | None = None


def read_files(path: Path) -> Read:
    """An iteration's folder, a torch_dist folder or a single file. Errors: `CheckpointError` for what is missing or damaged."""
    if path.is_dir() and is_distributed(path):
        return _read_distributed(path)
    return _read_ranks(path)


def _read_ranks(path: Path) -> Read:
    files = Grid(((path,),)) if path.is_file() else grid(path)
    contents = [[content_of(file) for file in stage] for stage in files.files]
    stages = [
        [_chunk(ranks, i, stage) for i in range(chunks_of(ranks[0]))]
        for ranks, stage in zip(contents, files.files, strict=True)
    ]
    tensors = join(stages)
    first = contents[0][0]
    versions = {str(content.get("checkpoint_version")) for stage in contents for content in stage}
    if len(versions) > 1:
        raise CheckpointError(
            f"its files are of different versions: {', '.join(sorted(versions))}", where=str(path)
        )
    return Read(tensors, first, tree_of(tensors), files.sizes)


def tree_of(names: Iterable[str]) -> str:
    """Whose names these are: "megatron", Megatron-LM's own, or "megatron-core"."""
    core = any("coder.layers." in name and "linear_" in name for name in names)
    return "megatron-core" if core else "megatron"


def content_of(file: Path) -> Mapping[str, Any]:
    """What a rank's file holds. Errors: `CheckpointError` where it is not Megatron's."""
    content = open_pickle(file).content
    if not isinstance(content, dict) or not ({"model", "model0"} & content.keys()):
        held = (
            ", ".join(str(key) for key in list(content)[:6])
            if isinstance(content, dict)
            else type(content).__name__
        )
        raise CheckpointError(
            f"is a torch file, but not Megatron's: there is no `model` in it; it holds {held}",
            where=str(file),
            fix="a file of weights alone belongs in a folder of transformers, beside its config.json",
        )
    return content


def chunks_of(content: Mapping[str, Any]) -> int:
    """Chunks of the model in a rank's file."""
    if "model" in content:
        return 1
    return next(i for i in range(len(content) + 1) if f"model{i}" not in content)


def _chunk(ranks: Sequence[Mapping[str, Any]], number: int, files: Sequence[Path]) -> dict[str, Parts]:
    """Chunk `number` of a stage: each tensor's parts, one a rank."""
    found = [dict(flattened(content.get("model", content.get(f"model{number}")))) for content in ranks]
    return side_by_side(found, files)


def side_by_side(ranks: Sequence[Mapping[str, Lazy]], files: Sequence[object]) -> dict[str, Parts]:
    """Each tensor's parts, one a rank. Errors: `CheckpointError` naming the file that holds others than the first."""
    for tensors, file in zip(ranks, files, strict=True):
        if odd := sorted(tensors.keys() ^ ranks[0].keys()):
            what = f"it does not hold the same tensors as the first rank: {', '.join(odd[:4])}"
            raise CheckpointError(what, where=str(file), fix="the files belong to different checkpoints")
    return {name: tuple(tensors[name] for tensors in ranks) for name in ranks[0]}


def flattened(tree: Any, prefix: str = "") -> Iterator[tuple[str, Lazy]]:
    """The tensors of nested dictionaries by dotted names; what is no tensor is no weight."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flattened(value, f"{prefix}.{key}" if prefix else str(key))
    elif hasattr(tree, "rows") and hasattr(tree, "shape"):
        yield prefix, tree


def _read_distributed(path: Path) -> Read:
    opened = open_distributed(path)
    common = opened.common
    if common is None and (names := [name for name in opened.objects if name.startswith("common_state")]):
        common = opened.objects[names[0]]
        common = common[0] if isinstance(common, list) and common else common
    tensors: dict[str, Parts] = {}
    for name, lazy in opened.tensors.items():
        if name.startswith(("optimizer.", "chained_")):
            continue
        stacked = _STACKED.search(name)
        if stacked is None or not lazy.shape:
            tensors[name] = (lazy,)
            continue
        for layer in range(lazy.shape[0]):
            tensors[_STACKED.sub(rf"\1.{layer}.", name)] = (_row(lazy, layer),)
    return Read(tensors, common if isinstance(common, dict) else {}, "torch_dist", (1, 1))


@dataclass(frozen=True)
class _Row:
    """One layer of a tensor that holds all layers."""

    stack: Lazy
    index: int

    @property
    def name(self) -> str:
        return self.stack.name

    @property
    def dtype(self) -> torch.dtype:
        return self.stack.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]

    @property
    def nbytes(self) -> int:
        return self.stack.nbytes // self.stack.shape[0]

    def read(self) -> torch.Tensor:
        return self.stack.rows(self.index, self.index + 1)[0]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.read()[start:stop]


def _row(lazy: Lazy, index: int) -> Lazy:
    return _Row(lazy, index)
