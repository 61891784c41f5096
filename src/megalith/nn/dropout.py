"""Dropout whose mask is a hash, not a random state: the same on every layout, micro-batch size and recomputation.

Bit (sample, layer, site, position, channel) = counter-based hash of the sample's key and these indices. A key is a
hash of (seed, step, global sample index); the layer is mixed in outside the blocks, so that one compiled block serves
all layers. Keys are 32-bit values held in int64; the hash of every element, the costly part, is in wrapping int32.

    sample_keys(seed, step, sample) ─ layer_keys(keys, layer) ─▶ Dropout(site)(x, keys)

Legend: B batch, T time, D width, H heads, S keys attended to
"""

from __future__ import annotations

import torch
from torch import nn

SITE_EMBEDDING, SITE_ATTENTION, SITE_MLP, SITE_PROBABILITIES = 0, 1, 2, 3
SITE_CROSS, SITE_CROSS_PROBABILITIES, SITE_DECODER_EMBEDDING, SITE_PROMPT = 4, 5, 6, 7
SITE_LORA = 8
"""And on: one for each of `lora.PROJECTIONS`."""
_SITES = (
    "embedding",
    "attention",
    "mlp",
    "probabilities",
    "cross",
    "cross probabilities",
    "decoder embedding",
    "prompt",
)
_WORD = 0xFFFFFFFF
_MULTIPLIER = 0x45D9F3B


def mix(x: torch.Tensor) -> torch.Tensor:
    """A bijective 32-bit integer hash of each element (int64 holding 32-bit values); the multiplier is below 2³¹."""
    for _ in range(2):
        x = ((x >> 16) ^ x) * _MULTIPLIER & _WORD
    return (x >> 16) ^ x


def mix_(x: torch.Tensor) -> torch.Tensor:
    """The same hash of int32 elements, in place: products wrap to the same 32 bits at a tenth of the cost."""
    for _ in range(2):
        x ^= (x >> 16).bitwise_and_(0xFFFF)
        x *= _MULTIPLIER
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def sample_keys(seed: int, step: int, sample: torch.Tensor) -> torch.Tensor:
    """(B,) int64 keys of the samples of one step, from the run's seed, the step and the global sample indices (B,)."""
    run = mix(torch.tensor([seed & _WORD, (seed >> 32) & _WORD, step & _WORD], dtype=torch.int64))
    head = mix(mix(run[0] ^ mix(run[1] + 1)) ^ mix(run[2] + 2))
    head = head.to(sample.device, non_blocking=True)  # a blocking copy would wait for the micro-batch before
    return mix(mix(head ^ (sample & _WORD)) + (sample >> 32) & _WORD)


def layer_keys(keys: torch.Tensor, layer: int) -> torch.Tensor:
    """The samples' keys for one layer, numbered from 0 over the whole model; (B,) → (B,)."""
    return mix(keys + 0x632BE5 * (layer + 1) & _WORD)


class Dropout(nn.Module):
    """Zeroes elements with probability `rate`, scales the others by 1/(1 − rate); the identity in evaluation.

    `site` tells apart the places of one block that drop. `rows` is what a sequence- or context-parallel swap
    overrides: the positions in the whole sequence of the local rows.
    """

    def __init__(self, rate: float, site: int) -> None:
        super().__init__()
        self.rate, self.site = rate, site

    def rows(self, length: int, device: torch.device) -> torch.Tensor:
        """(T,) positions, in the whole sequence, of the rows that this process holds."""
        return torch.arange(length, device=device)

    def first_column(self, width: int) -> int:
        """The place, in the whole model, of the first of the `width` channels that this process holds."""
        return 0

    def forward(self, x: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
        """(B, T, D), (B,) → (B, T, D). A row's hash is made first: no two (sample, position) share a pattern."""
        if not (self.training and self.rate):
            return x
        with torch.no_grad():
            row = mix(required(keys)[:, None] + self.site & _WORD)
            row = mix(row ^ self.rows(x.shape[1], x.device))
            keep = kept(row, x.shape[2], self.rate, self.first_column(x.shape[2]))
        return x * keep * (1 / (1 - self.rate))

    def extra_repr(self) -> str:
        return f"{self.rate:g}, site={_SITES[self.site]}"


class ProbabilityDropout(Dropout):
    """The same on attention probabilities (B, H, T, S); `heads` is what a tensor-parallel swap overrides."""

    def heads(self, count: int, device: torch.device) -> torch.Tensor:
        """(H,) numbers, in the whole model, of the heads that this process holds."""
        return torch.arange(count, device=device)

    def forward(self, x: torch.Tensor, keys: torch.Tensor | None, first: int = 0) -> torch.Tensor:
        """`first`: the place, in the whole sequence, of the first query."""
        if not (self.training and self.rate):
            return x
        with torch.no_grad():
            head = mix(mix(required(keys)[:, None] + self.site & _WORD) ^ self.heads(x.shape[1], x.device))
            row = mix(head[:, :, None] ^ (self.rows(x.shape[2], x.device) + first))
            keep = kept(row, x.shape[3], self.rate)
        return x * keep * (1 / (1 - self.rate))


def kept(row: torch.Tensor, columns: int, rate: float, first: int = 0) -> torch.Tensor:
    """(…) hashes of rows → (…, columns) bool, False with probability `rate`: the element's hash is below the threshold.

    `first`: the number of the first column.
    """
    column = torch.arange(first, first + columns, device=row.device, dtype=torch.int32)
    bits = mix_(row.to(torch.int32)[..., None] ^ column)
    return bits >= int(rate * 2**32) - 2**31


def required(keys: torch.Tensor | None) -> torch.Tensor:
    """The keys, or an error that says how to make them: training with dropout without keys is a programmer's slip."""
    if keys is None:
        raise ValueError(
            "dropout in training needs keys: pass keys=sample_keys(seed, step, sample) to the model"
        )
    return keys
