"""A checkpoint of any layout goes on, on any layout, as if nothing had happened: the next loss is the uninterrupted run's.

float64, dropout on; one process that never stopped is the truth. A layout is not asked whether it agrees with itself: each
leg loads what another layout wrote, into an engine whose own numbers are all others.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megalith.checkpoint.manifest import read_manifest, verify
from megalith.checkpoint.native import read_state, read_tensors
from megalith.testing.parity import Case, layouts
from megalith.topology.sizes import Sizes
from tests.parity.cases import GATED, LLAMA, bert, encoder_decoder, model
from tests.reshard.ranks import Leg, bits, go, load_and_compare, on, save_and_compare

ONE = Sizes()
LAYOUTS = {**layouts(), "one": ONE}
RING = [
    "tp2×shard_all2", "pp2-interleaved", "tp2+sp×pp2", "shard_all2", "pp2×shard_grads2", "replicate2×shard_all2",
    "tp4+sp", "cp2×shard_all2", "tp2×pp2-zero-bubble", "cp4", "one", "cp2×tp2+sp", "tp2+sp×shard_all2", "cp2-zero1",
    "pp4", "tp2×shard_all2",
]  # fmt: skip
UNTIED_RING = [
    "tp2+sp×pp2-interleaved",
    "shard_all2",
    "tp2",
    "one",
    "pp2×shard_all2",
    "tp2+sp×pp2-interleaved",
]
RELATIVE_RING = ["pp2-interleaved×shard_all2", "tp4", "pp2", "cp2×pp2", "one", "pp2-interleaved×shard_all2"]
FROZEN_RING = ["shard_all2", "cp2-zero3", "pp2-interleaved×shard_all2", "tp2+sp", "one", "shard_all2"]
BERT_RING = [
    "tp2+sp×pp2",
    "cp2×tp2+sp",
    "shard_all2",
    "one",
    "pp2-interleaved",
    "cp2×shard_all2",
    "tp2+sp×pp2",
]
ENCODER_DECODER_RING = [
    "pp2-interleaved",
    "cp2×shard_all2",
    "one",
    "tp2+sp",
    "cp2×pp2",
    "shard_all2",
    "pp2-interleaved",
]
CASES = {
    "tied": (Case(model()), RING),
    "untied, grouped": (Case(model(**LLAMA, num_attention_heads=4), micro_batch=1), UNTIED_RING),
    "relative bias on every stage": (Case(model(position_embedding_type="relative")), RELATIVE_RING),
    "frozen": (Case(model(), frozen=(r"^(?!.*(norm_mlp|blocks\.7)).*",)), FROZEN_RING),
    "bert": (Case(bert(), micro_batches=4), BERT_RING),
    "encoder-decoder": (Case(encoder_decoder(**GATED), micro_batches=4), ENCODER_DECODER_RING),
}


@pytest.mark.parametrize("name", CASES)
def test_around_a_ring_of_layouts(rank_pool, tmp_path, name):
    """Each layout loads from the one before, makes one step, and saves, every other time asynchronously."""
    case, ring = CASES[name]
    truth, _ = go(case, ONE, Leg(None, None, len(ring)))
    source = None
    for number, layout in enumerate(ring):
        leg = Leg(source, str(tmp_path / str(number)), number + 1, asynchronous=number % 2 == 1)
        results = on(rank_pool, go, LAYOUTS[layout], case, LAYOUTS[layout], leg)
        for (loss,), folder in results:
            assert abs(loss - truth[number]) < 1e-10, f"step {number + 1} on {layout}"
            source = folder
        manifest = read_manifest(Path(source))
        parts = LAYOUTS[layout].world
        assert len(manifest.files) == 2 + 2 * parts, (
            "model and optim of each process, config.yaml, state.json"
        )
        assert verify(Path(source)) == []


ODD = Case(
    model(hidden_size=18, num_attention_heads=2, ffn_hidden_size=70, num_layers=2, max_position_embeddings=6),
    length=4,
)
"""Rows that no number of ranks divides; of six positions the last of four shards has none."""


@pytest.mark.parametrize(
    "layout", ["shard_all4", "tp2×shard_all2", "replicate2×shard_all2", "pp2×shard_all2", "cp2×shard_all2"]
)
def test_rows_that_do_not_divide_and_shards_without_any(rank_pool, tmp_path, layout):
    """Bit by bit: what each rank held, what lies in the files, and what other layouts hold after loading it."""
    sizes = LAYOUTS[layout]
    results = rank_pool.run(save_and_compare, sizes.world, ODD, sizes, str(tmp_path / "a"))
    folder = results[0][0]
    assert [wrong for _, wrong, _ in results] == [[]] * sizes.world
    if layout == "shard_all4":
        assert 0 in results[3][2], "the last rank has a shard without rows"
    for other in ("one", "shard_all4", "tp2×shard_all2"):
        again = str(tmp_path / other)
        found = on(rank_pool, load_and_compare, LAYOUTS[other], ODD, LAYOUTS[other], folder, again)
        assert found == [[]] * LAYOUTS[other].world
        assert contents(Path(again) / Path(folder).name) == contents(Path(folder))


def contents(folder: Path) -> dict[str, bytes]:
    """Every whole tensor of a checkpoint, as bytes."""
    every = [t for prefix in ("model.", "optim.") for t in read_tensors(folder, prefix)]
    return {t.name: bits(t.read()).numpy().tobytes() for t in every}


@pytest.mark.parametrize(
    "pair", [("tp2+sp×shard_all2", "pp2-interleaved"), ("tp4+sp", "replicate2×shard_grads2")]
)
def test_there_and_back_changes_no_bit(rank_pool, tmp_path, pair):
    """A → B → A, and the state with it."""
    case, (there, back) = Case(model()), (LAYOUTS[name] for name in pair)
    folder = rank_pool.run(save_and_compare, there.world, case, there, str(tmp_path / "a"))[0][0]
    name = Path(folder).name
    rank_pool.run(load_and_compare, back.world, case, back, folder, str(tmp_path / "b"))
    rank_pool.run(load_and_compare, there.world, case, there, str(tmp_path / "b" / name), str(tmp_path / "c"))
    assert contents(tmp_path / "b" / name) == contents(Path(folder))
    first, last = Path(folder), tmp_path / "c" / name
    assert read_state(last) == read_state(first)
    files = [path.name for path in sorted(first.iterdir()) if path.suffix == ".safetensors"]
    assert len(files) == 2 * there.world
    for file in files:
        assert (last / file).read_bytes() == (first / file).read_bytes(), (
            "the same layout writes the same bytes"
        )


def test_weights_alone_begin_a_run(rank_pool, tmp_path):
    """`model.init_from` across layouts: the counters and the moments stay fresh."""
    case, sizes, other = Case(model()), LAYOUTS["tp2×pp2"], LAYOUTS["tp2+sp×shard_all2"]
    folder = rank_pool.run(go, sizes.world, case, sizes, Leg(None, str(tmp_path / "a"), 2))[0][1]
    leg = Leg(folder, str(tmp_path / "b"), 0, weights=True)
    _, begun = rank_pool.run(go, other.world, case, other, leg)[0]
    before, after = contents(Path(folder)), contents(Path(begun))
    assert {n for n in before if before[n] != after[n]} == {n for n in before if n.startswith("optim.")}
    assert read_state(Path(begun))["step"] == 0
    assert all(not any(content) for name, content in after.items() if name.startswith("optim."))


def test_the_truth_moves(tmp_path):
    """Losses of neighbouring steps differ by far more than the tolerance, and so do those of another optimizer state."""
    case = Case(model())
    losses, folder = go(case, ONE, Leg(None, str(tmp_path), 2))
    truth, _ = go(case, ONE, Leg(None, None, 3))
    assert min(abs(a - b) for a, b in pairwise(truth)) > 1e-4
    moments = [t.read() for t in read_tensors(Path(folder), "optim.")]
    assert all(torch.count_nonzero(m) for m in moments)
    assert losses == truth[:2]
