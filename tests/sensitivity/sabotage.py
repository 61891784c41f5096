"""Mistakes that a layout could have: each takes one collective, or one finishing step, out of a rank's code for one run.

They run inside the ranks, which is why they are functions that can be found by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from megalith.engine import batch as batches
from megalith.engine import engine as engines
from megalith.engine.engine import Engine
from megalith.engine.step import Forward
from megalith.models.encdec import EncoderDecoder
from megalith.models.heads import Pooler
from megalith.nn.attention import CrossAttention
from megalith.nn.dropout import Dropout, ProbabilityDropout
from megalith.nn.visibility import Lookaround
from megalith.parallel import apply, context, data, layers, tensor
from megalith.parallel.pipeline import Pipeline
from megalith.testing.parity import Case, Difference, compare_rank
from megalith.topology import collectives
from megalith.topology.sizes import Sizes
from megalith.topology.topology import Topology

Patch = pytest.MonkeyPatch
SABOTAGES: dict[str, Callable[[Patch], None]] = {}


def sabotage(function: Callable[[Patch], None]) -> Callable[[Patch], None]:
    SABOTAGES[function.__name__] = function
    return function


def broken_rank(case: Case, sizes: Sizes, path: str, name: str) -> list[Difference]:
    """`compare_rank` with one thing missing."""
    with pytest.MonkeyPatch.context() as patch:
        SABOTAGES[name](patch)
        return compare_rank(case, sizes, path)


@sabotage
def nothing(patch: Patch) -> None:
    """The control."""


# -- collectives: the identity, or as near as shapes allow ------------------------------------------------------------


def own_piece(x: torch.Tensor, group: Any) -> torch.Tensor:
    """reduce_scatter without the sum."""
    return x.chunk(dist.get_world_size(group), dim=1)[dist.get_rank(group)].contiguous()


def own_repeated(x: torch.Tensor, group: Any, dim: int = 1) -> torch.Tensor:
    """all_gather without the others."""
    return torch.cat([x] * dist.get_world_size(group), dim)


@sabotage
def copy_backward(patch: Patch) -> None:
    patch.setattr(collectives._Copy, "backward", staticmethod(lambda ctx, gradient: (gradient, None)))


@sabotage
def reduce_forward(patch: Patch) -> None:
    patch.setattr(collectives._Reduce, "forward", staticmethod(lambda ctx, x, group: x.clone()))


@sabotage
def gather_forward(patch: Patch) -> None:
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return own_repeated(x, group)

    patch.setattr(collectives._Gather, "forward", staticmethod(forward))


@sabotage
def gather_backward(patch: Patch) -> None:
    patch.setattr(
        collectives._Gather, "backward", staticmethod(lambda ctx, g: (own_piece(g, ctx.group), None))
    )


@sabotage
def scatter_sum_forward(patch: Patch) -> None:
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return own_piece(x, group)

    patch.setattr(collectives._ScatterSum, "forward", staticmethod(forward))


@sabotage
def scatter_sum_backward(patch: Patch) -> None:
    backward = staticmethod(lambda ctx, g: (own_repeated(g, ctx.group), None))
    patch.setattr(collectives._ScatterSum, "backward", backward)


@sabotage
def join_forward(patch: Patch) -> None:
    patch.setattr(collectives, "join", lambda x, group: own_repeated(x, group, -1))


@sabotage
def largest_logit(patch: Patch) -> None:
    """Each rank subtracts its own largest."""
    patch.setattr(collectives, "all_max", lambda x, group: x)


@sabotage
def no_largest_logit(patch: Patch) -> None:
    """All ranks subtract 0: the same function, as long as nothing overflows."""
    patch.setattr(collectives, "all_max", lambda x, group: torch.zeros_like(x))


@sabotage
def cross_entropy_sum(patch: Patch) -> None:
    powers = layers.ShardedSoftmax._powers

    def alone(*arguments: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(collectives, "all_reduce", lambda x, group: x)
            return powers(*arguments)

    patch.setattr(layers.ShardedSoftmax, "_powers", alone)


# -- what a step does before and behind the layers --------------------------------------------------------------------


@sabotage
def partial_sums(patch: Patch) -> None:
    patch.setattr(tensor, "_partial", lambda module, *names: None)


@sabotage
def shared_gradients(patch: Patch) -> None:
    """Of the tied table, and of the relative bias, over pipeline stages."""
    patch.setattr(Pipeline, "sum_shared_gradients", lambda self, parameters: None)


@sabotage
def relative_bias_over_data(patch: Patch) -> None:
    patch.setattr(data, "sum_gradients", lambda stage, topology: None)


@sabotage
def last_micro_batch_not_reduced(patch: Patch) -> None:
    def begin(stage: Any, topology: Topology, *, last: bool) -> None:
        stage.set_requires_gradient_sync(not last)
        stage.set_is_last_backward(last)

    patch.setattr(data, "begin_micro_batch", begin)


@sabotage
def averaged(patch: Patch) -> None:
    divide = FSDPModule.set_gradient_divide_factor
    patch.setattr(FSDPModule, "set_gradient_divide_factor", lambda self, factor: divide(self, 2.0))


@sabotage
def target_count(patch: Patch) -> None:
    count = batches.global_counts
    patch.setattr(batches, "global_counts", lambda local, topology: count(local, Topology.single()))


@sabotage
def norm_reduction(patch: Patch) -> None:
    patch.setattr(Engine, "_sum_over_model", lambda self, total: total)


@sabotage
def replicas_counted_twice(patch: Patch) -> None:
    patch.setattr(engines, "counted_here", lambda parameter, topology: True)


@sabotage
def clipping(patch: Patch) -> None:
    patch.setattr(engines, "clip_", lambda gradients, norm, maximum: 1.0)


def without_sum_over_stages(patch: Patch, owner: type, name: str) -> None:
    """`Topology.sum` leaves out what is summed over pipeline and data ranks, while a method runs."""
    method, total = getattr(owner, name), Topology.sum

    def run(self: Any, *arguments: Any) -> Any:
        def keep(topology: Topology, value: torch.Tensor, *axes: str) -> torch.Tensor:
            return value if axes[0] == "pipeline" else total(topology, value, *axes)

        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Topology, "sum", keep)
            return method(self, *arguments)

    patch.setattr(owner, name, run)


@sabotage
def reported_loss(patch: Patch) -> None:
    without_sum_over_stages(patch, Engine, "forward_backward")


@sabotage
def evaluation_sum(patch: Patch) -> None:
    without_sum_over_stages(patch, Forward, "evaluate")


@sabotage
def dropout_rows(patch: Patch) -> None:
    """Every part of a sequence takes the masks of the first."""
    patch.setattr(layers.SequenceDropout, "rows", Dropout.rows)


# -- context parallelism ----------------------------------------------------------------------------------------------


@sabotage
def order_of_keys(patch: Patch) -> None:
    """Keys stay as the ranks sent them."""
    patch.setattr(context.Chunks, "ordered", lambda self, x: x)


@sabotage
def places_of_tokens(patch: Patch) -> None:
    """Every rank believes its part to be the beginning."""
    cut = context.share_sequence

    def from_zero(batch: Any, topology: Topology) -> Any:
        here = cut(batch, topology)
        tokens = here["tokens"]
        return {**here, "positions": torch.arange(tokens.shape[1]).expand(tokens.shape).contiguous()}

    if dist.is_initialized():
        patch.setattr(batches, "share_sequence", from_zero)


@sabotage
def places_in_masks(patch: Patch) -> None:
    """Every rank takes the masks of the beginning."""
    patch.setattr(context.ContextDropout, "rows", Dropout.rows)


@sabotage
def places_of_queries(patch: Patch) -> None:
    """Every chunk drops the probabilities of the first."""
    forward = ProbabilityDropout.forward
    patch.setattr(ProbabilityDropout, "forward", lambda self, x, keys, first=0: forward(self, x, keys))


@sabotage
def counted_on_context_ranks(patch: Patch) -> None:
    """The targets of a sequence count once for each rank that has a part of it."""
    count = batches.global_counts

    def again(local: Any, topology: Topology) -> dict[str, int]:
        return {name: number * topology.size("context") for name, number in count(local, topology).items()}

    patch.setattr(batches, "global_counts", again)


# -- BERT's heads, and what encoders see ------------------------------------------------------------------------------


@sabotage
def pooled_gradients(patch: Patch) -> None:
    """Every tensor rank has all of the pooler's gradient; added up nevertheless."""
    share = tensor._share_sequence

    def and_sum(module: Any, shares: Any) -> None:
        share(module, shares)
        if isinstance(module, Pooler):
            tensor._partial(module.dense, "weight", "bias")

    patch.setattr(tensor, "_share_sequence", and_sum)


@sabotage
def pooled_position(patch: Patch) -> None:
    """Every tensor rank pools the first position of its own part."""
    patch.setattr(layers.SequencePooler, "first", Pooler.first)


@sabotage
def order_of_targets(patch: Patch) -> None:
    """Targets stay as the text has them, while the ranks' rows stand behind each other."""
    counted = layers.SequenceMaskedHead.counted

    def as_in_the_text(self: Any, hidden: torch.Tensor, targets: torch.Tensor) -> Any:
        rows, wanted = counted(self, hidden, targets)
        here = targets[targets >= 0]
        return rows, torch.cat((here, wanted.new_full((wanted.shape[1] - len(here),), -1)))[None]

    patch.setattr(layers.SequenceMaskedHead, "counted", as_in_the_text)


@sabotage
def order_on_all_ranks(patch: Patch) -> None:
    """Every context rank guesses the order of the halves from the first position that it has."""
    patch.setattr(context, "OF_THE_FIRST_POSITION", ())


@sabotage
def types_of_tokens(patch: Patch) -> None:
    """Every context rank takes the token types of the beginning."""
    part = context._part

    def from_zero(name: str, whole: torch.Tensor, chunks: Any) -> torch.Tensor:
        here = part(name, whole, chunks)
        return whole[:, : here.shape[1]].contiguous() if name == "types" else here

    patch.setattr(context, "_part", from_zero)


@sabotage
def places_of_encoder_tokens(patch: Patch) -> None:
    """Every context rank believes the encoder's part to be the beginning."""
    patch.setattr(context, "PLACES", {"tokens": "positions"})


class OwnKeys(context.ContextCore):
    """Repeats this rank's keys in place of the others'."""

    def forward(self, *arguments: Any) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(collectives, "gather", own_repeated)
            return super().forward(*arguments)


@sabotage
def keys_across(patch: Patch) -> None:
    """A decoder looks at what its own rank has of the encoder's output."""
    share = apply.share_context

    def alone(stage: Any, topology: Topology) -> None:
        share(stage, topology)
        for module in stage.modules():
            if isinstance(module, CrossAttention) and isinstance(module.core, context.ContextCore):
                module.core.__class__ = OwnKeys

    patch.setattr(apply, "share_context", alone)


@sabotage
def memory_gradient(patch: Patch) -> None:
    """What later stages of a decoder want of the encoder's output is forgotten."""
    decode = EncoderDecoder.decode

    def forgetful(self: Any, tokens: torch.Tensor, memory: torch.Tensor, *rest: Any, **options: Any) -> Any:
        if options.get("hidden") is not None and memory.requires_grad:
            memory = memory.view_as(memory)
            memory.register_hook(torch.zeros_like)
        return decode(self, tokens, memory, *rest, **options)

    patch.setattr(EncoderDecoder, "decode", forgetful)


@sabotage
def padding(patch: Patch) -> None:
    """Chunks look at all keys, those of the padding too."""
    look = context.ContextLookaround.forward

    def at_all(self: Any, *shape: Any, **options: Any) -> Any:
        return look(self, *shape, **{**options, "lengths": None})

    patch.setattr(context.ContextLookaround, "forward", at_all)


@sabotage
def places_around(patch: Patch) -> None:
    """Every chunk takes the relative bias of the first."""
    look = Lookaround.forward

    def from_zero(self: Any, *shape: Any, first: int = 0, **options: Any) -> Any:
        return look(self, *shape, **options)

    patch.setattr(Lookaround, "forward", from_zero)


@sabotage
def initial_weights(patch: Patch) -> None:
    materialise = apply.materialise

    def by_rank(module: Any, rules: Any, seed: int, **options: Any) -> None:
        materialise(module, rules, seed + dist.get_rank(), **options)

    if dist.is_initialized():
        patch.setattr(apply, "materialise", by_rank)
