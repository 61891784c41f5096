"""Weights cast once for reading: the numbers of the layers' own casts, on any kind of weight."""

import pytest
import torch
import torch.nn.functional as F

from megalith.generate import reading
from megalith.generate.engine import decode
from megalith.generate.reading import pack, prepare_for_reading, product
from megalith.generate.sampling import Sampling
from tests.generate.tiny import VARIANTS, tiny_model


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"),
    [("32", None, 1e-5), ("bf16-mixed", torch.bfloat16, 2e-2), ("64", None, 1e-12)],
)
def test_logits_and_loss_stay(name, precision, dtype, tolerance):
    model = tiny_model(precision=precision, **VARIANTS[name])
    tokens = torch.randint(61, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits, loss = model.logits(model(tokens)), model.loss(model(tokens), tokens)["lm"].sum
        prepared = prepare_for_reading(model, dtype)
        assert prepared is model
        again, loss_again = model.logits(model(tokens)), model.loss(model(tokens), tokens)["lm"].sum
    assert again.dtype == logits.dtype
    assert (again - logits).abs().max() <= tolerance * logits.abs().max()
    assert abs(loss_again - loss) <= tolerance * loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("rows", [(1,), (8,), (2, 3)])
def test_product_equals_linear(dtype, rows):
    weight, bias, x = torch.randn(61, 32).to(dtype), torch.randn(61).to(dtype), torch.randn(*rows, 32)
    for b in (bias, None):
        expected = F.linear(x.to(dtype), weight, b)
        found = product(weight, b, None)(x)
        assert found.dtype == dtype
        assert torch.allclose(found, expected, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-4)


def test_weights_are_cast_once():
    """No fp32 copy of a layer's weight stays behind, and no parameter asks for a gradient."""
    model = prepare_for_reading(tiny_model(precision="bf16-mixed"), torch.bfloat16)
    names = {name for name, _ in model.named_parameters()}
    assert not any(".attention." in name or ".mlp." in name for name in names)
    assert "token_embedding.weight" in names  # looked up in fp32
    assert not any(p.requires_grad for p in model.parameters())


def test_without_the_library(monkeypatch):
    """Where oneDNN's operators are missing or refuse, plain products give the same numbers."""
    assert pack(torch.randn(8, 8, dtype=torch.float64)) is None
    weight, x = torch.randn(16, 8), torch.randn(2, 8)
    monkeypatch.setattr(reading, "pack", lambda weight: None)
    assert torch.equal(product(weight, None, None)(x), F.linear(x, weight))


@pytest.mark.parametrize("name", VARIANTS)
def test_half_precision_with_the_cache(name):
    """On a CPU the cache is fp32 while products are bf16: first tokens and their log-probabilities are those without it."""
    model = prepare_for_reading(tiny_model(precision="bf16-mixed", **VARIANTS[name]), torch.bfloat16)
    prompts = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7]]
    with_cache, without = (
        list(
            decode(
                model, prompts, Sampling(tokens_to_generate=3), eod=None, recompute=recompute, logprobs=True
            )
        )[-1]
        for recompute in (False, True)
    )
    for row, again in zip(with_cache, without, strict=True):
        assert row.tokens[:-2] == again.tokens[:-2]
        assert row.logprobs[0] == pytest.approx(again.logprobs[0], abs=0.05)
        assert all(value < 0 for value in row.logprobs)
