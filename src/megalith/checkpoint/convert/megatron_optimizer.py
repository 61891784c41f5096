"""Adam's state in Megatron's files: parameters by number, in the order in which its modules make them, in two groups.

    group 0  what decays: matrices       group 1  what does not: biases and norms
    optimizer.state[number] = {exp_avg, exp_avg_sq, step}      fp32_from_fp16_params[group] = fp32 weights of a model in half

The distributed optimizer's own files (one a data-parallel rank, flat buffers without names) are not read.
Order: `get_param_groups` of Megatron-LM (megatron/optimizer/__init__.py), the same since its first version.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from megalith.checkpoint.convert.source import MOMENTS, Optimizer
from megalith.checkpoint.exported import Cut
from megalith.checkpoint.formats import nemo_lightning
from megalith.checkpoint.formats.foreign import Foreign, heads_of, shapes_of
from megalith.checkpoint.formats.megatron_files import Grid, grid
from megalith.checkpoint.formats.megatron_read import chunks_of, content_of, flattened, tree_of
from megalith.checkpoint.formats.megatron_stages import join
from megalith.checkpoint.lazy import Lazy
from megalith.checkpoint.mapped import Parts, canonical, natives
from megalith.checkpoint.mapping import Rule, Table
from megalith.errors import CheckpointError

HALF = (torch.float16, torch.bfloat16)
MASTERS = "masters"
DEFAULTS = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
"""Of an optimizer whose settings are not known: Megatron's own defaults."""


def in_module_order(table: Table, names: Iterable[str]) -> list[str]:
    """Names of a chunk's tensors in the order in which Megatron's modules have them."""
    places = {
        re.sub(r"\{layer\}", "N", name): (number, rule)
        for number, rule in enumerate(table.rules)
        for name in (*rule.foreign, *rule.copies)
    }

    begins = _beginnings(table)

    def key(name: str) -> tuple[float, int, int]:
        known = canonical(table, name)
        layer = re.search(r"layers\.(\d+)\.", known)
        number, rule = places[re.sub(r"layers\.\d+\.", "layers.N.", known)]
        if known in rule.copies:
            return begins["copies"], 0, number
        return begins[number], int(layer[1]) if layer else 0, number

    return sorted(names, key=key)


def _beginnings(table: Table) -> dict[int | str, float]:
    """For each rule the first of those that its layer has, which go on with the next layer; copies lie behind the language model."""
    found: dict[int | str, float] = {}
    for number, rule in enumerate(table.rules):
        goes_on = number and "{layer}" in rule.foreign[0] and _tower(rule) == _tower(table.rules[number - 1])
        found[number] = found[number - 1] if goes_on else number
    inner = [
        number for number, rule in enumerate(table.rules) if rule.foreign[0].startswith("language_model.")
    ]
    return found | {"copies": max(inner) + 0.5}


def _tower(rule: Rule) -> str:
    """What stands before the layer's number."""
    before, layered, _ = rule.foreign[0].partition("{layer}")
    return before if layered else ""


def decays(name: str, shape: Sequence[int]) -> bool:
    """Is a parameter of the group whose weights decay?"""
    return len(shape) > 1 and not name.endswith(".bias")


def by_kind(optimizer: Optimizer) -> dict[str, Mapping[str, Lazy]]:
    """Kind (exp_avg, exp_avg_sq, masters) → our name → tensor, of those that there are."""
    kinds: dict[str, Mapping[str, Lazy]] = {
        moment: {
            name.removesuffix(f".{moment}"): lazy
            for name, lazy in optimizer.moments.items()
            if name.endswith(f".{moment}")
        }
        for moment in MOMENTS
    }
    return kinds | ({MASTERS: optimizer.masters} if optimizer.masters else {})


def optimizer_content(
    names: Sequence[str],
    kinds: Mapping[str, Mapping[str, Cut]],
    settings: Mapping[str, Any],
    state: Optimizer,
) -> dict[str, Any]:
    """A rank's `optimizer`: `names` in module order, `kinds` (exp_avg, exp_avg_sq, masters) → name → its part."""
    shapes = {name: kinds[MOMENTS[0]][name].shape for name in names}
    groups = [[name for name in names if decays(name, shapes[name]) is wanted] for wanted in (True, False)]
    groups = [group for group in groups if group]
    numbers = {name: number for number, name in enumerate(name for group in groups for name in group)}
    adam = {
        "state": {
            number: {"step": state.updates, **{moment: kinds[moment][name] for moment in MOMENTS}}
            for name, number in numbers.items()
        },
        "param_groups": [_group(group, numbers, shapes, settings, state.updates) for group in groups],
    }
    if MASTERS not in kinds:
        return adam
    masters = [[kinds[MASTERS][name] for name in group] for group in groups]
    found: dict[str, Any] = {"optimizer": adam, "fp32_from_fp16_params": masters}
    if state.scale is not None and kinds[MASTERS]:
        scale = torch.tensor([state.scale])
        found["grad_scaler"] = {"scale": scale, "growth_tracker": 0, "hysteresis_tracker": 2}
    return found


def _group(
    group: Sequence[str],
    numbers: Mapping[str, int],
    shapes: Mapping[str, Sequence[int]],
    settings: Mapping[str, Any],
    updates: int,
) -> dict[str, Any]:
    decay = decays(group[0], shapes[group[0]])
    told = {name: settings.get(name, value) for name, value in DEFAULTS.items()}
    return told | {
        "betas": tuple(told["betas"]),
        "weight_decay": told["weight_decay"] if decay else 0.0,
        "wd_mult": 1.0 if decay else 0.0,
        "lr_mult": 1.0,
        "is_expert": False,
        "bias_correction": True,
        "step": updates,
        "params": [numbers[name] for name in group],
    }


# Reading --------------------------------------------------------------------------------------------------------------


def open_optimizer(foreign: Foreign) -> tuple[Optimizer | None, str]:
    """The optimizer state in a Megatron checkpoint's own files, or none and why."""
    contents, why = _contents(foreign)
    if why or any("optimizer" not in content for stage in contents for content in stage):
        return None, why
    stages = [_stage(foreign.table, stage, where=str(foreign.path)) for stage in contents]
    found: dict[str, Mapping[str, Lazy]] = {}
    shapes = shapes_of(foreign.family, foreign.config)
    for kind in (*MOMENTS, MASTERS):
        chunks = [[chunk[kind] for chunk in stage if chunk.get(kind)] for stage in stages]
        if any(chunks):
            parts: dict[str, Parts] = join(chunks)
            found[kind] = natives(
                foreign.table, shapes, parts, heads_of(foreign.config), where=f"{foreign.path} (its {kind})"
            )
    first = contents[0][0]["optimizer"]
    moments = {f"{name}.{moment}": lazy for moment in MOMENTS for name, lazy in found[moment].items()}
    return Optimizer(found.get(MASTERS, {}), moments, _updates(first), _scale(first)), ""


def _contents(foreign: Foreign) -> tuple[Sequence[Sequence[Mapping[str, Any]]], str]:
    """`[p][t]`: what the file of a rank holds, and why its optimizer state is not read, where it is not."""
    if foreign.kind == nemo_lightning.KIND:
        if tree_of(foreign.parts) != "megatron":
            return [], "its optimizer state is numbered in the order of megatron-core's modules"
        return nemo_lightning.optimizer_contents(foreign.path), ""
    if foreign.kind != "megatron":
        return [], f"the optimizer state of {foreign.kind} is not read"
    files = Grid(((foreign.path,),)) if foreign.path.is_file() else grid(foreign.path)
    contents = [[content_of(file) for file in stage] for stage in files.files]
    absent = any("optimizer" not in content for stage in contents for content in stage)
    apart = absent and any(list(file.parent.glob("*optim.pt")) for stage in files.files for file in stage)
    return contents, "its optimizer state lies in files of the distributed optimizer" if apart else ""


Chunk = dict[str, dict[str, Parts]]


def _stage(table: Table, ranks: Sequence[Mapping[str, Any]], where: str) -> list[Chunk]:
    """For each chunk of a stage: kind → name → a part for each rank."""
    read = [list(_rank(table, content, where)) for content in ranks]
    return [
        {
            kind: {name: tuple(rank[number][kind][name] for rank in read) for name in first}
            for kind, first in chunk.items()
        }
        for number, chunk in enumerate(read[0])
    ]


def _rank(table: Table, content: Mapping[str, Any], where: str) -> Iterator[dict[str, dict[str, Lazy]]]:
    """For each chunk of a rank's file: kind → name → tensor."""
    chunks = [
        dict(flattened(content.get("model", content.get(f"model{number}"))))
        for number in range(chunks_of(content))
    ]
    order = [(number, name) for number, chunk in enumerate(chunks) for name in in_module_order(table, chunk)]
    shapes = {(number, name): chunks[number][name].shape for number, name in order}
    groups = [[key for key in order if decays(key[1], shapes[key]) is wanted] for wanted in (True, False)]
    optimizer, masters = _parts_of(content["optimizer"], where)
    keys = [key for group in groups for key in group]
    ids = [number for group in optimizer["param_groups"] for number in group["params"]]
    flat = [tensor for group in masters for tensor in group]
    if len(ids) != len(keys) or (flat and len(flat) != len(keys)):
        raise CheckpointError(
            f"its optimizer has {len(ids)} parameters, its model {len(keys)}",
            where=where,
            fix="--no-optimizer converts the weights alone",
        )
    found: dict[str, dict[tuple[int, str], Lazy]] = {
        moment: {
            key: _tensor(optimizer["state"][id], moment, where) for key, id in zip(keys, ids, strict=True)
        }
        for moment in MOMENTS
    }
    if flat:
        found[MASTERS] = dict(zip(keys, flat, strict=True))
    for kind, tensors in found.items():
        odd = [key for key, lazy in tensors.items() if tuple(lazy.shape) != tuple(shapes[key])]
        if odd:
            raise CheckpointError(
                f"{kind} of {odd[0][1]} is {list(tensors[odd[0]].shape)}, the weight {list(shapes[odd[0]])}: "
                "the optimizer has its parameters in another order",
                where=where,
                fix="--no-optimizer converts the weights alone",
            )
    for number in range(len(chunks)):
        yield {
            kind: {key[1]: lazy for key, lazy in tensors.items() if key[0] == number}
            for kind, tensors in found.items()
        }


def _parts_of(state: Any, where: str) -> tuple[Mapping[str, Any], Sequence[Sequence[Lazy]]]:
    """(Adam's state_dict, fp32 weights by group) under the names of every version."""
    try:
        adam = state.get("optimizer", state.get("optimizer_state_dict", state))
        adam["state"], adam["param_groups"]
        return adam, state.get("fp32_from_fp16_params", state.get("fp32_from_fp16", []))
    except (AttributeError, KeyError, TypeError):
        raise CheckpointError(
            "its optimizer is not one that Megatron's own training writes",
            where=where,
            fix="--no-optimizer converts the weights alone",
        ) from None


def _tensor(state: Any, moment: str, where: str) -> Lazy:
    lazy = state.get(moment) if isinstance(state, dict) else None
    if not hasattr(lazy, "read"):
        raise CheckpointError(
            f"its optimizer has no {moment}: it is not Adam",
            where=where,
            fix="--no-optimizer converts the weights alone",
        )
    return lazy  # type: ignore[return-value]


def _updates(state: Mapping[str, Any]) -> int:
    """Updates that Adam has counted: in the parameters' state, or (Apex) in the groups."""
    adam = state.get("optimizer", state.get("optimizer_state_dict", state))
    each = [value.get("step") for value in adam["state"].values()] + [
        group.get("step") for group in adam["param_groups"]
    ]
    counts = [
        int(step.read()) if hasattr(step, "read") else int(step)
        for step in each[:1] + each[-1:]
        if step is not None
    ]
    return max(counts, default=0)


def _scale(state: Mapping[str, Any]) -> float | None:
    scale = (state.get("grad_scaler") or {}).get("scale")
    if scale is None:
        return None
    return float(scale.read().flatten()[0]) if hasattr(scale, "read") else float(scale)
