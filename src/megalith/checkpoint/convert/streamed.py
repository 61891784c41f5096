"""Logits of a model whose weights stay in their files: a layer's are read while the one before it computes, and let go behind it.

    token rows ─ block 0 ─ block 1 ─ … ─ final norm ─ head, a few thousand rows at a time ─▶ logits
                   a thread reads ▲

Knows the model's own code and names; nothing of the format that the tensors lie in.

Legend: T tokens, D width, V true vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
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
Read = tuple[dict[str, torch.Tensor], int]


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
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, OutputHead | OutputBias):
            continue
        if isinstance(module, TokenEmbedding | PositionEmbedding):
            setattr(module, "forward", _looked_up(tensors[f"{name}.weight"], dtype))  # noqa: B010  # of this one
        elif any(True for _ in module.parameters(recurse=False)):
            layers[module] = name
    both = {"tokens": tokens[None]} if isinstance(model, EncoderDecoder) else {}
    with _Reader(layers, tensors, dtype) as reader:
        for module in layers:
            _read_when_called(module, reader, step)
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


class _Reader:
    """Reads the weights of modules in a thread, one module's ahead of what was asked for."""

    def __init__(
        self, names: Mapping[nn.Module, str], tensors: Mapping[str, Lazy], dtype: torch.dtype
    ) -> None:
        """`names`: modules, more or less in the order in which they compute, and what their tensors' names begin with."""
        self._names, self._tensors, self._dtype = names, tensors, dtype
        self._later = dict(names)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="conversion-read")
        self._ahead: tuple[nn.Module, Future[Read]] | None = None

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def take(self, module: nn.Module) -> Read:
        """The weights of a module, and the bytes that they have in their files."""
        self._later.pop(module, None)
        if self._ahead is not None and self._ahead[0] is module:
            mine, self._ahead = self._ahead[1], None
        else:
            mine = self._thread.submit(self._read, module)
        following = next(iter(self._later), None)
        if self._ahead is None and following is not None:
            del self._later[following]
            self._ahead = following, self._thread.submit(self._read, following)
        return mine.result()

    def _read(self, module: nn.Module) -> Read:
        weights, count = {}, 0
        for name, _ in module.named_parameters(recurse=False):
            read = self._tensors[f"{self._names[module]}.{name}"].read()
            weights[name], count = read.to(self._dtype), count + read.nbytes
        return weights, count


def _read_when_called(module: nn.Module, reader: _Reader, step: Step) -> None:
    """Lets a module have its weights for as long as its forward runs."""
    empty = dict(module.named_parameters(recurse=False))

    def fetch(module: nn.Module, _: Any) -> None:
        weights, count = reader.take(module)
        for name, tensor in weights.items():
            setattr(module, name, nn.Parameter(tensor, requires_grad=False))
        step(count)

    def release(module: nn.Module, *_: Any) -> None:
        for name, parameter in empty.items():
            setattr(module, name, parameter)

    module.register_forward_pre_hook(fetch)
    module.register_forward_hook(release)
