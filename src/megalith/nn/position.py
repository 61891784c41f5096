"""Positions that act inside attention: rotary angles and T5's relative bias. Both are made once a forward, for all layers.

Rotary: each pair of channels of q and k turns by `position · frequency`, so that a score depends on the distance
(Su et al. 2021). Relative: a learned number per head and distance bucket is added to the score (Raffel et al. 2020).

Legend: B batch, T time, S keys, H heads, K head_dim, R rotated channels (even, ≤ K)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True)
class RotaryScaling:
    """How a model trained on short sequences reads long ones: angles are slowed down.

    `linear`: every frequency divided by `factor` (position interpolation, Chen et al. 2023). `llama3`: only slow
    frequencies, with a smooth passage between wavelengths of `original_length / high` and `original_length / low`.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low: float = 1.0
    high: float = 4.0
    original_length: int = 8192


@dataclass(frozen=True)
class Rotary:
    """Angles and rotation of `channels` leading channels of every head.

    `interleaved`: pairs are (0, 1), (2, 3), … (the paper, Meta's Llama files, GPT-J); else (0, R/2), (1, R/2 + 1), …
    (GPT-NeoX, Hugging Face's Llama).
    """

    channels: int
    base: float = 10000.0
    interleaved: bool = False
    scaling: RotaryScaling | None = None

    def frequencies(self, device: torch.device) -> torch.Tensor:
        """(R/2,) radians per position, float64."""
        step = torch.arange(0, self.channels, 2, dtype=torch.float64, device=device) / self.channels
        frequency = self.base**-step
        if self.scaling is None:
            return frequency
        slowed = frequency / self.scaling.factor
        if self.scaling.kind == "linear":
            return slowed
        turns = self.scaling.original_length * frequency / (2 * math.pi)
        share = ((turns - self.scaling.low) / (self.scaling.high - self.scaling.low)).clamp(0, 1)
        return share * frequency + (1 - share) * slowed

    def angles(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(T,) or (B, T) positions → cosines and sines, each (1 or B, 1, T, R/2).

        Computed in float64: in fp32 the angle of position 100,000 is off by 4e-3.
        """
        home = positions.device
        work = torch.device("cpu") if home.type == "mps" else home  # Apple's GPUs have no float64
        angle = positions.to(work, torch.float64)[..., None] * self.frequencies(work)
        angle = angle[None, None] if positions.ndim == 1 else angle[:, None]
        return angle.cos().to(home, dtype), angle.sin().to(home, dtype)

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Turns the leading R channels of (B, H, T, K); products in the dtype of `cos`, result in that of `x`."""
        turned, rest = x[..., : self.channels], x[..., self.channels :]
        if self.interleaved:
            even, odd = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
        else:
            low, high = turned.chunk(2, -1)
            turned = torch.cat((low * cos - high * sin, high * cos + low * sin), -1)
        turned = turned.to(x.dtype)
        return turned if self.channels == x.shape[-1] else torch.cat((turned, rest), -1)


class RelativeBias(nn.Module):
    """T5's bucketed relative positions: `weight` (buckets, heads) → a bias (1, H, T, S) that all layers add to scores.

    `bidirectional` gives half of the buckets to keys after the query; causal models give all to keys before it.
    """

    def __init__(self, buckets: int, max_distance: int, heads: int, *, bidirectional: bool) -> None:
        super().__init__()
        self.axes = ("position", "heads")
        self.max_distance, self.bidirectional = max_distance, bidirectional
        self.weight = nn.Parameter(torch.empty(buckets, heads))

    def forward(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """(T,) positions of queries, (S,) of keys → (1, H, T, S)."""
        distance = keys[None, :] - queries[:, None]
        bucket = relative_bucket(distance, self.weight.shape[0], self.max_distance, self.bidirectional)
        return self.table[bucket].permute(2, 0, 1)[None]

    @property
    def table(self) -> torch.Tensor:
        """(buckets, heads): of the heads that this process holds."""
        return self.weight

    def extra_repr(self) -> str:
        buckets, heads = self.weight.shape
        side = "both sides" if self.bidirectional else "looking back"
        return f"{buckets} buckets × {heads} heads, up to {self.max_distance}, {side}"


def relative_bucket(
    distance: torch.Tensor, buckets: int, max_distance: int, bidirectional: bool
) -> torch.Tensor:
    """Bucket of `key − query`: exact for the nearer half, logarithmic up to `max_distance`, then one for all the rest."""
    offset = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = torch.where(distance > 0, buckets, 0)
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = exact + (ratio * (buckets - exact)).long().clamp(max=buckets - exact - 1)
    return offset + torch.where(distance < exact, distance, far)
