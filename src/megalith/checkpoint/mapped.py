"""Foreign tensors as native ones, by a table of rules: each is made alone, when it is read.

    foreign name → its tensor-parallel parts ─▶ native name → Mapped

Everything that can be known without reading is checked first, by running the steps on tensors without memory: every foreign
tensor is used, every native one made, every shape is right. Knows no format.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from megalith.checkpoint.lazy import Lazy
from megalith.checkpoint.local import Held, held
from megalith.checkpoint.mapping import Heads, Rule, Step, Table
from megalith.checkpoint.slices import Slice, inside, overlap, shape_of, whole
from megalith.checkpoint.tensor_files import LazyTensor, Part
from megalith.errors import CheckpointError

Parts = tuple[Lazy, ...]
"""A foreign tensor: one for each tensor-parallel rank of its file, in their order; a tensor that is whole is the only one."""
WEIGHTS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Narrower ones mean something only with scales that lie elsewhere."""
SHOWN = 8
"""Names listed at most of each side in an error."""


@dataclass(frozen=True)
class Bound:
    """A rule with the number of its layer put in."""

    rule: Rule
    native: tuple[str, ...]
    foreign: tuple[str, ...]
    copies: tuple[str, ...]


def canonical(table: Table, name: str) -> str:
    """The name that the rules know for an older spelling."""
    for pattern, replacement in table.aliases:
        name = re.sub(pattern, replacement, name)
    return name


def bind(table: Table, names: Sequence[str] | Mapping[str, object]) -> list[Bound]:
    """The rules for native tensors of these names, each of which one rule must have. Errors: `CheckpointError` naming the rest."""
    layers = sorted({int(found[1]) for name in names if (found := re.search(r"\.(\d+)\.", name))})
    free, bound = dict.fromkeys(names), []
    for rule in table.rules:
        for layer in layers if "{layer}" in rule.native[0] else [0]:
            here, there, copies = (
                tuple(name.format(layer=layer) for name in side)
                for side in (rule.native, rule.foreign, rule.copies)
            )
            if all(name in free for name in here):
                bound.append(Bound(rule, here, there, copies))
                for name in here:
                    del free[name]
    if free:
        raise CheckpointError(f"{table.name} has no place for {_some(list(free))}")
    return bound


@dataclass(frozen=True)
class Mapped:
    """A native tensor that is made of foreign ones when it is read, part by part."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    bound: Bound
    parts: tuple[tuple[Lazy, ...], ...]
    """For each tensor-parallel part the rule's foreign tensors."""
    places: tuple[Slice, ...]
    """Where in the native tensor each part lies; rows behind the native table's last may be among them."""
    heads: Heads

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The whole tensor, in host memory."""
        return self._fetch(whole(self.shape))

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` (exclusive) of the first dim."""
        return self._fetch(((start, stop), *whole(self.shape[1:])))

    def read_into(self, tensor: torch.Tensor) -> None:
        """Fills `tensor` (same shape, any dtype) in place: of a DTensor, what this process holds."""
        self.fill(held({self.name: tensor})[self.name])

    def fill(self, mine: Held) -> None:
        """Fills the memory that a process holds, in its dtype; of the files only parts that it needs are read."""
        for lazies, place in zip(self.parts, self.places, strict=True):
            common = overlap(place, mine.part)
            if common is not None:
                self._fill_from(lazies, place, common, mine.memory[inside(common, mine.part)])
        stored = self.places[-1][0][1] if self.shape else 0
        if self.bound.rule.padded and stored < self.shape[0]:
            behind = overlap(((stored, self.shape[0]), *whole(self.shape[1:])), mine.part)
            if behind is not None:
                mine.memory[inside(behind, mine.part)].zero_()

    def _fill_from(self, lazies: Sequence[Lazy], place: Slice, common: Slice, target: torch.Tensor) -> None:
        at = self.bound.native.index(self.name)
        lying = _as_it_lies(self.bound.rule.step, lazies, at, self.heads)
        index = inside(common, place)
        if lying is None:
            made = self.bound.rule.step.inward([lazy.read() for lazy in lazies], self.heads)
            target.copy_(made[at][index])
        elif lying.dtype == target.dtype:
            lying.fill(Held(target, lying.shape, tuple((i.start, i.stop) for i in index)))
        else:
            stored = torch.empty(target.shape, dtype=lying.dtype)
            lying.fill(Held(stored, lying.shape, tuple((i.start, i.stop) for i in index)))
            target.copy_(stored)

    def _fetch(self, place: Slice) -> torch.Tensor:
        tensor = torch.empty(shape_of(place), dtype=self.dtype)
        self.fill(Held(tensor, self.shape, place))
        return tensor


def natives(
    table: Table,
    shapes: Mapping[str, tuple[int, ...]],
    foreign: Mapping[str, Parts],
    heads: Heads,
    *,
    where: str,
) -> dict[str, Mapped]:
    """The native tensors of these names and shapes, made of the foreign ones by the table, whatever their number of parts.

    Errors: one `CheckpointError` for foreign tensors that nothing takes, native ones that nothing makes, and shapes that differ.
    """
    foreign = {canonical(table, name): parts for name, parts in foreign.items()}
    made: dict[str, Mapped] = {}
    used: set[str] = set()
    missing: list[str] = []
    wrong: list[str] = []
    for bound in bind(table, shapes):
        used.update(bound.foreign, bound.copies)
        absent = [name for name in bound.foreign if name not in foreign]
        missing += absent
        wrong += [
            f"wrong dtype: {name}: {lazy.dtype} is no form that weights are read from"
            for name in bound.foreign
            for lazy in foreign.get(name, ())[:1]
            if lazy.dtype not in WEIGHTS
        ]
        if not absent:
            for mapped in _mapped(bound, foreign, shapes, heads):
                made[mapped.name] = mapped
                if mapped.shape != shapes[mapped.name]:
                    wrong.append(
                        f"wrong shape: {', '.join(bound.foreign)}: makes {mapped.name} {_size(mapped.shape)}, "
                        f"by the configuration it is {list(shapes[mapped.name])}"
                    )
    left = [name for name in foreign if name not in used and not _ignored(table, name)]
    if missing or left or wrong:
        raise _misfit(table, missing, left, wrong, where)
    return made


def _mapped(
    bound: Bound, foreign: Mapping[str, Parts], shapes: Mapping[str, tuple[int, ...]], heads: Heads
) -> Iterator[Mapped]:
    rule = bound.rule
    count = 1 if rule.cut is None else max(len(foreign[name]) for name in bound.foreign)
    parts = tuple(tuple(foreign[name][i] for name in bound.foreign) for i in range(count))
    for i, name in enumerate(bound.native):
        places = _places_of(bound, parts, i, heads)
        shape = tuple(stop for _, stop in places[-1]) if places else (-1,)
        fits = all(place[1:] == places[0][1:] or rule.cut == 1 for place in places)
        if rule.padded and fits and places and shape[1:] == shapes[name][1:]:
            shape = shapes[name]
        yield Mapped(name, parts[0][0].dtype, shape if fits else (-1,), bound, parts, places, heads)


def _places_of(bound: Bound, parts: Sequence[Sequence[Lazy]], index: int, heads: Heads) -> tuple[Slice, ...]:
    """Where the parts of a native tensor lie, by running the step without memory; empty where it cannot be run."""
    rule = bound.rule
    try:
        made = [rule.step.inward([_bare(lazy) for lazy in part], heads)[index] for part in parts]
        return _places([tuple(tensor.shape) for tensor in made], rule.cut)
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError):
        return ()


def _places(pieces: Sequence[tuple[int, ...]], cut: int | None) -> tuple[Slice, ...]:
    """Where parts of these shapes lie, one behind the other along `cut`."""
    found: list[Slice] = []
    position = 0
    for shape in pieces:
        place = list(whole(shape))
        if cut is not None:
            place[cut] = (position, position + shape[cut])
            position += shape[cut]
        found.append(tuple(place))
    return tuple(found)


def _bare(lazy: Lazy) -> torch.Tensor:
    return torch.empty(lazy.shape, dtype=lazy.dtype, device="meta")


def _as_it_lies(step: Step, lazies: Sequence[Lazy], index: int, heads: Heads) -> LazyTensor | None:
    """What a step makes of foreign tensors, where that is one run of bytes of one of them: all of it, a half. None: it must be made."""
    bare = [_bare(lazy) for lazy in lazies]
    made = step.inward(bare, heads)[index]
    for lazy, tensor in zip(lazies, bare, strict=True):
        if not isinstance(lazy, LazyTensor) or not shares_memory(made, tensor):
            continue
        if made.shape == tensor.shape and made.is_contiguous():
            return lazy
        if made.is_contiguous() and len(lazy.parts) == 1 and lazy.parts[0].place == whole(lazy.shape):
            part, shape = lazy.parts[0], tuple(made.shape)
            offset = part.offset + int(made.storage_offset()) * lazy.dtype.itemsize
            return LazyTensor(lazy.name, lazy.dtype, shape, (Part(part.path, offset, whole(shape)),))
    return None


def shares_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Is one a view of the other, also where neither has memory?"""
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def _ignored(table: Table, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in table.ignored)


def _misfit(
    table: Table, missing: Sequence[str], left: Sequence[str], wrong: Sequence[str], where: str
) -> CheckpointError:
    lines = [f"its tensors do not fit {table.name}"]
    for name in missing[:SHOWN]:
        near = difflib.get_close_matches(name, left, n=1, cutoff=0.6)
        lines.append(f"missing: {name}" + (f" (there is {near[0]})" if near else ""))
    if len(missing) > SHOWN:
        lines.append(f"and {len(missing) - SHOWN} more are missing")
    for name in left[:SHOWN]:
        near = difflib.get_close_matches(name, missing, n=1, cutoff=0.6)
        lines.append(f"not known: {name}" + (f" (as {near[0]}?)" if near else ""))
    if len(left) > SHOWN:
        lines.append(f"and {len(left) - SHOWN} more are not known")
    lines += wrong[:SHOWN]
    if len(wrong) > SHOWN:
        lines.append(f"and {len(wrong) - SHOWN} more are wrong")
    fix = "its files are incomplete, or its configuration tells of another model"
    return CheckpointError("\n    ".join(lines), where=where, fix=fix)


def _size(shape: tuple[int, ...]) -> str:
    return "nothing that fits" if shape == (-1,) else str(list(shape))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
