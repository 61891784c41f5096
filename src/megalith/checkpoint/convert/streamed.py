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
from megalith.models.gpt import GPT
from megalith.nn.embedding import PositionEmbedding, TokenEmbedding

HEAD_BYTES = 16 << 20
"""Bytes of the head's rows in memory at a time."""
Step = Callable[[int], None]


@torch.no_grad()
def logits(
    config: ModelConfig,
    tensors: Mapping[str, Lazy],
    tokens: torch.Tensor,
    dtype: torch.dtype,
    step: Step = lambda nbytes: None,
) -> torch.Tensor:
    """tokens (T,) → (T, V), computed in `dtype`. `step` is told the bytes of each layer that was read."""
    with torch.device("meta"):
        model = GPT(config).to(dtype).eval()
    model.first = False
    for name, module in model.named_modules():
        if not isinstance(module, TokenEmbedding | PositionEmbedding):
            _read_when_called(module, f"{name}." if name else "", tensors, step)
    x = torch.cat([tensors["token_embedding.weight"].rows(int(i), int(i) + 1) for i in tokens]).to(dtype)
    if config.position_embedding_type == "learned_absolute":
        x = x + tensors["position_embedding.weight"].rows(0, len(tokens)).to(dtype)
    hidden = model(x[None])[0]
    table = tensors.get("head.weight", tensors["token_embedding.weight"])
    rows = max(1, HEAD_BYTES // (config.hidden_size * dtype.itemsize))
    found = []
    for start in range(0, config.vocab_size, rows):
        part = table.rows(start, min(start + rows, config.vocab_size))
        step(part.nbytes)
        found.append(F.linear(hidden, part.to(dtype)))
    return torch.cat(found, -1)


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
