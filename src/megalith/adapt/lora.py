"""LoRA: beside chosen products of every block a low-rank one learns (Hu et al. 2021).

A begins as PEFT's does in variance (its uniform numbers within ±1/√in have 1/(3·in)), B at zero. A target is one of

    qkv, attention.out, mlp.up …     the end of a product's name          all-linear    every product of every block
    embed->mlp                       what it leads from and to, by axes   q_proj, c_fc  PEFT's names, of a whole product
    blocks\\.[0-3]\\.                  a pattern searched in its name

Knows a model's products by name and by axes. Knows no file: PEFT's layout is `peft_lora`'s.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import nn

from megalith.adapt.adapter import DAMAGED
from megalith.adapt.method import Method
from megalith.adapt.spelling import Spelling, projections, spellings
from megalith.checkpoint.local import held
from megalith.checkpoint.slices import inside, whole
from megalith.errors import CheckpointError, ConfigError, Problem
from megalith.models.config import ModelConfig
from megalith.models.family import class_of
from megalith.models.stack import LanguageModel, Rule
from megalith.nn.linear import Linear
from megalith.nn.lora import add_lora
from megalith.parallel.data import reshard
from megalith.parallel.data import whole as gathered_whole
from megalith.topology.topology import Topology, gathered

EVERY = "all-linear"
_AXES = re.compile(r"(\w+)\s*(?:->|→)\s*(\w+)")
_TRAINS = r"\.lora_[ab]$"


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank matrices beside the products that `targets` name. What they add is scaled by `alpha` / `rank`.

    `ranks`: products (by whole names) whose matrices have another rank than `rank`, with the same scale.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = (EVERY,)
    ranks: Mapping[str, int] = field(default_factory=dict)

    name: ClassVar[str] = "lora"

    def __post_init__(self) -> None:
        checks = (
            ("rank", self.rank, self.rank >= 1, "a whole number from 1 up"),
            ("alpha", self.alpha, self.alpha > 0, "a number above 0; twice the rank is usual"),
            ("dropout", self.dropout, 0 <= self.dropout < 1, "0 or more and below 1"),
            (
                "targets",
                list(self.targets),
                bool(self.targets) and all(self.targets),
                f"{EVERY}, or qkv, out, up, down …",
            ),
        )
        problems = [
            Problem(f"model.lora.{key}", f"{value!r} cannot be", fix)
            for key, value, legal, fix in checks
            if not legal
        ]
        if problems:
            raise ConfigError(problems)

    @property
    def scale(self) -> float:
        """What the low-rank product is multiplied by."""
        return self.alpha / self.rank

    def rank_of(self, name: str) -> int:
        """Columns of B of the product of this name."""
        return self.ranks.get(name, self.rank)

    def install(self, model: LanguageModel) -> list[Rule]:
        """Errors: `ConfigError` for targets that the model has not, and ranks beyond a product's sizes."""
        found = chosen(model, self.targets)
        self._check(found)
        model.pick_targets()
        for name, linear in found.items():
            add_lora(
                linear,
                rank=self.rank_of(name),
                scale=self.scale,
                dropout=self.dropout,
                projection=".".join(name.split(".")[-2:]),
            )
        return _rules(found)

    def _check(self, found: Mapping[str, Linear]) -> None:
        problems = [
            Problem(
                "model.lora.rank",
                f"{self.rank_of(name)} is more than {name} has: {linear.weight.shape[1]} → {linear.weight.shape[0]}",
                f"at most {min(linear.weight.shape)}, where a low-rank product could be anything",
            )
            for name, linear in found.items()
            if self.rank_of(name) > min(linear.weight.shape) and name not in self.ranks
        ]
        if problems:
            raise ConfigError(problems[:1])

    @property
    def trains(self) -> tuple[str, ...]:
        return (_TRAINS,)

    @property
    def brings(self) -> tuple[str, ...]:
        return (_TRAINS,)

    def tensors(self, stages: Sequence[nn.Module], topology: Topology) -> dict[str, torch.Tensor]:
        """On every process, in host memory."""
        mine: dict[str, torch.Tensor] = {}
        for stage in stages:
            reshard(stage)
            for name, parameter in stage.named_parameters():
                if re.search(_TRAINS, name):
                    mine[name] = gathered_whole(parameter, topology.device).clone().cpu()
        first = all(topology.rank(axis) == 0 for axis in ("replicate", "shard", "context", "tensor"))
        parts = gathered(mine if first else {}) if topology.size("pipeline") > 1 else [mine]
        return {name: tensor for part in parts for name, tensor in part.items()}

    def fill(self, stages: Sequence[nn.Module], tensors: Mapping[str, torch.Tensor]) -> None:
        """Every process fills what it holds; nothing is sent."""
        _check_shapes(self.shapes(stages[0].config), tensors)  # type: ignore[arg-type]
        for stage in stages:
            reshard(stage)
            mine = {name: p for name, p in stage.named_parameters() if name in tensors}
            for name, part in held(mine).items():
                place = inside(part.part, whole(part.shape))
                part.memory.copy_(tensors[name][place])

    def shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Of all tensors of an artefact for such a model, by name."""
        with torch.device("meta"):
            model = class_of(config)(config)
        self.install(model)  # type: ignore[arg-type]
        return {n: tuple(p.shape) for n, p in model.named_parameters() if re.search(_TRAINS, n)}

    def describe(self) -> dict[str, Any]:
        return asdict(self) | {"targets": list(self.targets), "ranks": dict(self.ranks)}

    @classmethod
    def understand(cls, described: Mapping[str, Any], *, where: str = "") -> Self:
        """Errors: `CheckpointError` for what is no description of it."""
        try:
            return cls(**{**described, "targets": tuple(described["targets"])})
        except (TypeError, KeyError):
            said = ", ".join(f"{name} {value}" for name, value in described.items()) or "nothing"
            raise CheckpointError(
                f"the settings of its LoRA cannot be understood: {said}", where=where, fix=DAMAGED
            ) from None


def _rules(found: Mapping[str, Linear]) -> list[Rule]:
    """The variance depends on the width that A reads: one rule for each width, one for all that begins at zero."""
    widths: dict[int, set[str]] = {}
    for name, linear in found.items():
        pattern = re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name))
        widths.setdefault(linear.weight.shape[1], set()).add(pattern)
    rules: list[Rule] = [(r"\.lora_b$", 0.0)]
    for width, names in widths.items():
        rules.append((rf"^({'|'.join(sorted(names))})\.lora_a$", ("normal", math.sqrt(1 / (3 * width)))))
    return rules


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, torch.Tensor]) -> None:
    problems = [
        f"{name}: {list(tensor.shape)}, the model takes {list(shapes[name]) if name in shapes else 'none'}"
        for name, tensor in tensors.items()
        if shapes.get(name) != tuple(tensor.shape)
    ]
    if problems:
        raise CheckpointError(
            "\n    ".join(["the tensors of LoRA do not fit the model", *problems[:8]]),
            fix="use the base model that it was tuned on",
        )


# -- targets -----------------------------------------------------------------------------------------------------------


def chosen(model: LanguageModel, targets: Sequence[str]) -> dict[str, Linear]:
    """The products that targets name, in the model's order. Errors: `ConfigError` with every target that names none."""
    products = projections(model)
    known = spellings(model.config, list(products))
    named: set[str] = set()
    parts: dict[str, set[str]] = {}
    unknown: list[str] = []
    for target in targets:
        found = _native(target, products)
        foreign = {} if found else _foreign(target, known)
        for native, modules in foreign.items():
            parts.setdefault(native, set()).update(modules)
        if not found and not foreign:
            try:
                found = {name for name in products if re.search(target, name)}
            except re.error:
                found = set()
        if not found and not foreign:
            unknown.append(target)
        named |= found
    problems = [_unknown(unknown, products, known)] if unknown else []
    for native, modules in parts.items():
        left = [module for module in known[native].foreign if module not in modules]
        if left and native not in named:
            problems.append(_part(native, left))
        named.add(native)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return {name: linear for name, linear in products.items() if name in named}


def _native(target: str, products: Mapping[str, Linear]) -> set[str]:
    if target == EVERY:
        return set(products)
    if axes := _AXES.fullmatch(target):
        return {name for name, linear in products.items() if linear.axes == (axes[2], axes[1])}
    return {name for name in products if _ends(name, target)}


def _foreign(target: str, known: Mapping[str, Spelling]) -> dict[str, list[str]]:
    """Products of which a module of transformers ends like this → these modules."""
    found = {n: [m for m in each.foreign if _ends(m, target)] for n, each in known.items()}
    return {name: modules for name, modules in found.items() if modules}


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _unknown(
    targets: Sequence[str], products: Mapping[str, Linear], known: Mapping[str, Spelling]
) -> Problem:
    names = dict.fromkeys(name.rpartition(".")[2] for name in products)
    axes = dict.fromkeys(f"{linear.axes[1]}->{linear.axes[0]}" for linear in products.values())
    theirs = dict.fromkeys(m.rpartition(".")[2] for each in known.values() for m in each.foreign)
    said = [f"{EVERY}; by name {', '.join(names)}", *([f"as in PEFT {', '.join(theirs)}"] if theirs else [])]
    said += [f"by axes {', '.join(axes)}", f"or a pattern of names such as {next(iter(products))}"]
    what = f"the model has no product called {' or '.join(map(repr, targets))}"
    return Problem("model.lora.targets", what, "; ".join(said))


def _part(native: str, left: Sequence[str]) -> Problem:
    where = re.sub(r"\.\d+\.", ".*.", native)
    names = " and ".join(module.rpartition(".")[2] for module in left)
    return Problem(
        "model.lora.targets",
        f"{where} learns as one, and of it {names} {'is' if len(left) == 1 else 'are'} no target",
        f"add {names}, or say {native.rpartition('.')[2]}",
    )
