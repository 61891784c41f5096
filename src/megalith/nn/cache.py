"""Keys and values of the tokens already seen, in buffers of fixed size, for generation.

The model advances `length` once a forward, after its last block; a block only writes its new columns. Knows nothing
of sampling. Refuses to grow: a full cache is an error, not a copy.

    length = 3, four new tokens     |k k k|n n n n|. . .|        max_length = 10

Prompts of different lengths are read padded at their ends, where a causal model's padding disturbs nobody; then
`align_right` moves each row to the common end, so that all rows go on in the same column:

    |a b c d e|. . .|  align_right([5, 2])  |a b c d e|. . .|
    |x y - - -|. . .|  ───────────────────▶ |- - - x y|. . .|      shift = [0, 3]

Of a decoder that looks at an encoder it also holds the memory's keys and values, which are made once (`remember`).

Legend: B batch, G key-value heads, K head_dim, T new tokens, S tokens seen, M tokens of an encoder
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megalith.errors import UnsupportedError

Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values."""


class LayerCache(NamedTuple):
    """One layer's buffers (B, G, max_length, K), and how many columns were filled before this forward.

    `across`: keys and values (B, G, M, K) of an encoder's memory.
    """

    keys: torch.Tensor
    values: torch.Tensor
    start: int
    across: Pair | None = None

    def extend(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes (B, G, T, K) after the filled columns; returns views of all S = start + T filled columns."""
        end = self.start + k.shape[2]
        self.keys[:, :, self.start : end] = k
        self.values[:, :, self.start : end] = v
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """Static key and value buffers of all layers of one stage. `length` is how many columns they hold.

    `shift` (B,): how many leading columns of each row hold nothing; None when every row starts at the first. `across`: of
    each layer the memory's keys and values, of which row i has the first `sources` (B,)[i] columns, None: all.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        max_length: int,
        kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (layers, batch, kv_heads, max_length, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0
        self.shift: torch.Tensor | None = None
        self.across: list[Pair] = []
        self.sources: torch.Tensor | None = None
        self._shifts = [0] * batch

    @property
    def batch(self) -> int:
        return self.keys.shape[1]

    @property
    def max_length(self) -> int:
        return self.keys.shape[3]

    def layer(self, index: int) -> LayerCache:
        """The buffers of the stage's layer number `index`, counted from the stage's first."""
        across = self.across[index] if self.across else None
        return LayerCache(self.keys[index], self.values[index], self.length, across)

    def remember(self, across: Sequence[Pair], sources: torch.Tensor | None) -> None:
        """Takes each layer's keys and values (B, G, M, K) of an encoder's memory, padded behind `sources` (B,) columns."""
        dtype = self.keys.dtype
        self.across, self.sources = [(k.to(dtype), v.to(dtype)) for k, v in across], sources

    def check(self, batch: int, tokens: int) -> None:
        """Errors: `UnsupportedError` when (batch, tokens) more do not fit."""
        if batch != self.batch:
            raise UnsupportedError(
                f"a batch of {batch} rows for a key-value cache of {self.batch}",
                where="KVCache",
                fix="make one per batch",
            )
        if self.length + tokens > self.max_length:
            raise UnsupportedError(
                f"{self.length} tokens cached and {tokens} new ones, but the cache holds {self.max_length}",
                where="KVCache",
                fix="make it longer: model.new_cache(batch, max_length)",
            )

    def advance(self, tokens: int) -> None:
        self.length += tokens

    @property
    def furthest(self) -> int:
        """Position of the next token of the longest row."""
        return self.length - min(self._shifts)

    def positions(self, tokens: int) -> torch.Tensor:
        """Positions of the next tokens within their rows: (T,), or (B, T) where rows are shifted."""
        columns = torch.arange(self.length, self.length + tokens, device=self.keys.device)
        return columns if self.shift is None else columns - self.shift[:, None]

    def visible(self, tokens: int) -> torch.Tensor | None:
        """(B, 1, T, S) bool, True where a new token may look; None where rows are not shifted: the usual causal rule."""
        if self.shift is None:
            return None
        keys = torch.arange(self.length + tokens, device=self.keys.device)
        filled = (keys >= self.shift[:, None])[:, None, None]
        return filled if tokens == 1 else filled & (keys <= keys[self.length :, None])

    def align_right(self, lengths: Sequence[int]) -> None:
        """Keeps the first `lengths[i]` columns of row i and moves them to end at the last filled column."""
        if all(length == self.length for length in lengths):
            return
        self._shifts = [self.length - length for length in lengths]
        for row, (by, length) in enumerate(zip(self._shifts, lengths, strict=True)):
            for buffer in (self.keys, self.values):
                buffer[:, row, :, by : self.length] = buffer[:, row, :, :length].clone()
        self.shift = torch.tensor(self._shifts, device=self.keys.device)

    def drop(self, row: int) -> None:
        """Forgets one row. The last row takes its place: only that one is copied."""
        last = self.batch - 1
        if row != last:
            self.keys[:, row, :, : self.length] = self.keys[:, last, :, : self.length]
            self.values[:, row, :, : self.length] = self.values[:, last, :, : self.length]
            for buffer in (*(b for pair in self.across for b in pair), self.sources):
                if buffer is not None:
                    buffer[row] = buffer[last]
        self.keys, self.values = self.keys[:, :last], self.values[:, :last]
        self.across = [(k[:last], v[:last]) for k, v in self.across]
        self.sources = None if self.sources is None else self.sources[:last]
        self._shifts[row] = self._shifts[last]
        del self._shifts[last]
        if self.shift is not None:
            self.shift = torch.tensor(self._shifts, device=self.keys.device)

    def select(self, rows: torch.Tensor, *, moved: bool = False) -> None:
        """Goes on with these rows (N,), in this order, each as often as it is named.

        `moved`: each takes the place of one that looks at the same memory, which therefore stays.
        """
        if len(rows) > self.batch:
            self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        else:
            for buffer in (self.keys, self.values):
                buffer[:, : len(rows), :, : self.length] = buffer[:, rows, :, : self.length]
            self.keys, self.values = self.keys[:, : len(rows)], self.values[:, : len(rows)]
        if not moved:
            self.across = [(k[rows], v[rows]) for k, v in self.across]
            self.sources = None if self.sources is None else self.sources[rows]
        self._shifts = [self._shifts[row] for row in rows.tolist()]
        if self.shift is not None:
            self.shift = self.shift[rows]

    def rewind(self, length: int = 0) -> None:
        """Forgets all but the first `length` tokens."""
        self.length = min(self.length, length)
