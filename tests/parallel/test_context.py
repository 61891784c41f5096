"""Context parallelism: which chunks a rank has, that cutting can be undone, who sees whom chunk by chunk, and what it saves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megalith.engine.batch import place, prepare
from megalith.engine.objective import CausalLanguageModel, objective_of
from megalith.errors import DataError
from megalith.models.bert_config import BertConfig
from megalith.models.config import ModelConfig
from megalith.models.encdec_config import EncoderDecoderConfig
from megalith.models.gpt import GPT
from megalith.nn.attention import AttentionSpec
from megalith.nn.cores import make_core
from megalith.nn.dropout import Dropout
from megalith.nn.position import RelativeBias
from megalith.nn.visibility import Lookaround, Lookback, Visibility, as_mask, triangle
from megalith.parallel.apply import build
from megalith.parallel.context import (
    Chunks,
    ContextDropout,
    ContextLookaround,
    ContextLookback,
    ContextSequenceDropout,
)
from megalith.parallel.layers import Shares
from megalith.testing.parity import Case, make_batch
from megalith.topology.sizes import Sizes
from megalith.topology.topology import Topology

CPU = torch.device("cpu")
CASE = Case(
    ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=2, vocab_size=64, max_position_embeddings=16),
    precision="32", micro_batch=1, micro_batches=2, length=16,
)  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_chunk_has_one_rank_and_every_rank_the_same_work(ranks):
    mine = [Chunks(rank, ranks).mine for rank in range(ranks)]
    assert sorted(number for pair in mine for number in pair) == list(range(2 * ranks))
    looked_at = {
        (early + 1) + (late + 1) for early, late in mine
    }  # chunks of keys, the diagonal one included
    assert looked_at == {2 * ranks + 1}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_cutting_can_be_undone(ranks):
    x = torch.arange(2 * 12 * ranks * 3).view(2, 12 * ranks, 3)
    parts = [Chunks(rank, ranks).cut(x) for rank in range(ranks)]
    assert torch.equal(Chunks(0, ranks).ordered(torch.cat(parts, dim=1)), x)
    for rank, part in enumerate(parts):
        places = Chunks(rank, ranks).places(part.shape[1], CPU)
        assert torch.equal(part, x[:, places])
    assert ranks == 1 or not torch.equal(torch.cat(parts, dim=1), x)


@pytest.mark.parametrize("what", ["plain", "documents", "bias"])
def test_chunks_see_what_these_rows_see_in_one_process(what):
    ranks, length = 3, 12
    documents = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3, [3] * 11 + [4]])
    bias = RelativeBias(8, 6, 2, bidirectional=False)
    torch.nn.init.normal_(bias.weight)
    options = {"plain": {}, "documents": {"documents": documents}, "bias": {"bias": bias}}[what]
    whole = numbers(as_mask(Lookback()(0, length, CPU, **options), length, length, CPU))
    for rank in range(ranks):
        lookback = ContextLookback()
        lookback.chunks = Chunks(rank, ranks)
        rows = Chunks(rank, ranks).spans(length // ranks)
        for (first, end), (sees, keys) in zip(
            rows, lookback(0, length // ranks, CPU, **options), strict=True
        ):
            assert (sees.first, keys) == (first, end)
            assert torch.equal(numbers(as_mask(sees, end - first, end, CPU)), whole[:, :, first:end, :end])
            assert not whole[:, :, first:end, end:].isfinite().any()


@pytest.mark.parametrize("what", ["plain", "padding", "bias"])
@pytest.mark.parametrize("keys", [12, 24])
def test_chunks_that_look_around_see_all_keys(what, keys):
    """As many keys as queries, or those of another sequence."""
    ranks, length = 3, 12
    bias = RelativeBias(8, 6, 2, bidirectional=True)
    torch.nn.init.normal_(bias.weight)
    lengths = torch.tensor([keys, 5, 0])
    options = {"plain": {}, "padding": {"lengths": lengths}, "bias": {"lengths": lengths, "bias": bias}}[what]
    whole = as_mask(Lookaround()(length, keys, CPU, **options), length, keys, CPU)
    for rank in range(ranks):
        look = ContextLookaround()
        look.chunks = Chunks(rank, ranks)
        views = look(length // ranks, keys // ranks, CPU, **options)
        for (first, end), (sees, seen) in zip(look.chunks.spans(length // ranks), views, strict=True):
            assert (sees.first, seen) == (first, keys)
            mask = as_mask(sees, end - first, keys, CPU)
            if what == "plain":
                assert mask is None
            else:
                wanted = whole[:, :, first:end] if what == "bias" else whole
                assert torch.equal(numbers(mask), numbers(wanted))


def numbers(mask):
    """A mask as what is added to scores."""
    return torch.zeros(mask.shape).masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else mask


@pytest.mark.parametrize("core", ["sdpa", "eager"])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("flag", [False, True])
def test_a_chunk_of_queries_against_the_keys_up_to_it(core, groups, flag):
    """`flag`: as on a GPU, whose kernels know the triangle."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 4, 12, 8), (2, groups, 12, 8), (2, groups, 12, 8))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    attend = make_core(AttentionSpec(32, 4, groups, 8, core=core))
    whole = attend(q, k, v, Lookback()(0, 12, CPU), None)
    sees = Lookback()(6, 3, CPU)
    assert torch.equal(sees.mask == 0, triangle(3, 9, CPU))
    sees = Visibility(causal=True, first=6) if flag else sees
    part = attend(q[:, :, 6:9], k[:, :, :9], v[:, :, :9], sees, None)
    assert (part - whole[:, :, 6:9]).abs().max() < 1e-14
    weight = torch.randn(part.shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad((part * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((whole[:, :, 6:9] * weight).sum(), (q, k, v))
    assert all((a - b).abs().max() < 1e-13 for a, b in zip(ours, theirs, strict=True))


def test_dropout_numbers_rows_in_the_whole_sequence():
    chunks, length = Chunks(1, 2), 8  # chunks 1 and 2 of 4
    drop = Dropout(0.5, 0)
    drop.__class__, drop.chunks = ContextDropout, chunks
    assert drop.rows(length // 2, CPU).tolist() == [2, 3, 4, 5]
    for part, wanted in enumerate(([2, 3], [4, 5])):
        drop.__class__, drop.shares = ContextSequenceDropout, Shares(None, part, 2, True)
        assert drop.rows(length // 4, CPU).tolist() == wanted


# -- on two ranks ------------------------------------------------------------------------------------------------------


def look(case):
    """What one rank of two is given, holds and prints."""
    topology = Topology.of(Sizes(context=2), "cpu")
    batch = make_batch(replace(case, reset=True), 0)
    share = prepare(batch, CausalLanguageModel(), topology, micro_batch_size=1)
    (stage,) = build(GPT, case.model, topology, seed=1)
    with pytest.raises(DataError, match="10 tokens cannot be cut into 4 equal chunks"):
        place({"tokens": torch.zeros(1, 10, dtype=torch.long)}, topology)
    return share.micros[0], (share.counts, share.samples, share.tokens), str(stage)


def test_a_rank_is_given_its_chunks_and_the_counts_of_the_whole(rank_pool):
    batch = make_batch(replace(CASE, reset=True), 0)
    for rank, (micro, counts, text) in enumerate(rank_pool.run(look, 2, CASE)):
        places = Chunks(rank, 2).places(8, CPU)
        for name in ("tokens", "targets", "positions"):
            assert torch.equal(micro[name], batch[name][:1, places]), name
        assert torch.equal(micro["documents"], batch["documents"][:1])  # keys are of the whole sequence
        assert counts == ({"lm": int((batch["targets"] >= 0).sum())}, 2, 32)
        assert "(core): ContextCore(\n" in text
        assert f"context=2, chunks {rank} and {3 - rank}\n" in text
        assert "ContextLookback(context=2)" in text


def look_at_pairs(bert, t5):
    """What one rank of two is given of two families' batches."""
    topology = Topology.of(Sizes(context=2), "cpu")
    with pytest.raises(DataError, match="10 encoder tokens cannot be cut into 4 equal chunks"):
        place({**make_batch(t5, 0), "encoder_tokens": torch.zeros(16, 10, dtype=torch.long)}, topology)
    return [
        prepare(make_batch(case, 0), objective_of(case.model), topology, micro_batch_size=8)
        for case in (bert, t5)
    ]


def test_types_are_cut_lengths_stay_and_an_encoder_has_places_of_its_own(rank_pool):
    shape = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 64}
    bert, t5 = (Case(kind(**shape), length=8, source=12) for kind in (BertConfig, EncoderDecoderConfig))
    batch, pair = make_batch(bert, 0), make_batch(t5, 0)
    for rank, (of_bert, of_t5) in enumerate(rank_pool.run(look_at_pairs, 2, bert, t5)):
        places, sources = Chunks(rank, 2).places(4, CPU), Chunks(rank, 2).places(6, CPU)
        mine, theirs = of_bert.micros[0], of_t5.micros[0]
        assert torch.equal(mine["types"], batch["types"][:8, places])
        assert torch.equal(mine["lengths"], batch["lengths"][:8])
        order = batch["order"][:8]
        assert (order >= 0).any()
        assert torch.equal(mine["order"], order if rank == 0 else torch.full_like(order, -1))
        assert of_bert.counts["sop"] == int((batch["order"] >= 0).sum()), "counted before, and once"
        assert torch.equal(theirs["encoder_tokens"], pair["encoder_tokens"][:8, sources])
        assert torch.equal(theirs["encoder_positions"], sources.expand(8, 6))
        assert torch.equal(theirs["positions"], places.expand(8, 4))
        assert torch.equal(theirs["encoder_lengths"], pair["encoder_lengths"][:8])


def saved_bytes(case, sizes):
    """What one forward keeps for its backward, without parameters."""
    topology = Topology.of(sizes, "cpu") if sizes.world > 1 else Topology.single("cpu")
    (stage,) = build(GPT, case.model, topology, seed=1)
    share = prepare(make_batch(case, 0), CausalLanguageModel(), topology, micro_batch_size=1)
    micro, kept = share.micros[0], {}
    weights = {tuple(shape) for p in stage.parameters() for shape in (p.shape, p.shape[::-1])}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if tuple(tensor.shape) not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = CausalLanguageModel().terms(
            stage, stage(micro["tokens"], positions=micro.get("positions")), micro
        )
    assert loss["lm"].sum.isfinite()
    return sum(size for size, _ in kept.values())


def test_activations_take_half_the_memory_on_two_ranks(rank_pool):
    """And what is gathered or joined besides: keys and values of the whole sequence, and on a CPU the masks."""
    length, width, layers = 160, 64, 2  # no weight has 160 or 80 rows
    sizes = {"hidden_size": width, "max_position_embeddings": 200, "hidden_dropout": 0.0}
    case = replace(CASE, model=CASE.model.model_copy(update=sizes), length=length)
    alone = saved_bytes(case, Sizes())
    parts = rank_pool.run(saved_bytes, 2, case, Sizes(context=2))
    keys_and_values, outputs = layers * 2 * length * width * 4, layers * length // 2 * width * 4
    # Each mask is kept once for all layers; the early chunk of rank 0 is a square, which needs none.
    masks = [40 * 160 * 4, (40 * 80 + 40 * 120) * 4]
    for kept, mask in zip(parts, masks, strict=True):
        assert kept <= alone / 2 + keys_and_values + outputs + mask
    assert max(parts) < 0.75 * alone
