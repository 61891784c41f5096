"""What tuning made, in memory: tensors by name, the tags that ask for them, and what they belong to.

    prompts.<n>.tokens (P, D), prompts.<n>.positions (P, D)     the table of tag number n; without positions, the model's are added
    <layer>.lora_a (R, in), <layer>.lora_b (out, R)             what LoRA adds to a linear layer of that name

Knows names, shapes and what fits what. Knows no file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megalith.adapt.method import Tag
from megalith.adapt.soft_prompt import SoftPrompts
from megalith.errors import CheckpointError, ConfigError, Problem

SOFT_PROMPT, P_TUNING, LORA = "soft-prompt", "p-tuning", "lora"
WITH_TAGS = (SOFT_PROMPT, P_TUNING)
TUNING = "tuning"
"""Section of a step folder's state that says what its run tunes: the folder may hold that alone, and no model."""
TABLE = re.compile(r"prompts\.(\d+)\.(tokens|positions)")
DAMAGED = "copy it again, or make it again from its run"
SHOWN = 8
"""Problems listed at most in an error."""
NUMBERS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Base:
    """What an adapter was made for: the model's fingerprint, the path that named it, the tokenizer's hash; empty: not known."""

    fingerprint: str = ""
    name: str = ""
    tokenizer: str = ""


@dataclass(frozen=True)
class Adapter:
    """`family` is empty where nobody said. `settings`: what `Method.describe` says; `path`: where it was read, for messages.

    `tasks`: how a tag's samples were made, where that is not [virtual tokens] text: prompt_template, virtual_token_splits and
    answer_field as in the configuration; before, behind and start: ids around a text and at a decoder's beginning. Of LoRA
    "" is the tag.
    """

    method: str
    family: str
    tensors: Mapping[str, torch.Tensor]
    tags: tuple[Tag, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: Base = Base()
    path: str = ""
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def table(self, number: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens and own positions (P, D) of tag `number`."""
        return self.tensors[f"prompts.{number}.tokens"], self.tensors.get(f"prompts.{number}.positions")

    @property
    def names(self) -> tuple[str, ...]:
        """Of its tags."""
        return tuple(tag.name for tag in self.tags)


def problems(adapter: Adapter) -> list[str]:
    """What keeps tensors and tags from being an adapter."""
    found = [
        f"{name} holds {str(tensor.dtype).removeprefix('torch.')}, not numbers of a model"
        for name, tensor in adapter.tensors.items()
        if tensor.dtype not in NUMBERS
    ]
    found += [
        f"{name} holds numbers that are not finite"
        for name, tensor in adapter.tensors.items()
        if tensor.dtype in NUMBERS and not bool(tensor.isfinite().all())
    ]
    if adapter.method not in (*WITH_TAGS, LORA):
        return [*found, f"its method is {adapter.method!r}, none of {', '.join((*WITH_TAGS, LORA))}"]
    return found + (_table_problems(adapter) if adapter.method in WITH_TAGS else _pair_problems(adapter))


def _table_problems(adapter: Adapter) -> list[str]:
    if not adapter.tags:
        return ["there is no tag in it"]
    found, wanted = [] if all(adapter.names) else ["a tag in it has no name"], {}
    first = adapter.tensors.get("prompts.0.tokens")
    width = first.shape[1] if first is not None and first.ndim == 2 else 0
    for number, tag in enumerate(adapter.tags):
        wanted[f"prompts.{number}.tokens"] = (tag.length, width)
        if tag.positions:
            wanted[f"prompts.{number}.positions"] = (tag.length, width)
    for name in sorted(wanted.keys() | adapter.tensors.keys()):
        tensor = adapter.tensors.get(name)
        if tensor is None:
            found.append(f"{name} is missing")
        elif name not in wanted:
            found.append(f"{name} belongs to no tag")
        elif tuple(tensor.shape) != wanted[name]:
            found.append(f"{name} is {list(tensor.shape)}, its tag wants {list(wanted[name])}")
    twice = sorted({name for name in adapter.names if adapter.names.count(name) > 1})
    return found + [f"the tag {name!r} comes twice" for name in twice]


def _pair_problems(adapter: Adapter) -> list[str]:
    found = [] if adapter.tensors else ["there is no tensor in it"]
    for name, tensor in adapter.tensors.items():
        layer, _, kind = name.rpartition(".")
        if not layer or kind not in ("lora_a", "lora_b"):
            found.append(f"{name} is neither a lora_a nor a lora_b")
            continue
        other = adapter.tensors.get(f"{layer}.{'lora_b' if kind == 'lora_a' else 'lora_a'}")
        if other is None:
            found.append(f"{name} has no other half")
        elif kind == "lora_a" and not (tensor.ndim == other.ndim == 2 and tensor.shape[0] == other.shape[1]):
            found.append(
                f"{layer}: lora_a {list(tensor.shape)} and lora_b {list(other.shape)} do not multiply"
            )
    return found


def checked(adapter: Adapter) -> Adapter:
    """The same. Errors: one `CheckpointError` with all of `problems`."""
    found = problems(adapter)
    if found:
        more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        raise CheckpointError(
            "\n    ".join(["it is damaged, or no adapter", *found[:SHOWN], *more]),
            where=adapter.path,
            fix=DAMAGED,
        )
    return adapter


def joined(adapters: Sequence[Adapter], *, force: bool = False) -> Adapter:
    """Several adapters' tags as one adapter's, in this order.

    Errors: `ConfigError` for a tag that two of them have, for another family or, without `force`, another base or tokenizer, and
    for what has no tags.
    """
    if len(adapters) == 1:
        return adapters[0]
    found: list[Problem] = []
    where = ", ".join(each.path for each in adapters)
    for each in adapters:
        if each.method not in WITH_TAGS:
            found.append(Problem(each.path, "LoRA changes every row, so it goes alone", "give one adapter"))
    owners: dict[str, str] = {}
    for each in adapters:
        for tag in each.names:
            if tag in owners:
                what = f"the tag {tag!r} is in {owners[tag]}, too"
                found.append(Problem(each.path, what, "leave one of them out"))
            owners[tag] = each.path
    found += _strangers(adapters, force)
    if found:
        raise ConfigError(found)
    tensors: dict[str, torch.Tensor] = {}
    for each in adapters:
        tensors |= _renumbered(each.tensors, len({TABLE.fullmatch(name)[1] for name in tensors}))  # type: ignore[index]
    tags = tuple(tag for each in adapters for tag in each.tags)
    methods = {each.method for each in adapters}
    method = methods.pop() if len(methods) == 1 else SOFT_PROMPT
    base = next((each.base for each in adapters if each.base.fingerprint), adapters[0].base)
    tokenizer = next((each.base.tokenizer for each in adapters if each.base.tokenizer), "")
    family = next((each.family for each in adapters if each.family), "")
    tasks = {tag: task for each in adapters for tag, task in each.tasks.items()}
    known = replace(base, tokenizer=tokenizer)
    return Adapter(method, family, tensors, tags, settings_of(tags), known, where, tasks)


def settings_of(tags: Sequence[Tag]) -> dict[str, Any]:
    """What prompts of these tags, which nobody tunes, say of themselves: as `Prompted.describe`."""
    return SoftPrompts(earlier=tags).describe()


def _strangers(adapters: Sequence[Adapter], force: bool) -> list[Problem]:
    """Those that do not belong to what the first one that says so belongs to."""
    said = {"family": [each.family for each in adapters]}
    if not force:
        said["base model"] = [each.base.fingerprint for each in adapters]
        said["tokenizer"] = [each.base.tokenizer for each in adapters]
    found = []
    for what, names in said.items():
        first = next((number for number, name in enumerate(names) if name), 0)
        complaint = f"it is for another {what} than {adapters[first].path}"
        found += [
            Problem(each.path, complaint, "give adapters of one model")
            for each, name in zip(adapters, names, strict=True)
            if name not in ("", names[first])
        ]
    return found


def _renumbered(tensors: Mapping[str, torch.Tensor], before: int) -> dict[str, torch.Tensor]:
    def name(old: str) -> str:
        return TABLE.sub(lambda match: f"prompts.{int(match[1]) + before}.{match[2]}", old)

    return {name(old): tensor for old, tensor in tensors.items()}


def check_base(adapter: Adapter, family: str, base: Base, *, force: bool = False) -> list[str]:
    """What a person should know of an adapter on a model of this family, fingerprint and tokenizer.

    Errors: `CheckpointError` where it was made for another one, unless `force`: then that is only told. What neither side
    knows is not compared.
    """
    if adapter.family and adapter.family != family:
        raise CheckpointError(
            f"it was made for a {adapter.family.upper()}, the base model is a {family.upper()}",
            where=adapter.path,
            fix=f"give the model that it was tuned on{_named(adapter)}",
        )
    pairs = {
        "base model": (adapter.base.fingerprint, base.fingerprint),
        "tokenizer": (adapter.base.tokenizer, base.tokenizer),
    }
    other = [what for what, (mine, here) in pairs.items() if mine and here and mine != here]
    if not other:
        return []
    said = f"it was made for another {' and another '.join(other)}{_named(adapter)}"
    if not force:
        raise CheckpointError(
            said,
            where=adapter.path,
            fix="give that one; --force uses it all the same, and answers may be worthless",
        )
    return [f"{adapter.path}: {said}; it is used because you said so"]


def _named(adapter: Adapter) -> str:
    return f": {adapter.base.name}" if adapter.base.name else ""
