"""Logits of a model whose weights stay in their files: each layer's are read when it computes, and let go behind it.

    token rows ─ block 0 ─ block 1 ─ … ─ final norm ─ head, a few thousand rows at a time ─▶ logits

Knows the model's own code and names; nothing of the format that the tensors lie in.

Legend: T tokens, D width, V true vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megalith.checkpoint.lazy import Lazy
from megalith.models.config import ModelConfig
from megalith.models.encdec import EncoderDecoder
from megalith.models.family import class_of
from megalith.nn.embedding import OutputBias, OutputHead, PositionEmbedding, TokenEmbedding

HEAD_BYTES = 16 << 20
"""Bytes of the head's rows in memory at a time."""
CLOSE = 2
"""Rows of a table read for each that is wanted, at most, where they are read in one go."""
Step = Callable[[int], None]


@torch.no_grad()
def logits(
    config: ModelConfig,
    tensors: Mapping[str, Lazy],
    tokens: torch.Tensor,
    dtype: torch.dtype,
    step: Step = lambda nbytes: None,
) -> torch.Tensor:
    """tokens (T,) → (T, V), computed in `dtype`; an encoder-decoder reads them on both sides. `step` is told the bytes of each layer that was read."""
    with torch.device("meta"):
        model: Any = class_of(config)(config).to(dtype).eval()
    for name, module in model.named_modules():
        if isinstance(module, OutputHead | OutputBias):
            continue
        if isinstance(module, TokenEmbedding | PositionEmbedding):
            setattr(module, "forward", _looked_up(tensors[f"{name}.weight"], dtype))  # noqa: B010  # of this one
        else:
            _read_when_called(module, f"{name}." if name else "", tensors, step)
    both = {"tokens": tokens[None]} if isinstance(model, EncoderDecoder) else {}
    hidden = model.before_head(model(tokens[None], **both)[0])
    table = tensors.get("head.weight", tensors["token_embedding.weight"])
    bias = tensors.get("output_bias.bias")
    rows = max(1, HEAD_BYTES // (config.hidden_size * dtype.itemsize))
    found = []
    for start in range(0, config.vocab_size, rows):
        stop = min(start + rows, config.vocab_size)
        part = table.rows(start, stop)
        step(part.nbytes)
        added = None if bias is None else bias.rows(start, stop).to(dtype)
        found.append(F.linear(hidden, part.to(dtype), added))
    return torch.cat(found, -1)


def _looked_up(table: Lazy, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """Ids (…) → rows of a table (…, D), of which no others are read; all between the first and the last where these are few."""

    def rows(ids: torch.Tensor) -> torch.Tensor:
        first, last = int(ids.min()), int(ids.max())
        if last - first < CLOSE * ids.numel():
            return table.rows(first, last + 1)[ids - first].to(dtype)
        known = {int(i): table.rows(int(i), int(i) + 1) for i in ids.unique()}
        return torch.cat([known[int(i)] for i in ids.flatten()]).to(dtype).unflatten(0, ids.shape)

    return rows


def _read_when_called(module: nn.Module, prefix: str, tensors: Mapping[str, Lazy], step: Step) -> None:
    """Lets a module have its weights for as long as its forward runs."""
    empty = dict(module.named_parameters(recurse=False))
    if not empty:
        return

    def fetch(module: nn.Module, _: Any) -> None:
        for name, parameter in empty.items():
            read = tensors[prefix + name].read()
            step(read.nbytes)
            setattr(module, name, nn.Parameter(read.to(parameter.dtype), requires_grad=False))

    def release(module: nn.Module, *_: Any) -> None:
        for name, parameter in empty.items():
            setattr(module, name, parameter)

    module.register_forward_pre_hook(fetch)
    module.register_forward_hook(release)
