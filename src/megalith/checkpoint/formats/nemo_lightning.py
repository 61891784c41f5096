"""Lightning's checkpoints of a run of NeMo's: one file, or a file of the same name for each rank, with the optimizer's state.

    checkpoints/ [mp_rank_TT/ | tp_rank_TT_pp_rank_PPP/] NAME.ckpt ─▶ state_dict, optimizer_states, hyper_parameters

What NeMo 1.0 to 1.20 write while they train. Knows keys of these files; tensors' names are `nemo_read`'s business.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megalith.checkpoint.formats.foreign import Foreign
from megalith.checkpoint.formats.megatron import understand_files
from megalith.checkpoint.formats.megatron_read import Read, tree_of
from megalith.checkpoint.formats.megatron_told import Told, read_config_file
from megalith.checkpoint.formats.nemo_archive import WEIGHTS
from megalith.checkpoint.formats.nemo_config import arguments, own_keys
from megalith.checkpoint.formats.nemo_read import (
    CURRENT,
    in_grid,
    left_behind,
    own_tensors,
    rank_of,
    weights_of,
)
from megalith.checkpoint.pickles.reader import open_pickle
from megalith.checkpoint.pickles.stub import Stub
from megalith.errors import CheckpointError

KIND = "nemo-lightning"
SUFFIX, LAST = ".ckpt", "last.ckpt"
FOLDER = "checkpoints"
"""Where a run keeps them."""
HPARAMS = "hparams.yaml"
"""A run's configuration, beside `checkpoints`."""
_SAMPLES = re.compile(r"consumed_samples=(\d+)")
_SCALERS = (
    "native_amp_scaling_state",
    "NativeMixedPrecisionPlugin",
    "MixedPrecisionPlugin",
    "MixedPrecision",
)
"""Where versions of Lightning keep the state of the gradient scaler."""


def locate(path: Path) -> Path | None:
    """The file that a path means: itself, or of a folder the newest. A rank's stands for all ranks. None for anything else.

    Errors: `CheckpointError` for a folder of several of which none is the last.
    """
    if path.is_file():
        return path.resolve() if path.suffix == SUFFIX and _is_lightning(path) else None
    if not path.is_dir():
        return None
    inside = path / FOLDER if (path / FOLDER).is_dir() else path
    folder = inside.parent if _is_rank(inside) else inside
    files = sorted(file for file in _files(folder) if file.name != WEIGHTS)
    if not files or not _is_lightning(files[0]):
        return None
    return newest(files, where=str(path)).resolve()


def newest(files: Iterable[Path], *, where: str) -> Path:
    """Of files of one folder, or of its ranks', the one called `…last.ckpt`, or the only one.

    Errors: `CheckpointError` naming them where that is not certain.
    """
    names = dict.fromkeys(file.name for file in files)
    chosen = [name for name in names if name.endswith(LAST)] or list(names)
    if len(chosen) > 1:
        raise CheckpointError(
            f"it holds {len(chosen)} checkpoints: {', '.join(chosen[:8])}",
            where=where,
            fix="give one of them",
        )
    return next(file for file in files if file.name == chosen[0])


def _files(folder: Path) -> Iterable[Path]:
    yield from folder.glob(f"*{SUFFIX}")
    for entry in folder.iterdir():
        if _is_rank(entry) and entry.is_dir():
            yield from entry.glob(f"*{SUFFIX}")


def _is_rank(folder: Path) -> bool:
    return rank_of(f"{folder.name}/_") is not None


def _is_lightning(file: Path) -> bool:
    try:
        content = open_pickle(file).content
    except CheckpointError:
        return False
    return isinstance(content, dict) and "state_dict" in content and "pytorch-lightning_version" in content


def open_lightning(path: Path, told: Told) -> Foreign:
    """The model of a run's checkpoint; `path`: the file of one of its ranks. No tensor is read.

    Errors: `CheckpointError` for missing ranks, for damage, and by name for what our models cannot be like.
    """
    files, contents = _contents(path)
    first = contents[0][0]
    weights = weights_of(
        [[content.get("state_dict") for content in stage] for stage in contents],
        [[str(file) for file in stage] for stage in files],
    )
    keys = _keys(first, path)
    args = arguments(keys, where=str(path)) if keys else {}
    samples, said = _consumed(path, first, keys)
    common = {
        "args": args | {"consumed_train_samples": samples},
        "checkpoint_version": first.get("checkpoint_version") or CURRENT,
        "iteration": first.get("global_step"),
    }
    read = Read(weights.tensors, common, tree_of(weights.tensors), weights.sizes, "hyper_parameters")
    foreign = understand_files(path, read, told)
    about = {"format": KIND, "lightning_version": first.get("pytorch-lightning_version")}
    return replace(
        foreign,
        kind=KIND,
        provenance={**foreign.provenance, **about},
        notices=(*foreign.notices, *said, *left_behind(weights)),
    )


def optimizer_contents(path: Path) -> list[list[dict[str, Any]]]:
    """`[p][t]`: a rank's `model` by Megatron's names and its `optimizer`, where there is one, as Megatron's own files have them."""
    files, contents = _contents(path)
    return [
        [_as_megatron(content, str(file)) for content, file in zip(stage, names, strict=True)]
        for stage, names in zip(contents, files, strict=True)
    ]


def _as_megatron(content: Mapping[str, Any], file: str) -> dict[str, Any]:
    model, _ = own_tensors(content.get("state_dict"), file)
    states = content.get("optimizer_states")
    if not isinstance(states, list) or len(states) != 1 or not isinstance(states[0], dict):
        return {"model": model}
    scaler: dict[str, Any] = next(
        (content[name] for name in _SCALERS if isinstance(content.get(name), dict)), {}
    )
    return {"model": model, "optimizer": {**states[0], "grad_scaler": scaler}}


def _contents(path: Path) -> tuple[list[list[Path]], list[list[Mapping[str, Any]]]]:
    """The files of all ranks and what they hold."""
    if _is_rank(path.parent):
        around = path.parent.parent
        places = {
            place: entry / path.name
            for entry in around.iterdir()
            if (place := rank_of(f"{entry.name}/_")) is not None and (entry / path.name).is_file()
        }
    else:
        around, places = path.parent, {(0, 0): path}
    files = in_grid(places, where=str(around))
    contents = [[open_pickle(file).content for file in stage] for stage in files]
    steps = {str(content.get("global_step")) for stage in contents for content in stage}
    if len(steps) > 1:
        raise CheckpointError(
            f"its ranks are of different steps: {', '.join(sorted(steps))}",
            where=str(path),
            fix="give a checkpoint that all ranks have finished",
        )
    return files, contents


def _keys(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The run's configuration: in the file, else in hparams.yaml near it; empty where there is neither."""
    said = plain(content.get("hyper_parameters"))
    if isinstance(said, dict) and said:
        return own_keys(said, where=str(path))
    for folder in list(path.parents)[:3]:
        if (folder / HPARAMS).is_file():
            return own_keys(read_config_file(folder / HPARAMS), where=str(folder / HPARAMS))
    return {}


def plain(value: Any) -> Any:
    """Values of a pickled configuration of OmegaConf's, or of Lightning's own class for them."""
    if isinstance(value, Stub):
        inside = value.value("_content", value.value("_val", dict(value.pairs)))
        return plain(inside)
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list) else value


def _consumed(path: Path, content: Mapping[str, Any], keys: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Samples that made it, which NeMo keeps in the file's name; else steps times the batch, which is said."""
    if match := _SAMPLES.search(path.name):
        return int(match[1]), ()
    step, batch = content.get("global_step"), keys.get("global_batch_size")
    if isinstance(step, int) and isinstance(batch, int):
        return step * batch, (f"its name does not say consumed_samples: {step} steps of {batch} are counted",)
    return 0, ("nothing says how many samples it has consumed: they are counted from 0",)
