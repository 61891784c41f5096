"""Who writes what of a save: every slice once, by a process that holds it, and each process about as many bytes.

    each process: what it holds ─ gathered ─▶ each process computes the same plan ─▶ its own files, and everybody's table

One process writes whole tensors into `model.safetensors` and `optim.safetensors`; process i of n writes its slices into
`model-0000i-of-0000n.safetensors` and its like. Knows names, slices and memory. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from megalith.checkpoint.header import ITEM_BYTES
from megalith.checkpoint.local import Held, held
from megalith.checkpoint.manifest import TensorRecord, entry_name
from megalith.checkpoint.slices import Slice, cut, elements, inside, problem, whole
from megalith.checkpoint.tensor_files import describe

LARGEST = 32 << 20
"""Bytes of a slice that several processes hold beyond which they share the writing of it."""


@dataclass(frozen=True)
class Offer:
    """What a process holds of a tensor: `dtype` as safetensors names it, the `shape` of all of it, and which part."""

    dtype: str
    shape: tuple[int, ...]
    part: Slice


Files: TypeAlias = dict[str, dict[str, torch.Tensor]]
"""file → name of an entry in it → its numbers."""


@dataclass(frozen=True)
class Plan:
    """`table` is what the manifest will say of tensors; `files` is what this process writes, sharing the tensors' memory."""

    table: dict[str, TensorRecord]
    files: Files

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, whoever writes them."""
        return sum(record.nbytes for record in self.table.values())


def offers(tensors: Mapping[str, torch.Tensor]) -> dict[str, Offer]:
    """What this process can write. Raises `ValueError` for a name without a kind, `TypeError` for a dtype nobody can read."""
    for name in tensors:
        kind, dot, rest = name.partition(".")
        if not (dot and rest and kind.isidentifier()):
            raise ValueError(
                f"{name!r}: the name of a saved tensor starts with its kind, as in 'model.{name}'"
            )
    described = {name: describe(tensor) for name, tensor in tensors.items()}
    return {name: Offer(*described[name], mine.part) for name, mine in held(tensors).items()}


def make_plan(
    tensors: Mapping[str, torch.Tensor], everyone: Sequence[Mapping[str, Offer]], rank: int
) -> Plan:
    """The plan of a save, the same on every process but for `files`. Raises `ValueError` where the offers do not fit together."""
    known = _known(everyone)
    writers = _writers(known, everyone)
    slices: dict[str, dict[Slice, str]] = {name: {} for name in known}
    files: Files = {
        file_name(kind, rank, len(everyone)): {} for kind in sorted({n.partition(".")[0] for n in known})
    }
    mine = held(tensors)
    for (name, part), writer in writers.items():
        file = file_name(name.partition(".")[0], writer, len(everyone))
        slices[name][part] = file
        if writer == rank:
            files[file][entry_name(name, part, known[name][1])] = _memory(mine[name], part)
    for name, (_, shape) in known.items():
        if wrong := problem(shape, slices[name]):
            raise ValueError(f"{name} cannot be saved: {wrong}")
    return Plan({name: TensorRecord(*known[name], slices[name]) for name in known}, files)


def file_name(kind: str, rank: int, size: int) -> str:
    """`model.safetensors`, or the file of one of several processes."""
    return f"{kind}.safetensors" if size == 1 else f"{kind}-{rank + 1:05d}-of-{size:05d}.safetensors"


def _memory(mine: Held, part: Slice) -> torch.Tensor:
    return mine.memory[inside(part, mine.part)] if part != mine.part else mine.memory


def _known(everyone: Sequence[Mapping[str, Offer]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """name → dtype and whole shape, on which all must agree."""
    known: dict[str, tuple[str, tuple[int, ...]]] = {}
    for rank, offered in enumerate(everyone):
        for name, offer in offered.items():
            here = offer.dtype, offer.shape
            if known.setdefault(name, here) != here:
                raise ValueError(f"{name} is {here} on process {rank}, {known[name]} on one before it")
    return known


def _writers(
    known: Mapping[str, tuple[str, tuple[int, ...]]], everyone: Sequence[Mapping[str, Offer]]
) -> dict[tuple[str, Slice], int]:
    """(name, slice) → the process that writes it: what only one holds first, then the largest to who has least to do."""
    holders: dict[tuple[str, Slice], list[int]] = {}
    for rank, offered in enumerate(everyone):
        for name, offer in offered.items():
            if elements(offer.part) or offer.part == whole(offer.shape):
                holders.setdefault((name, offer.part), []).append(rank)
    pieces = [
        (elements(small) * ITEM_BYTES[known[name][0]], name, small, ranks)
        for (name, part), ranks in holders.items()
        for small in (_cut(part, known[name][0]) if len(ranks) > 1 else [part])
    ]
    load = [0] * len(everyone)
    writers: dict[tuple[str, Slice], int] = {}
    for size, name, part, ranks in sorted(pieces, key=lambda p: (len(p[3]) > 1, -p[0], p[1], p[2])):
        writer = min(ranks, key=lambda rank: (load[rank], rank))
        load[writer] += size
        writers[name, part] = writer
    return writers


def _cut(part: Slice, dtype: str) -> list[Slice]:
    return cut(part, LARGEST // ITEM_BYTES[dtype])
