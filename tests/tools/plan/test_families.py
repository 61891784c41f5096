"""What a rehearsal says of BERT, T5 and BART against real steps on real ranks, as `test_against_real_steps` does of GPT."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megalith.models.bert_config import BertConfig
from megalith.models.encdec_config import EncoderDecoderConfig
from megalith.parallel.memory import Recompute
from megalith.tools.plan.estimate import estimate
from megalith.tools.plan.rehearsal import GRADIENTS, OPTIMIZER, WEIGHTS, Case
from megalith.tools.plan.speed import bubble, flops, recomputed_layers
from megalith.topology.launch import fake
from megalith.topology.sizes import Sizes
from tests.tools.plan.real import batch, make_engine, measure, measure_peak

SHAPE = {
    "vocab_size": 509,
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
}
BERT = Case(BertConfig(**SHAPE), Sizes(), micro_batch=2, micro_batches=4, length=32, targets=5)
BART = Case(EncoderDecoderConfig(**SHAPE, output_bias=True), Sizes(), 2, 4, length=48, decoder_length=32)
T5 = replace(
    BART,
    model=EncoderDecoderConfig(**SHAPE, position_embedding_type="relative", decoder_num_layers=2, share_embeddings_and_output_weights=False),
)  # fmt: skip
INTERLEAVED = Sizes(pipeline=2, virtual_pipeline=2, schedule="interleaved")
STEPS = {
    "bert, sequence": replace(BERT, sizes=Sizes(tensor=2, sequence_parallel=True)),
    "bert, pipeline, zero 3": replace(BERT, sizes=Sizes(pipeline=2, shard=2, zero_stage=3)),
    "t5, pipeline": replace(T5, sizes=Sizes(pipeline=2)),
    "t5, pipeline of four": replace(T5, sizes=Sizes(pipeline=4)),
    "bart, interleaved": replace(BART, sizes=INTERLEAVED),
    "bart, interleaved, zero 2": replace(BART, sizes=replace(INTERLEAVED, shard=2, zero_stage=2)),
    "bart, tensor, pipeline": replace(BART, sizes=Sizes(tensor=2, pipeline=2)),
    "bart, recomputed": replace(BART, sizes=Sizes(pipeline=2), recompute=Recompute()),
}
QUICK = {"bert, sequence", "t5, pipeline of four", "bart, interleaved, zero 2"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in STEPS]
)
def test_a_rehearsal_is_a_real_step(rank_pool, name):
    case = STEPS[name]
    for real in rank_pool.run(measure, case.sizes.world, case):
        if not real.is_first:
            continue
        found = estimate(case, real.coordinates["pipeline"])
        assert (found.rest[WEIGHTS], found.rest[GRADIENTS], found.rest[OPTIMIZER]) == (
            real.weights, real.gradients, real.optimizer,
        )  # fmt: skip
        sent = {axis: sum(n for (axis_, _), n in found.sent.items() if axis_ == axis) for axis in real.sent}
        assert sent == pytest.approx(real.sent, rel=0.01)
        if case.sizes.pipeline > 1:
            assert found.total == pytest.approx(real.peak, rel=0.15)


@pytest.mark.parametrize("case", [BERT, T5, BART], ids=["bert", "t5", "bart"])
def test_the_peak_is_what_the_profiler_records(case):
    with fake(1):
        real = measure_peak(make_engine(case), batch(case))
    assert estimate(case).total == pytest.approx(real, rel=0.03)


@pytest.mark.slow
def test_a_deep_stage_is_on_the_line():
    """Of many layers two depths are rehearsed; here beside the whole."""
    deep = T5.model.model_copy(update={"encoder_num_layers": 9, "decoder_num_layers": 10})
    case = replace(T5, model=deep, sizes=Sizes(pipeline=2))
    even = replace(case, sizes=Sizes(pipeline=4, pipeline_split=2))
    for stage in (0, 1):
        line, whole = (
            estimate(case, stage),
            estimate(replace(case, recompute=Recompute(method="block", layers=0)), stage),
        )
        assert line.rest == whole.rest
        assert line.total == pytest.approx(whole.total, rel=0.01)
    assert estimate(even, 2).rest[WEIGHTS] < estimate(case, 1).rest[WEIGHTS]


def test_layers_that_are_computed_again_are_counted_on_either_side():
    sizes, how = Sizes(pipeline=4, layers=(3, 1, 1, 1)), Recompute(method="block", layers=2)
    assert recomputed_layers((4, 2), how, sizes) == [3, 2]
    assert recomputed_layers((4, 2), how, Sizes()) == [2, 2]
    assert recomputed_layers((4, 2), Recompute(), sizes) == [4, 2]
    plain, again = (flops(T5.model, T5.sample, recompute, Sizes()) for recompute in (None, Recompute()))
    assert plain.hardware == plain.model == again.model
    blocks = plain.model - 6 * 509 * 64 * T5.decoder_length / T5.sample.tokens
    assert again.hardware == pytest.approx(plain.model + blocks / 3)


def test_a_backward_that_is_not_divided_fills_no_gaps():
    sizes = Sizes(pipeline=4, schedule="zero_bubble")
    assert bubble(sizes, 8, undivided=True) == 3 * bubble(sizes, 8)
