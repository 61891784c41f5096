"""A model made ready for reading: every weight cast once instead of at every token, and laid out as the machine likes it.

Training keeps fp32 masters and casts them in each forward. A model that only reads needs the cast copy alone; on CPUs with
oneDNN the copy is stored in that library's blocked layout, which it would otherwise rebuild in every call (measured on an
AVX512-BF16 CPU, batch 1 to 8: a third to a half of the time of `F.linear`, the same bits in bf16). Norms and embedding
tables keep their dtype, since the residual stream is theirs.

Of a shared layer each process multiplies by its part; what its class sends to the others stays as it is.

Knows layers, no decoding. A model prepared here can no longer be trained or saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed import ProcessGroup

from megalith.models.stack import LanguageModel
from megalith.nn.linear import Linear
from megalith.nn.lora import LoRALinear
from megalith.parallel.layers import RowParallelLinear, VocabParallelEmbedding, local
from megalith.topology import collectives

Product = Callable[[torch.Tensor], torch.Tensor]
Model = TypeVar("Model", bound=LanguageModel)


def prepare_for_reading(model: Model, dtype: torch.dtype | None) -> Model:
    """Casts the weights of all matrix products to `dtype` (None: as they are) for good; returns the same model.

    Numbers are those of the layers' own casts. Frees what it replaces, so it needs one layer's memory on top.
    """
    model.eval().requires_grad_(False)
    model.set_compute_dtype(dtype)
    # Not the layers themselves: who holds them keeps what they are replaced by as well.
    for parent in [module for module in model.modules() if not isinstance(module, Linear)]:
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear):
                setattr(parent, name, ReadingLinear(child, dtype))
    if model.head is not None:
        model.head.weight = nn.Parameter(model.head.weight.detach().to(dtype), requires_grad=False)
    if model.last:
        # A tied table is still looked up in its own dtype; the product has its own copy, of the true vocabulary's rows.
        model.logits = logits_of(model, dtype)  # type: ignore[method-assign]
    return model


def logits_of(model: LanguageModel, dtype: torch.dtype | None) -> Product:
    """Hidden states (…, D) → logits (…, V) of the true vocabulary, the whole of them on every process."""
    vocabulary, table, weight = model.config.vocab_size, model.head_table, local(model.head_weight.detach())
    bias = None if model.output_bias is None else local(model.output_bias.bias.detach())
    if not isinstance(table, VocabParallelEmbedding):
        whole = product(weight[:vocabulary], None if bias is None else bias[:vocabulary], dtype)
        return lambda hidden: whole(model.before_head(hidden))
    part, group = product(weight, bias, dtype), table.shares.group
    return lambda hidden: collectives.join(part(model.before_head(hidden)), group)[..., :vocabulary]


class ReadingLinear(nn.Module):
    """`y = x Wᵀ + b` in one dtype. Holds no parameter: what it multiplies by may be in a library's own layout."""

    def __init__(self, linear: Linear, dtype: torch.dtype | None) -> None:
        super().__init__()
        assert not isinstance(linear, LoRALinear), "LoRA is merged before a model is made ready for reading"
        self.shape, self.axes = tuple(linear.weight.shape), linear.axes
        weight = local(linear.weight.detach())
        bias = None if linear.bias is None else local(linear.bias.detach())
        if isinstance(linear, RowParallelLinear):
            self.product = row_parallel(product(weight, None, dtype), bias, linear.shares.group)
        else:
            self.product = product(weight, bias, dtype)

    def forward(self, x: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        return self.product(x)

    def extra_repr(self) -> str:
        return f"{self.shape[1]} → {self.shape[0]}, for reading"


def row_parallel(part: Product, bias: torch.Tensor | None, group: ProcessGroup) -> Product:
    """The processes' products added up; the bias once, after the sum, as the layer has it."""

    def whole(x: torch.Tensor) -> torch.Tensor:
        y = collectives.reduce(part(x), group)
        return y if bias is None else y + bias.to(y.dtype)

    return whole


def product(weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype | None) -> Product:
    """The function x (…, in) → (…, out) of a weight (out, in), in `dtype`, by the fastest way that this machine has."""
    dtype = dtype or weight.dtype
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    packed = pack(weight)
    if packed is None:
        return lambda x: F.linear(x.to(dtype), weight, bias)
    multiply = torch.ops.mkldnn._linear_pointwise
    return lambda x: multiply(x.to(dtype), packed, bias, "none", [], "")


def pack(weight: torch.Tensor) -> torch.Tensor | None:
    """A weight (out, in) in oneDNN's layout; None where the device, the dtype or this build of PyTorch has none.

    These operators are what PyTorch's own compiler emits for frozen weights; they are not a documented interface, so
    their absence is an answer and not an error.
    """
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        one = weight.new_zeros(1, weight.shape[1])
        torch.ops.mkldnn._linear_pointwise(one, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):  # NotImplementedError, for another backend, is a RuntimeError
        return None
    return packed
