"""Parity must fail when anything of prompts on a layout is missing: what is summed by hand, whose rows, whose masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megalith.adapt import prompts as prompting
from megalith.adapt.prompts import NewPrompt
from megalith.adapt.soft_prompt import SoftPrompts
from megalith.checkpoint.tensor_files import open_tensors
from megalith.models.config import ModelConfig
from megalith.nn.dropout import Dropout
from megalith.parallel import context, data, layers, tensor
from megalith.testing.diagnosis import wrong
from megalith.testing.parity import Case, Difference, collect, compare_rank, layouts, write_reference
from megalith.topology.sizes import Sizes

Patch = pytest.MonkeyPatch
MODEL = ModelConfig(
    vocab_size=40, hidden_size=16, num_attention_heads=2, num_layers=2, max_position_embeddings=8, hidden_dropout=0.0,
    make_vocab_size_divisible_by=8,
)  # fmt: skip
CASE = Case(
    MODEL,
    micro_batch=1,
    micro_batches=4,
    clip=0.1,
    adapt=SoftPrompts([NewPrompt("a", 5, (3, 39)), NewPrompt("b", 2)]),
)
LAYOUTS = layouts()
SABOTAGES: dict[str, Callable[[Patch], None]] = {}


def sabotage(function: Callable[[Patch], None]) -> Callable[[Patch], None]:
    SABOTAGES[function.__name__] = function
    return function


@sabotage
def nothing(patch: Patch) -> None:
    """The control."""


@sabotage
def sum_by_hand(patch: Patch) -> None:
    patch.setattr(data, "sum_gradients", lambda stages, topology: None)


@sabotage
def partial_sums(patch: Patch) -> None:
    patch.setattr(tensor, "_partial", lambda module, *names: None)


@sabotage
def rows_of_the_first_part(patch: Patch) -> None:
    """Every part of a sequence believes that it begins with the prompt."""
    patch.setattr(layers.SequencePrompts, "here", lambda self, x: x.chunk(self.shares.parts, dim=1)[0])


@sabotage
def masks_of_the_first_part(patch: Patch) -> None:
    patch.setattr(layers.SequenceDropout, "rows", Dropout.rows)


@sabotage
def masks_of_the_first_chunk(patch: Patch) -> None:
    patch.setattr(context.ContextDropout, "rows", Dropout.rows)


@sabotage
def rows_of_this_rank(patch: Patch) -> None:
    """A prompt begins from the part of the token table that is here."""

    def mine(parameter: torch.Tensor, device: torch.device) -> torch.Tensor:
        here = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        return here.detach().repeat(2, 1)

    patch.setattr(prompting, "whole", mine)


BROKEN = [
    ("sum_by_hand", "replicate2"),
    ("sum_by_hand", "shard_all2"),
    ("sum_by_hand", "cp2"),
    ("partial_sums", "tp2+sp"),
    ("rows_of_the_first_part", "tp2+sp"),
    ("masks_of_the_first_part", "tp2+sp"),
    ("masks_of_the_first_chunk", "cp2"),
    ("rows_of_this_rank", "tp2"),
]


def broken_rank(case: Case, sizes: Sizes, path: str, name: str) -> list[Difference]:
    """`compare_rank` with one thing missing."""
    with pytest.MonkeyPatch.context() as patch:
        SABOTAGES[name](patch)
        return compare_rank(case, sizes, path)


@pytest.fixture(scope="module")
def differences(rank_pool, tmp_path_factory):
    """A function: what is missing, layout → the differences of that layout."""
    path = tmp_path_factory.mktemp("reference") / "one.safetensors"
    write_reference(CASE, path)

    def run(missing: str, layout: str):
        sizes: Any = LAYOUTS[layout]
        ranks = rank_pool.run(broken_rank, sizes.world, CASE, sizes, str(path), missing)
        return collect(CASE, [tensor.name for tensor in open_tensors(path)], ranks)

    return run


@pytest.mark.parametrize(("missing", "layout"), BROKEN)
def test_what_is_missing_is_found(differences, missing, layout):
    assert wrong(differences(missing, layout)), "parity did not notice"


@pytest.mark.parametrize("layout", sorted({layout for _, layout in BROKEN}))
def test_nothing_missing_is_parity(differences, layout):
    assert not wrong(differences("nothing", layout))


def test_every_sabotage_is_tried():
    assert SABOTAGES.keys() - {"nothing"} == {missing for missing, _ in BROKEN}
