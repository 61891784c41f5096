"""What a rehearsal says against real steps on real ranks: memory at rest to the byte, bytes sent, and memory at the peak."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megalith.models.config import ModelConfig
from megalith.parallel.memory import Recompute
from megalith.tools.plan.estimate import estimate
from megalith.tools.plan.rehearsal import GRADIENTS, OPTIMIZER, WEIGHTS, Case, rehearse
from megalith.topology.launch import fake
from megalith.topology.sizes import Sizes
from tests.tools.plan.real import batch, left, make_engine, measure, measure_peak

GPT2 = ModelConfig(
    vocab_size=509, num_layers=4, hidden_size=64, num_attention_heads=4, max_position_embeddings=32
)
LLAMA = ModelConfig(
    vocab_size=300, num_layers=4, hidden_size=60, num_attention_heads=6, num_query_groups=2, kv_channels=12,
    ffn_hidden_size=148, position_embedding_type="rope", normalization="rmsnorm", activation="swiglu", bias=False,
    share_embeddings_and_output_weights=False, hidden_dropout=0.0, make_vocab_size_divisible_by=2,
)  # fmt: skip
CASE = Case(GPT2, Sizes(), micro_batch=2, micro_batches=6, length=32)

LAYOUTS = {
    "one": Sizes(),
    "tensor": Sizes(tensor=2),
    "sequence": Sizes(tensor=2, sequence_parallel=True),
    "pipeline": Sizes(pipeline=2),
    "pipeline of four": Sizes(pipeline=4),
    "interleaved": Sizes(pipeline=2, virtual_pipeline=2, schedule="interleaved"),
    "zero bubble": Sizes(pipeline=2, schedule="zero_bubble"),
    "uneven": Sizes(pipeline=2, layers=(3, 1)),
    "replicas": Sizes(replicate=2),
    "zero 1": Sizes(shard=2, zero_stage=1),
    "zero 2": Sizes(shard=2, zero_stage=2),
    "zero 3": Sizes(shard=2, zero_stage=3),
    "hybrid": Sizes(shard=2, replicate=2, zero_stage=2),
    "without overlap": Sizes(shard=2, zero_stage=1, overlap=False),
    "context": Sizes(context=2),
    "tensor, pipeline": Sizes(tensor=2, pipeline=2),
    "tensor, zero 3": Sizes(tensor=2, shard=2, zero_stage=3),
    "sequence, context": Sizes(tensor=2, sequence_parallel=True, context=2),
    "pipeline, zero 1": Sizes(pipeline=2, shard=2, zero_stage=1),
    "pipeline, zero 3": Sizes(pipeline=2, shard=2, zero_stage=3),
    "interleaved, zero 3": Sizes(
        pipeline=2, virtual_pipeline=2, schedule="interleaved", shard=2, zero_stage=3
    ),
    "pipeline, context": Sizes(pipeline=2, context=2),
}
QUICK = {
    "one",
    "sequence",
    "interleaved",
    "zero 3",
    "hybrid",
    "tensor, pipeline",
    "pipeline, zero 3",
    "pipeline of four",
}
CASES = [
    *(pytest.param(replace(CASE, sizes=s), id=n, marks=() if n in QUICK else pytest.mark.slow) for n, s in LAYOUTS.items()),
    pytest.param(replace(CASE, model=LLAMA, sizes=Sizes(tensor=2, shard=2, zero_stage=2)), id="llama, odd rows"),
    pytest.param(replace(CASE, sizes=Sizes(pipeline=2), recompute=Recompute()), id="recomputed"),
    pytest.param(replace(CASE, micro_batches=1, sizes=Sizes(shard=4, zero_stage=3)), id="one micro-batch"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_rehearsal_is_a_real_step(rank_pool, case: Case):
    for real in rank_pool.run(measure, case.sizes.world, case):
        if not real.is_first:
            continue
        found = estimate(case, real.coordinates["pipeline"])
        assert (found.rest[WEIGHTS], found.rest[GRADIENTS], found.rest[OPTIMIZER]) == (
            real.weights, real.gradients, real.optimizer,
        )  # fmt: skip
        sent = {axis: sum(n for (name, _), n in found.sent.items() if name == axis) for axis in real.sent}
        assert sent == pytest.approx(real.sent, rel=0.01)
        assert {axis for axis, _ in found.sent} == set(real.sent)
        if (
            case.sizes.pipeline > 1
        ):  # gloo frees what it copies for sums and gathers in threads that no profiler sees
            assert found.total == pytest.approx(real.peak, rel=0.15)


SHAPES = {
    "gpt2": CASE,
    "wide": replace(CASE, model=GPT2.model_copy(update={"hidden_size": 256}), micro_batch=4, length=16),
    "llama": replace(CASE, model=LLAMA),
    "many tokens": replace(CASE, model=LLAMA.model_copy(update={"vocab_size": 4000})),
    "one micro-batch": replace(CASE, micro_batches=1),
    "eager": replace(CASE, model=GPT2.model_copy(update={"attention_dropout": 0.1})),
    "selective": replace(CASE, model=GPT2.model_copy(update={"attention_core": "eager"}), recompute=Recompute("selective")),
    "full": replace(CASE, recompute=Recompute()),
    "groups": replace(CASE, recompute=Recompute(layers=2)),
    "block": replace(CASE, recompute=Recompute(method="block", layers=2)),
    "bf16": replace(CASE, precision="bf16-mixed"),
    "deep": replace(CASE, model=GPT2.model_copy(update={"num_layers": 14})),
    "deep, recomputed in pairs": replace(CASE, model=GPT2.model_copy(update={"num_layers": 14}), recompute=Recompute(layers=2)),
    "tensor": replace(CASE, sizes=Sizes(tensor=2)),
    "sequence": replace(CASE, sizes=Sizes(tensor=4, sequence_parallel=True)),
    "context": replace(CASE, sizes=Sizes(context=2)),
    "zero 1": replace(CASE, sizes=Sizes(shard=4, zero_stage=1)),
    "zero 2": replace(CASE, sizes=Sizes(shard=4, zero_stage=2)),
    "zero 3": replace(CASE, sizes=Sizes(shard=4, zero_stage=3)),
    "deep, zero 3": replace(CASE, model=GPT2.model_copy(update={"num_layers": 14}), sizes=Sizes(shard=4, zero_stage=3)),
    "tensor, zero 3": replace(CASE, sizes=Sizes(tensor=2, shard=2, zero_stage=3)),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_the_peak_is_what_the_profiler_records(name):
    """Real tensors, in one process that believes to be one of several: the allocator sees what a rank's would, without gloo."""
    case = SHAPES[name]
    threads = torch.get_num_threads()
    with fake(case.sizes.world):
        real = measure_peak(make_engine(case), batch(case))
    torch.set_num_threads(threads)
    assert estimate(case).total == pytest.approx(real, rel=0.03)  # asked for: 0.15


@pytest.mark.parametrize(
    "name", ["gpt2", "wide", "llama", "eager", "selective", "full", "groups", "block", "bf16"]
)
def test_activations_are_what_a_forward_leaves_behind(name):
    case = SHAPES[name]
    engine, data = make_engine(case), batch(case)
    keys = torch.arange(case.micro_batch)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        hidden = engine.model(data["tokens"][: case.micro_batch].contiguous(), keys=keys)
    assert hidden.requires_grad
    assert rehearse(case).kept == pytest.approx(left(profiler), rel=0.03)  # asked for: 0.15
