"""Which keys each query may look at, and what is added to its score: made once a forward, shared by all layers.

Five forms, the cheapest that says it: `causal` (a flag, no tensor), `lengths` and `documents` (numbers, from which a core makes
what it likes best), `mask` (a tensor), `blocks` (flex attention's block mask); none of them: everyone sees everyone. Of T queries and S keys the queries are the last.
Knows nothing of heads, weights or kernels.

Legend: B batch, T queries, S keys, H heads
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class Visibility(NamedTuple):
    """`mask` is (1 or B, 1 or H, 1 or T, S): bool, True where a query may look, or a float to add (−inf: may not).

    `documents` (B, S): causal, and within the same number only. `lengths` (B,), at least 1: the keys before each row's
    padding, whatever the query. At most one of the five is set.
    """

    causal: bool = False
    mask: torch.Tensor | None = None
    documents: torch.Tensor | None = None
    blocks: BlockMask | None = None
    first: int = 0
    """The place of the first query in its sequence, by which dropout is keyed."""
    lengths: torch.Tensor | None = None


class Lookback(nn.Module):
    """Who sees whom in a causal model: a token itself and what stands before it, in its document where there are several.

    A module without parameters, so that a pass can put another in its place.
    """

    def forward(
        self,
        start: int,
        length: int,
        device: torch.device,
        *,
        mask: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
        bias: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        blocks: bool = False,
    ) -> Visibility:
        """Of the `length` tokens that stand behind `start` others.

        `mask` (B, 1, T, S) in place of the usual rule; `documents` (B, ≥ S) numbers; `bias`: (T,) places of queries and
        (S,) of keys → what is added to scores; `blocks`: documents as flex attention's.
        """
        end = start + length
        if mask is not None:
            visibility = Visibility(mask=mask)
        elif documents is None:
            visibility = causal_visibility(length, end, device)
        elif blocks and bias is None:
            visibility = Visibility(blocks=document_blocks(documents[:, :end], length))
        else:
            visibility = Visibility(documents=documents[:, :end])
        if bias is not None:
            keys = torch.arange(end, device=device)
            visibility = with_bias(visibility, bias(keys[start:], keys))
        return visibility._replace(first=start)


class Lookaround(nn.Module):
    """Who sees whom where only padding is hidden: an encoder's tokens one another, a decoder's tokens an encoder's.

    A module without parameters, so that a pass can put another in its place.
    """

    def forward(
        self,
        queries: int,
        keys: int,
        device: torch.device,
        *,
        first: int = 0,
        lengths: torch.Tensor | None = None,
        bias: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> Visibility:
        """Of `queries` tokens from place `first` on, among `keys` of which row i has `lengths` (B,)[i] and then padding.

        `lengths` None: no row has any. `bias`: (T,) places of queries and (S,) of keys → what is added to scores. A row
        without a token would look at nothing, which has no softmax: it looks at its first filler.
        """
        visibility = Visibility(lengths=None if unpadded(lengths, keys) else lengths.clamp(min=1))
        if bias is not None:
            queried = torch.arange(first, first + queries, device=device)
            visibility = with_bias(visibility, bias(queried, torch.arange(keys, device=device)))
        return visibility._replace(first=first)


def unpadded(lengths: torch.Tensor | None, keys: int) -> bool:
    """Is every row full? On a GPU only None says so, since its numbers would have to be waited for."""
    if lengths is None:
        return True
    return lengths.device.type == "cpu" and bool((lengths >= keys).all())


def causal_visibility(queries: int, keys: int, device: torch.device) -> Visibility:
    """The last `queries` of `keys` tokens, each looking at itself and back."""
    if queries == 1 and keys > 1:
        return Visibility()
    if queries == keys or device.type == "cuda":  # whose kernels know the triangle without its numbers
        return Visibility(causal=True)
    # Numbers, of which all layers keep one tensor for their backward; of a bool mask a kernel makes its own in each.
    hidden = ~triangle(queries, keys, device)
    return Visibility(mask=torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf")))


def triangle(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """(1, 1, T, S) bool, True where the key is not after the query; the last query meets the last key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None, None]


def document_mask(documents: torch.Tensor, queries: int) -> torch.Tensor:
    """(B, S) document numbers → (B, 1, T, S) bool, of the last T = `queries` tokens."""
    same = documents[:, None, -queries:, None] == documents[:, None, None, :]
    return same & triangle(queries, documents.shape[1], documents.device)


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


def document_blocks(documents: torch.Tensor, queries: int) -> BlockMask:
    """The same as flex attention's block mask: whole blocks of other documents are never computed."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch, keys = documents.shape
    first = keys - queries

    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q + first >= k) & (documents[b, q + first] == documents[b, k])

    return create_block_mask(visible, batch, None, queries, keys, device=documents.device)


def with_bias(visibility: Visibility, bias: torch.Tensor) -> Visibility:
    """Folds an additive bias (1, H, T, S) into the mask, since a kernel takes one of both."""
    mask = as_mask(visibility, bias.shape[-2], bias.shape[-1], bias.device)
    if mask is None or mask.dtype != torch.bool:
        return Visibility(mask=bias if mask is None else bias + mask)
    return Visibility(mask=bias.masked_fill(~mask, float("-inf")))


def as_mask(visibility: Visibility, queries: int, keys: int, device: torch.device) -> torch.Tensor | None:
    """Any form but blocks as a mask tensor; None when every query may look at every key."""
    if visibility.causal:
        return triangle(queries, keys, device)
    if visibility.documents is not None:
        return document_mask(visibility.documents, queries)
    if visibility.lengths is not None:
        return (torch.arange(keys, device=device) < visibility.lengths[:, None])[:, None, None]
    return visibility.mask
