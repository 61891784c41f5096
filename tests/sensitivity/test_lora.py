"""Parity must fail when a part of LoRA's gradients is not summed, or a mask does not know its place."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megalith.checkpoint.tensor_files import open_tensors
from megalith.models.config import ModelConfig
from megalith.nn.lora import InputDropout
from megalith.parallel import context, layers, tensor
from megalith.parallel.lora import SharedInputDropout
from megalith.testing.diagnosis import wrong
from megalith.testing.parity import Case, Difference, collect, compare_rank, layouts, write_reference
from megalith.topology.sizes import Sizes
from tests.parity.test_lora import Warm

Patch = pytest.MonkeyPatch
CASE = Case(
    ModelConfig(
        vocab_size=40, num_layers=2, hidden_size=16, num_attention_heads=2, max_position_embeddings=8,
        hidden_dropout=0.0, make_vocab_size_divisible_by=8,
    ),
    micro_batch=1, micro_batches=4, clip=0.05,
    adapt=Warm(rank=2, dropout=0.3),
)  # fmt: skip
LAYOUTS = layouts()
SABOTAGES: dict[str, Callable[[Patch], None]] = {}


def sabotage(function: Callable[[Patch], None]) -> Callable[[Patch], None]:
    SABOTAGES[function.__name__] = function
    return function


def without_sum_of(name: str) -> Callable[[Patch], None]:
    partial = tensor._partial

    def most(module, *names):
        partial(module, *(each for each in names if each != name))

    return lambda patch: patch.setattr(tensor, "_partial", most)


@sabotage
def nothing(patch: Patch) -> None:
    """The control."""


@sabotage
def sum_of_a(patch: Patch) -> None:
    without_sum_of("lora_a")(patch)


@sabotage
def sum_of_b(patch: Patch) -> None:
    without_sum_of("lora_b")(patch)


@sabotage
def numbers_of_channels(patch: Patch) -> None:
    """Every rank drops the first channels' pattern."""
    patch.setattr(SharedInputDropout, "first_column", lambda self, width: 0)


@sabotage
def part_of_the_sequence(patch: Patch) -> None:
    """What a low-rank product reads is taken for a part of the sequence, as the residual stream is."""
    share = tensor._share_sequence

    def as_stream(module, shares):
        share(module, shares)
        if type(module) is InputDropout:
            layers.become(module, Part, shares)

    patch.setattr(tensor, "_share_sequence", as_stream)


class Part(InputDropout):
    """Rows numbered from where this rank's part of the residual stream begins."""

    def rows(self, length, device):
        return super().rows(length, device) + self.shares.part * length


@sabotage
def places_in_the_sequence(patch: Patch) -> None:
    """Context ranks number their rows from zero."""
    kept = {kind: swap for kind, swap in context.SWAPS.items() if kind is not InputDropout}
    patch.setattr(context, "SWAPS", kept)


BROKEN = [
    ("sum_of_a", "tp2"),
    ("sum_of_b", "tp2"),
    ("sum_of_a", "tp2+sp"),
    ("sum_of_b", "tp2+sp"),
    ("numbers_of_channels", "tp2"),
    ("part_of_the_sequence", "tp2+sp"),
    ("places_in_the_sequence", "cp2"),
]


def broken_rank(case: Case, sizes: Sizes, path: str, name: str) -> list[Difference]:
    """`compare_rank` with one thing missing."""
    with pytest.MonkeyPatch.context() as patch:
        SABOTAGES[name](patch)
        return compare_rank(case, sizes, path)


@pytest.fixture(scope="module")
def differences(rank_pool, tmp_path_factory):
    """A function: what is missing, layout → the differences of that layout."""
    path = tmp_path_factory.mktemp("reference") / "lora.safetensors"
    write_reference(CASE, path)

    def run(missing: str, layout: str):
        sizes = LAYOUTS[layout]
        ranks = rank_pool.run(broken_rank, sizes.world, CASE, sizes, str(path), missing)
        return collect(CASE, [each.name for each in open_tensors(path)], ranks)

    return run


@pytest.mark.parametrize(("missing", "layout"), BROKEN)
def test_what_is_missing_is_found(differences, missing, layout):
    assert wrong(differences(missing, layout)), "parity did not notice"


@pytest.mark.parametrize("layout", ["tp2", "tp2+sp", "cp2"])
def test_nothing_missing_is_parity(differences, layout):
    assert not wrong(differences("nothing", layout))


def test_every_sabotage_is_tried():
    assert SABOTAGES.keys() - {"nothing"} == {missing for missing, _ in BROKEN}
