"""Parity must fail when anything of an encoder-decoder's pipeline is missing: of the memory, its gradient, and what is shared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megalith.checkpoint.tensor_files import open_tensors
from megalith.models.encdec import EncoderDecoder
from megalith.models.encdec_config import EncoderDecoderConfig
from megalith.models.stack import Stack
from megalith.parallel import data, pipeline
from megalith.parallel.pipeline import Pipeline
from megalith.parallel.stage import Stage
from megalith.testing.diagnosis import wrong
from megalith.testing.parity import Case, Difference, collect, compare_rank, write_reference
from megalith.topology.sizes import Sizes

Patch = pytest.MonkeyPatch
SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_layers": 2,
    "max_position_embeddings": 12,
    "hidden_dropout": 0.1,
    "make_vocab_size_divisible_by": 8,
}
CASES = {
    "bart": Case(EncoderDecoderConfig(**SHAPE), micro_batch=1, micro_batches=4, source=12, clip=0.1),
    "t5": Case(
        EncoderDecoderConfig(**SHAPE, position_embedding_type="relative"),
        micro_batch=1, micro_batches=4, source=12, clip=0.1,
    ),
}  # fmt: skip
LAYOUTS = {
    "pp4": Sizes(pipeline=4),
    "interleaved": Sizes(pipeline=2, virtual_pipeline=2, schedule="interleaved"),
    "zero bubble": Sizes(pipeline=2, virtual_pipeline=2, schedule="zero_bubble"),
    "interleaved×replicate2": Sizes(pipeline=2, virtual_pipeline=2, schedule="interleaved", replicate=2),
}
SABOTAGES: dict[str, Callable[[Patch], None]] = {}


def sabotage(function: Callable[[Patch], None]) -> Callable[[Patch], None]:
    SABOTAGES[function.__name__] = function
    return function


@sabotage
def nothing(patch: Patch) -> None:
    """The control."""


@sabotage
def gradient_of_the_memory_on_one_hop(patch: Patch) -> None:
    """What comes back for the memory from the last stage is left out."""
    received = Stage._retrieve_recv_grads

    def without(self: Stage, chunk: int) -> Any:
        found = received(self, chunk)
        return (found[0], torch.zeros_like(found[1])) if len(found) == 2 else found

    patch.setattr(Stage, "_retrieve_recv_grads", without)


@sabotage
def memory_of_another_micro_batch(patch: Patch) -> None:
    """The last stage looks at the memory of the first micro-batch."""
    forward = EncoderDecoder.forward

    def stale(self: EncoderDecoder, x: Any, memory: Any = None, **kwargs: Any) -> Any:
        if memory is not None and self.training:
            kept = self.__dict__.setdefault("_first_memory", memory.detach().clone())
            memory = memory * 0 + kept
        return forward(self, x, memory, **kwargs)

    patch.setattr(EncoderDecoder, "forward", stale)


@sabotage
def norm_behind_the_encoder(patch: Patch) -> None:
    """The memory is sent before the final norm."""
    leave = Stack.leave
    patch.setattr(
        Stack, "leave", lambda self, x: leave(self, x) if self.look_across else x + 0 * leave(self, x)
    )


@sabotage
def shared_by_three(patch: Patch) -> None:
    """Of three holders of the token table the last is forgotten."""
    exchange = pipeline._exchange
    patch.setattr(
        pipeline,
        "_exchange",
        lambda gradient, rank, ranks, group: (
            exchange(gradient, rank, ranks[:2], group) if rank in ranks[:2] else None
        ),
    )


@sabotage
def shared_gradients(patch: Patch) -> None:
    patch.setattr(Pipeline, "sum_shared_gradients", lambda self, parameters: None)


@sabotage
def shared_in_a_process(patch: Patch) -> None:
    """What two stages of one process share is not summed over data-parallel ranks."""
    patch.setattr(data, "sum_gradients", lambda stages, topology: None)


@sabotage
def numbers_of_layers(patch: Patch) -> None:
    """Each stage numbers its layers for dropout from where the encoder begins."""
    run = Stack.run

    def from_zero(self: Stack, *arguments: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self, "first_layer", 0)
            return run(self, *arguments)

    patch.setattr(Stack, "run", from_zero)


@sabotage
def halves_of_the_backward(patch: Patch) -> None:
    """Nothing is computed twice, but the weights of an undivided backward are forgotten."""
    patch.setattr(Stage, "backward_one_chunk", without_weights(Stage.backward_one_chunk))


def without_weights(backward: Any) -> Any:
    def inputs_only(self: Stage, *arguments: Any, **options: Any) -> None:
        before = {p: None if p.grad is None else p.grad.clone() for p in self.submod.parameters()}
        backward(self, *arguments, **options)
        if self.undivided:
            for parameter, gradient in before.items():
                parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient

    return inputs_only


BROKEN = [
    ("gradient_of_the_memory_on_one_hop", "pp4", "bart"),
    ("gradient_of_the_memory_on_one_hop", "interleaved", "t5"),
    ("memory_of_another_micro_batch", "pp4", "bart"),
    ("norm_behind_the_encoder", "pp4", "bart"),
    ("shared_by_three", "pp4", "bart"),
    ("shared_gradients", "interleaved", "t5"),
    ("shared_in_a_process", "interleaved×replicate2", "bart"),
    ("numbers_of_layers", "pp4", "bart"),
    ("halves_of_the_backward", "zero bubble", "bart"),
]


def broken_rank(case: Case, sizes: Sizes, path: str, name: str) -> list[Difference]:
    """`compare_rank` with one thing missing."""
    with pytest.MonkeyPatch.context() as patch:
        SABOTAGES[name](patch)
        return compare_rank(case, sizes, path)


@pytest.fixture(scope="module")
def differences(rank_pool, tmp_path_factory):
    """A function: what is missing, layout, model → the differences of that layout."""
    folder = tmp_path_factory.mktemp("reference")
    for name, case in CASES.items():
        write_reference(case, folder / name)

    def run(missing: str, layout: str, model: str):
        case, sizes, path = CASES[model], LAYOUTS[layout], folder / model
        ranks = rank_pool.run(broken_rank, sizes.world, case, sizes, str(path), missing)
        return collect(case, [tensor.name for tensor in open_tensors(path)], ranks)

    return run


@pytest.mark.parametrize(("missing", "layout", "model"), BROKEN)
def test_what_is_missing_is_found(differences, missing, layout, model):
    assert wrong(differences(missing, layout, model)), "parity did not notice"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_missing_is_parity(differences, layout):
    assert not wrong(differences("nothing", layout, "bart"))


def test_every_sabotage_is_tried():
    assert SABOTAGES.keys() - {"nothing"} == {missing for missing, *_ in BROKEN}
