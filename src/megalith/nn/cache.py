"""Keys and values of the tokens already seen, in buffers of fixed size, for generation.

The model advances `length` once a forward, after its last block; a block only writes its new columns. Knows nothing
of sampling. Refuses to grow: a full cache is an error, not a copy.

    length = 3, four new tokens     |k k k|n n n n|. . .|        max_length = 10

Legend: B batch, G key-value heads, K head_dim, T new tokens, S tokens seen
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megalith.errors import UnsupportedError


class LayerCache(NamedTuple):
    """One layer's buffers (B, G, max_length, K), and how many columns were filled before this forward."""

    keys: torch.Tensor
    values: torch.Tensor
    start: int

    def extend(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes (B, G, T, K) after the filled columns; returns views of all S = start + T filled columns."""
        end = self.start + k.shape[2]
        self.keys[:, :, self.start : end] = k
        self.values[:, :, self.start : end] = v
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """Static key and value buffers of all layers of one stage. `length` is how many tokens they hold."""

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

    @property
    def batch(self) -> int:
        return self.keys.shape[1]

    @property
    def max_length(self) -> int:
        return self.keys.shape[3]

    def layer(self, index: int) -> LayerCache:
        """The buffers of the stage's layer number `index`, counted from the stage's first."""
        return LayerCache(self.keys[index], self.values[index], self.length)

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

    def rewind(self, length: int = 0) -> None:
        """Forgets all but the first `length` tokens."""
        self.length = min(self.length, length)
