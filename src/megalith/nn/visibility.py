"""Which keys each query may look at, and what is added to its score: made once a forward, shared by all layers.

Four forms, the cheapest that says it: `causal` (a flag, no tensor), `documents` (numbers, from which a core makes what it
likes best), `mask` (a tensor), `blocks` (flex attention's block mask). Knows nothing of heads, weights or kernels.

Legend: B batch, T queries, S keys, H heads
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


class Visibility(NamedTuple):
    """`mask` is (1 or B, 1 or H, T, S): bool, True where a query may look, or a float to add (−inf: may not).

    `documents` (B, T): causal, and within the same number only. At most one of the four is set.
    """

    causal: bool = False
    mask: torch.Tensor | None = None
    documents: torch.Tensor | None = None
    blocks: BlockMask | None = None


def causal_visibility(queries: int, keys: int, device: torch.device) -> Visibility:
    """The last `queries` of `keys` tokens, each looking at itself and back."""
    if queries == keys:
        return Visibility(causal=True)
    if queries == 1:
        return Visibility()
    return Visibility(mask=triangle(queries, keys, device))


def triangle(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """(1, 1, T, S) bool, True where the key is not after the query; the last query meets the last key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None, None]


def document_mask(documents: torch.Tensor) -> torch.Tensor:
    """(B, T) document numbers → (B, 1, T, T) bool."""
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same & triangle(documents.shape[1], documents.shape[1], documents.device)


def document_lengths(documents: torch.Tensor) -> list[list[int]] | None:
    """(B, T) → lengths of the documents of each row, in order; None when a number comes back after another.

    A row [4, 4, 7, 7, 7] gives [2, 3].
    """
    rows = []
    for row in documents:
        numbers, lengths = row.unique_consecutive(return_counts=True)
        if len(numbers) != len(numbers.unique()):
            return None
        rows.append(lengths.tolist())
    return rows


def document_blocks(documents: torch.Tensor) -> BlockMask:
    """The same as flex attention's block mask: whole blocks of other documents are never computed."""

    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q >= k) & (documents[b, q] == documents[b, k])

    batch, length = documents.shape
    return create_block_mask(visible, batch, None, length, length, device=documents.device)


def with_bias(visibility: Visibility, bias: torch.Tensor) -> Visibility:
    """Folds an additive bias (1, H, T, S) into the mask, since a kernel takes one of both."""
    mask = as_mask(visibility, bias.shape[-2], bias.shape[-1], bias.device)
    return Visibility(mask=bias if mask is None else bias.masked_fill(~mask, float("-inf")))


def as_mask(visibility: Visibility, queries: int, keys: int, device: torch.device) -> torch.Tensor | None:
    """Any form but blocks as a mask tensor; None when every query may look at every key."""
    if visibility.causal:
        return triangle(queries, keys, device)
    if visibility.documents is not None:
        return document_mask(visibility.documents)
    return visibility.mask
