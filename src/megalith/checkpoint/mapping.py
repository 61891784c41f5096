"""What corresponds to what between two formats: a table a family, read in both directions.

    inward    foreign tensors ─ step ─▶ native tensors        importing
    outward   native tensors ─ step ─▶ foreign tensors        exporting

A rule names the native tensors and the foreign ones that hold the same numbers (`{layer}` stands for a number), the step
between them, and the dim that tensor-parallel parts cut. A step works on one part as it works on the whole: import makes each
part native and joins, export cuts and makes each part foreign. Rules of native tensors that a model does not have are left out,
so one table serves with and without biases, gates and tied heads.

Knows tensors and names. Knows no file and no format; the tables live in `formats`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

Tensors = Sequence[torch.Tensor]


class Heads(NamedTuple):
    """`dim` channels of one attention head; `group` query heads share a key-value head."""

    dim: int
    group: int


class Step(Protocol):
    """An invertible change of a few tensors, the same for a tensor-parallel part as for the whole."""

    def inward(self, foreign: Tensors, heads: Heads) -> Tensors: ...
    def outward(self, native: Tensors, heads: Heads) -> Tensors: ...


@dataclass(frozen=True)
class Same:
    """One tensor under two names."""

    def inward(self, foreign: Tensors, heads: Heads) -> Tensors:
        return foreign

    outward = inward


@dataclass(frozen=True)
class Transposed:
    """(in, out) there, (out, in) here; a bias is left as it is."""

    def inward(self, foreign: Tensors, heads: Heads) -> Tensors:
        return [tensor.mT.contiguous() if tensor.ndim == 2 else tensor for tensor in foreign]

    outward = inward


@dataclass(frozen=True)
class HeadOrder:
    """Fused rows of queries, keys and values (or of keys and values) in another order than head by head, [h][3][d].

    `stored` spells the foreign order, outermost first: `3` which of the three (`2`: of the two), `h` head, `d` channel.
    """

    stored: str

    @property
    def _native(self) -> str:
        return "h2d" if "2" in self.stored else "h3d"

    def inward(self, foreign: Tensors, heads: Heads) -> Tensors:
        return [_reordered(tensor, self.stored, self._native, heads) for tensor in foreign]

    def outward(self, native: Tensors, heads: Heads) -> Tensors:
        return [_reordered(tensor, self._native, self.stored, heads) for tensor in native]


def _reordered(rows: torch.Tensor, old: str, new: str, heads: Heads) -> torch.Tensor:
    if heads.group != 1:
        raise ValueError("only heads that each have a key and a value of their own were ever stored so")
    kinds = "2" if "2" in old else "3"
    sizes = {kinds: int(kinds), "h": rows.shape[0] // (int(kinds) * heads.dim), "d": heads.dim}
    apart = rows.reshape(*(sizes[letter] for letter in old), *rows.shape[1:])
    rest = range(3, apart.ndim)
    return apart.permute(*(old.index(letter) for letter in new), *rest).reshape(rows.shape)


@dataclass(frozen=True)
class Woven:
    """Queries, keys and values each in a tensor of its own there; here a group's queries, its key, its value, and so on.

    `queries` False: keys and values alone.
    """

    queries: bool = True

    def inward(self, foreign: Tensors, heads: Heads) -> Tensors:
        groups = foreign[-1].shape[0] // heads.dim
        apart = [tensor.reshape(groups, -1, *tensor.shape[1:]) for tensor in foreign]
        return [torch.cat(apart, 1).flatten(0, 1)]

    def outward(self, native: Tensors, heads: Heads) -> Tensors:
        (fused,) = native
        sizes = (*((heads.group * heads.dim,) if self.queries else ()), heads.dim, heads.dim)
        apart = fused.reshape(-1, sum(sizes), *fused.shape[1:])
        return [part.flatten(0, 1) for part in apart.split(sizes, 1)]


@dataclass(frozen=True)
class Halves:
    """Gate above values in one tensor there; two tensors here."""

    def inward(self, foreign: Tensors, heads: Heads) -> Tensors:
        (fused,) = foreign
        if fused.shape[0] % 2:
            raise ValueError(f"{fused.shape[0]} rows do not halve")
        return fused.chunk(2)

    def outward(self, native: Tensors, heads: Heads) -> Tensors:
        return [torch.cat(tuple(native))]


@dataclass(frozen=True)
class Behind:
    """A table that begins with `rows` rows that nothing looks up there; here it begins with what is looked up."""

    rows: int

    def inward(self, foreign: Tensors, heads: Heads) -> Tensors:
        return [tensor[self.rows :] for tensor in foreign]

    def outward(self, native: Tensors, heads: Heads) -> Tensors:
        return [torch.cat((tensor.new_zeros(self.rows, *tensor.shape[1:]), tensor)) for tensor in native]


@dataclass(frozen=True)
class OneRow:
    """(1, n) there, (n,) here."""

    def inward(self, foreign: Tensors, heads: Heads) -> Tensors:
        return [tensor.squeeze(0) for tensor in foreign]

    def outward(self, native: Tensors, heads: Heads) -> Tensors:
        return [tensor[None] for tensor in native]


@dataclass(frozen=True)
class Then:
    """Two steps, in the order of importing."""

    first: Step
    second: Step

    def inward(self, foreign: Tensors, heads: Heads) -> Tensors:
        return self.second.inward(self.first.inward(foreign, heads), heads)

    def outward(self, native: Tensors, heads: Heads) -> Tensors:
        return self.first.outward(self.second.outward(native, heads), heads)


SAME = Same()


@dataclass(frozen=True)
class Rule:
    """These native tensors hold the numbers of those foreign ones.

    `cut`: the dim of all of them that tensor-parallel parts share out; None: every part has a copy. `padded`: rows behind the
    vocabulary fill a table up, to a number that each format has its own rule for. `copies`: names under which the foreign
    tensor may lie in the files once more, where no native tensor claims them (a tied head).
    """

    native: tuple[str, ...]
    foreign: tuple[str, ...]
    step: Step = SAME
    cut: int | None = None
    padded: bool = False
    copies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """The rules of a family in one format. Of several rules for a native tensor the first that a model has all tensors of holds.

    `aliases`: (pattern, name) of older spellings, put right before the rules are asked. `ignored`: patterns of foreign tensors
    that hold nothing learnt.
    """

    name: str
    rules: tuple[Rule, ...]
    aliases: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()


def table_of_tokens(native: str, foreign: str, *copies: str) -> Rule:
    """A table with a row a token, cut by rows."""
    return Rule((native,), (foreign,), cut=0, padded=True, copies=copies)


def bias_of_tokens(native: str, *foreign: str, step: Step = SAME) -> Rule:
    """A number a token, cut and padded as the table is; `foreign`: its name, then those of copies."""
    return Rule((native,), foreign[:1], step, cut=0, padded=True, copies=foreign[1:])


def norm(native: str, foreign: str) -> tuple[Rule, ...]:
    """Scale and shift of a norm."""
    return tuple(Rule((f"{native}.{kind}",), (f"{foreign}.{kind}",)) for kind in ("weight", "bias"))


def linear(
    native: str | tuple[str, ...],
    foreign: str | tuple[str, ...],
    *,
    cut: int | None = None,
    step: Step = SAME,
) -> tuple[Rule, ...]:
    """Weights and biases of linear layers. A bias goes with the rows: cut where they are, else the same in every part."""
    here, there = ((name,) if isinstance(name, str) else name for name in (native, foreign))
    return tuple(
        Rule(
            tuple(f"{name}.{kind}" for name in here),
            tuple(f"{name}.{kind}" for name in there),
            step,
            cut if kind == "weight" or cut == 0 else None,
        )
        for kind in ("weight", "bias")
    )
