"""A low-rank product becomes part of the weight beside which it stood: W + scale · B · A, multiplied in fp32 at least.

    fold      the layers of a model in memory, any part of a layout: plain layers again, as if it had been trained so
    merge     the same, with the model's own logits before and after as proof (`probe` makes some)
    folded    tensors that still lie in files, each merged when it is read: for conversions

Knows weights, and what a model reads. Knows no file and no text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from megalith.checkpoint.lazy import Lazy
from megalith.errors import CheckpointError
from megalith.models.encdec import EncoderDecoder
from megalith.models.stack import LanguageModel
from megalith.nn.linear import Linear
from megalith.nn.lora import LoRALinear
from megalith.parallel.layers import ColumnParallelLinear, RowParallelLinear, local
from megalith.parallel.lora import ColumnParallelLoRA, RowParallelLoRA

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Of the largest logit, by the dtype of the weights; narrower ones round what is added to them."""
NARROW = 0.1
PROBED = 16
"""Tokens of a row that `probe` reads."""
_PLAIN: Mapping[type, type] = {
    LoRALinear: Linear,
    ColumnParallelLoRA: ColumnParallelLinear,
    RowParallelLoRA: RowParallelLinear,
}


class Merged(NamedTuple):
    """`error`: the largest difference of a logit; `largest`: the largest logit. Of a pipeline stage, of what it passes on."""

    layers: int
    error: float
    largest: float


@torch.no_grad()
def merge(model: nn.Module, logits: Callable[[], torch.Tensor], *, tolerance: float | None = None) -> Merged:
    """`fold` with a check: `logits` runs the model, in evaluation, and is asked before and after.

    `tolerance`: of the largest logit; None: by the weights' dtype. On tensor-parallel ranks all call it and each folds what it
    holds. A model, or a stage, without LoRA stays as it is. Errors: `CheckpointError` where logits differ by more, or are no
    numbers; the model is then of no use.
    """
    dtypes = [module.weight.dtype for module in model.modules() if isinstance(module, LoRALinear)]
    if not dtypes:
        return Merged(0, 0.0, 0.0)
    before = logits().double()
    layers = fold(model)
    after = logits().double()
    allowed = TOLERANCES.get(dtypes[0], NARROW) if tolerance is None else tolerance
    found = Merged(layers, (after - before).abs().max().item(), before.abs().max().item())
    if not found.error <= allowed * found.largest:
        raise CheckpointError(
            f"merged into the weights, LoRA gives other logits: by up to {found.error:.1e} of {found.largest:.1e}, "
            f"more than {allowed:g} of the largest",
            fix="keep the weights in fp32, where rounding is small beside what is added",
        )
    return found


def probe(model: LanguageModel) -> Callable[[], torch.Tensor]:
    """For `merge`: what a model makes of a few fixed tokens, its logits; of a pipeline stage, what it passes on of fixed numbers."""
    weight = next(model.parameters())
    length = min(PROBED, model.config.max_positions or PROBED)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (2, length), generator=generator)
    given = [tokens]
    if not model.first:
        shape = (2, length, model.config.hidden_size)
        given = [torch.randn(shape, generator=generator).to(weight.dtype) for _ in model.takes]
    given = [each.to(weight.device) for each in given]
    more = {"tokens": tokens.to(weight.device)} if isinstance(model, EncoderDecoder) else {}

    def run() -> torch.Tensor:
        training = model.training
        model.eval()
        made = model(*given, **more)
        made = made[0] if isinstance(made, tuple) else made
        made = model.logits(made) if model.last else made
        model.train(training)
        return made

    return run


@torch.no_grad()
def fold(model: nn.Module) -> int:
    """Adds every low-rank product of a model, or of a part of it, to the weight beside it, in place. → how many layers.

    Of tensor-parallel layers each rank adds to its part what its parts give. The layers are plain ones afterwards.
    """
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    for layer in layers:
        weight = local(layer.weight.detach())
        a, b = local(layer.lora_a.detach()), local(layer.lora_b.detach())
        weight.copy_(added(weight, a, b, layer.scale))
        del layer.lora_a, layer.lora_b, layer.drop_lora, layer.scale
        left = [name for name in getattr(layer, "partial_gradients", ()) if hasattr(layer, name)]
        layer.partial_gradients = tuple(left)  # type: ignore[assignment]
        layer.__class__ = _PLAIN[type(layer)]
    return len(layers)


def added(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """weight (out, in) + scale · b (out, r) · a (r, in), in fp32 or the widest dtype among them."""
    wide = torch.float32
    for tensor in (weight, a, b):
        wide = torch.promote_types(wide, tensor.dtype)
    return torch.addmm(weight.to(wide), b.to(wide), a.to(wide), alpha=scale)


@dataclass(frozen=True)
class Folded:
    """A weight that still lies in files, with what is added to it when it is read; in the weight's dtype again."""

    base: Lazy
    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def nbytes(self) -> int:
        return self.base.nbytes

    def read(self) -> torch.Tensor:
        """The whole tensor, in host memory."""
        return added(self.base.read(), self.a, self.b, self.scale).to(self.dtype)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` (exclusive) of the first dim."""
        return added(self.base.rows(start, stop), self.a, self.b[start:stop], self.scale).to(self.dtype)


def folded(
    weights: Iterable[Lazy], tensors: Mapping[str, torch.Tensor], scale: float, *, prefix: str = ""
) -> Iterator[Lazy]:
    """A model's tensors in files, those that an artefact adds to being merged when they are read.

    `tensors`: as `LoRA.tensors` names them; `prefix`: what stands before names in the files (`model.` in a step folder).
    Errors: `CheckpointError` for tensors of the artefact whose weight is not there or has other sizes.
    """
    left = set(tensors)
    for lazy in weights:
        name = lazy.name.removeprefix(prefix).removesuffix(".weight")
        pair = [f"{name}.lora_a", f"{name}.lora_b"]
        if not all(each in tensors for each in pair):
            yield lazy
            continue
        a, b = (tensors[each] for each in pair)
        if (b.shape[0], a.shape[1]) == lazy.shape:
            left.difference_update(pair)
            yield Folded(lazy, a, b, scale)
    if left:
        raise CheckpointError(
            f"the base model has no weight that fits {', '.join(sorted(left)[:4])}",
            fix="use the base model that it was tuned on",
        )
