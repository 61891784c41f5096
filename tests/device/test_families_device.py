"""BERT, T5 and BART on the device: gradients near float64 in every precision, and chunks that look around."""

from __future__ import annotations

import pytest
import torch

from megalith.models.bert_config import BertConfig
from megalith.models.encdec_config import EncoderDecoderConfig
from megalith.nn.attention import AttentionSpec
from megalith.nn.cores import make_core
from megalith.nn.visibility import Lookaround, Visibility
from megalith.testing.parity import Case, make_batch, make_engine
from megalith.topology.topology import Topology
from tests.device.small import gradients, worst

pytestmark = pytest.mark.device
CPU = torch.device("cpu")
LIMITS = {"32": 2e-5, "bf16-mixed": 3e-2}
"""Of the largest element of each gradient. bf16 keeps 8 bits of a product's operands."""
SHAPE = {
    "vocab_size": 300,
    "num_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "hidden_dropout": 0.1,
}
T5 = {
    "position_embedding_type": "relative",
    "normalization": "rmsnorm",
    "bias": False,
    "activation": "geglu",
    "share_embeddings_and_output_weights": False,
}
MODELS = {
    "bert": BertConfig(**SHAPE),
    "bert original": BertConfig(**SHAPE, transformer_block_type="post_ln"),
    "t5": EncoderDecoderConfig(**SHAPE, output_bias=True),
    "t5 1.1": EncoderDecoderConfig(**SHAPE, **T5),
    "bart": EncoderDecoderConfig(**SHAPE, transformer_block_type="post_ln", share_position_embeddings=False),
}


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_stay_near_float64(device, name, precision):
    """Padding, token types and both terms of BERT's loss; an encoder twice as long as its decoder."""
    found = {}
    for numbers, where in (("64", CPU), (precision, device)):
        case = Case(MODELS[name], precision=numbers, micro_batches=4, length=64, source=128)
        engine = make_engine(case, Topology.single(where))
        terms = engine.forward_backward(make_batch(case, 0))
        found[numbers] = gradients(engine), {name: term.item() for name, term in terms.items()}
    (wanted, losses), (mine, ours) = found["64"], found[precision]
    assert ours == pytest.approx(losses, rel=LIMITS[precision] / 5)
    error = worst(mine, wanted)
    assert error < LIMITS[precision]
    assert precision == "32" or error > 1e-5  # the casts happened


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_queries_of_a_chunk_among_all_keys(device, dtype, limit, groups, compiled):
    """Of rows with padding: what the whole sequence's queries get at these places."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 8, 384, 64), (2, groups, 768, 64), (2, groups, 768, 64))
    tensors = [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]
    q, k, v = tensors
    core = make_core(AttentionSpec(512, 8, groups, 64))
    attend = torch.compile(core, fullgraph=True) if compiled else core
    lengths = torch.tensor([768, 301], device=device)
    ours = attend(q[:, :, 96:192], k, v, Lookaround()(96, 768, device, first=96, lengths=lengths), None)
    hidden = (torch.arange(768, device=device) < lengths[:, None])[:, None, None]
    theirs = core(q, k, v, Visibility(mask=hidden), None)[:, :, 96:192]
    direction = torch.randn(ours.shape, generator=generator).to(device, dtype)
    gradients_of = [torch.autograd.grad((y * direction).sum(), tensors) for y in (ours, theirs)]
    for a, b in zip((ours, *gradients_of[0]), (theirs, *gradients_of[1]), strict=True):
        assert (a - b).abs().max() <= limit * b.abs().max()
