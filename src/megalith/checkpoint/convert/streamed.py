"""Logits of a model whose weights stay in their files: a layer's are read while the one before it computes, and let go behind it.

    token rows ─ block 0 ─ block 1 ─ … ─ final norm ─ head, a few thousand rows at a time ─▶ logits
                           read ▲  ▲ a thread computes

Knows the model's own code and names; nothing of the format that the tensors lie in.

Legend: T tokens, D width, V true vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
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
Weights = dict[str, torch.Tensor]


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
    reader = _Reader(layers, tensors, dtype)
    for module in layers:
        _read_when_called(module, reader)
    hidden = reader.beside(lambda: model.before_head(model(tokens[None], **both)[0]), step)
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
    """Reads the weights of modules while a thread computes with them, one module's ahead of what was asked for.

    Reading is this thread's, since memory for it is kept from one tensor to the next: glibc maps large memory of other threads
    anew each time.
    """

    def __init__(
        self, names: Mapping[nn.Module, str], tensors: Mapping[str, Lazy], dtype: torch.dtype
    ) -> None:
        """`names`: modules, more or less in the order in which they compute, and what their tensors' names begin with."""
        self._names, self._tensors, self._dtype = names, tensors, dtype
        self._asked: SimpleQueue[nn.Module | None] = SimpleQueue()
        self._found: dict[nn.Module, Future[Weights]] = {}
        self._over = False

    def beside(self, compute: Callable[[], torch.Tensor], step: Step) -> torch.Tensor:
        """What `compute` returns, which asks for weights by `take`. `step` is told the bytes of each module's."""
        with ThreadPoolExecutor(1, thread_name_prefix="conversion-compute") as thread:
            done = thread.submit(torch.no_grad()(compute))
            done.add_done_callback(lambda _: self._asked.put(None))
            try:
                self._serve(step)
            except BaseException:  # Ctrl-C: nobody may wait for what is not coming
                self._over = True
                for found in list(self._found.values()):
                    found.cancel()
                raise
            return done.result()

    def _serve(self, step: Step) -> None:
        later, ahead = dict(reversed(list(self._names.items()))), None
        while (module := self._asked.get()) is not None:
            if module is not ahead:
                later.pop(module, None)
                self._read(module, step)
            else:
                ahead = None
            if ahead is None and later:
                ahead, _ = later.popitem()
                self._read(ahead, step)

    def take(self, module: nn.Module) -> Weights:
        """The weights of a module. Raises what went wrong when they were read."""
        found = self._found.setdefault(module, Future())
        self._asked.put(module)
        if self._over:
            raise InterruptedError("the conversion ended")
        weights = found.result()
        del self._found[module]
        return weights

    def _read(self, module: nn.Module, step: Step) -> None:
        """To whoever takes them, or will."""
        found = self._found.setdefault(module, Future())
        try:
            found.set_result(self._weights(module, step))
        except Exception as error:  # raised by `take`
            found.set_exception(error)

    def _weights(self, module: nn.Module, step: Step) -> Weights:
        weights = {}
        for name, _ in module.named_parameters(recurse=False):
            read = self._tensors[f"{self._names[module]}.{name}"].read()
            weights[name] = read.to(self._dtype)
            step(read.nbytes)
        return weights


def _read_when_called(module: nn.Module, reader: _Reader) -> None:
    """Lets a module have its weights for as long as its forward runs."""
    empty = dict(module.named_parameters(recurse=False))

    def fetch(module: nn.Module, _: Any) -> None:
        for name, tensor in reader.take(module).items():
            setattr(module, name, nn.Parameter(tensor, requires_grad=False))

    def release(module: nn.Module, *_: Any) -> None:
        for name, parameter in empty.items():
            setattr(module, name, parameter)

    module.register_forward_pre_hook(fetch)
    module.register_forward_hook(release)
