"""Initial weights as a function of (seed, parameter name, element), whatever slice of it this process holds.

A parameter is cut into blocks of rows; the numbers of a block come from a generator seeded by a hash of (seed, name,
block). So any rank makes its own rows, and only them, and every layout starts from the same numbers. Knows patterns
and distributions; which parameter gets which is the model's table.

    rows 0 … 63 ─ hash(seed, name, 0)      rows 64 … 127 ─ hash(seed, name, 1)      …
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

import torch

from megalith.topology.sharded import is_dtensor

ROWS_PER_BLOCK = 64

Distribution = tuple[str, float] | float
Rule = tuple[str, Distribution]


@torch.no_grad()
def initialise(
    named_parameters: Iterable[tuple[str, torch.Tensor]], rules: Sequence[Rule], seed: int
) -> None:
    """Fills parameters in place; of a DTensor, this process's slice (call before FSDP shards further).

    `rules`: ordered (regular expression searched in the name, ("normal", std) or a constant); the first match decides.
    Numbers are drawn in fp32 on the CPU and cast, so they agree between devices and dtypes.
    Errors: `ValueError` for a name that no rule matches, or an unknown distribution.
    """
    for name, parameter in named_parameters:
        local = parameter.to_local() if is_dtensor(parameter) else parameter
        fill(local, first_indices(parameter), tuple(parameter.shape), block_source(name, rules, seed))


class BlockSource:
    """The numbers of one parameter: `rows(block, shape)` gives 64 rows, always the same."""

    def __init__(self, name: str, distribution: Distribution, seed: int) -> None:
        self.name, self.distribution, self.seed = name, distribution, seed

    @property
    def constant(self) -> float | None:
        return None if isinstance(self.distribution, tuple) else float(self.distribution)

    def rows(self, block: int, width: Sequence[int]) -> torch.Tensor:
        """(64, *width) fp32."""
        assert isinstance(self.distribution, tuple)
        kind, std = self.distribution
        if kind != "normal":
            raise ValueError(f"{self.name}: no distribution is called {kind!r}")
        digest = hashlib.blake2b(f"{self.seed}/{self.name}/{block}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.empty(ROWS_PER_BLOCK, *width, dtype=torch.float32).normal_(0.0, std, generator=generator)


def block_source(name: str, rules: Sequence[Rule], seed: int) -> BlockSource:
    """The source of a parameter by the first rule whose pattern its name contains."""
    for pattern, distribution in rules:
        if re.search(pattern, name):
            return BlockSource(name, distribution, seed)
    raise ValueError(f"no rule says how {name} starts")


def fill(local: torch.Tensor, first: Sequence[int], shape: Sequence[int], source: BlockSource) -> None:
    """Fills `local`, the part of a tensor of `shape` that begins at index `first`."""
    if source.constant is not None:
        local.fill_(source.constant)
        return
    if local.numel() == 0:
        return
    begin, end = first[0], first[0] + local.shape[0]
    columns = tuple(slice(f, f + n) for f, n in zip(first[1:], local.shape[1:], strict=True))
    for block in range(begin // ROWS_PER_BLOCK, -(-end // ROWS_PER_BLOCK)):
        origin = block * ROWS_PER_BLOCK
        low, high = max(begin, origin), min(end, origin + ROWS_PER_BLOCK)
        rows = source.rows(block, shape[1:])[low - origin : high - origin]
        local[low - begin : high - begin] = rows[(slice(None), *columns)].to(local.device, local.dtype)


def first_indices(parameter: torch.Tensor) -> list[int]:
    """Index of this process's first element in the whole tensor, one number a dimension; zeros for a plain tensor."""
    if not is_dtensor(parameter):
        return [0] * parameter.ndim
    mesh = parameter.device_mesh
    cuts = []
    for axis, placement in enumerate(parameter.placements):
        if not placement.is_replicate():
            dim: int = placement.dim  # type: ignore[attr-defined]  # every placement that is not replicated has one
            cuts.append((dim, mesh.size(axis), mesh.get_local_rank(axis)))
    return offsets(parameter.shape, cuts)


def offsets(shape: Sequence[int], cuts: Iterable[tuple[int, int, int]]) -> list[int]:
    """First index of the piece left by `cuts`: (dimension, number of parts, which part), each as `torch.chunk` cuts."""
    first, length = [0] * len(shape), list(shape)
    for dim, parts, part in cuts:
        chunk = -(-length[dim] // parts)
        begin = min(part * chunk, length[dim])
        first[dim] += begin
        length[dim] = min(chunk, length[dim] - begin)
    return first
