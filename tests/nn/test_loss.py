"""The chunked cross entropy equals `F.cross_entropy` on whole logits, value and gradients, whatever it is asked."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megalith.nn.loss import CrossEntropy, product_columns, softmax_minus_one_hot

B, T, D, V, PADDED = 3, 7, 5, 11, 16


def make(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(PADDED, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(-1, V, (B, T), generator=generator)
    return hidden, weight, targets


def whole(hidden, weight, targets):
    logits = F.linear(hidden, weight[:V]).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum")


def close(a, b, tolerance=1e-12):
    return (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-30)


@pytest.mark.parametrize("chunk", [1, 4, 7, 21, 512])
@pytest.mark.parametrize("factor", [1.0, 1 / 37, -2.5e4])
def test_equals_whole_logits(chunk, factor):
    hidden, weight, targets = make()
    expected = whole(hidden, weight, targets)
    wanted = torch.autograd.grad(expected * factor, (hidden, weight))
    found = CrossEntropy(chunk)(hidden, weight, targets, V)
    gradients = torch.autograd.grad(found * factor, (hidden, weight))
    assert close(found, expected)
    assert close(gradients[0], wanted[0])
    assert close(gradients[1], wanted[1])
    assert gradients[1][V:].eq(0).all()


def test_padded_rows_do_not_matter():
    hidden, weight, targets = make()
    first = CrossEntropy(4)(hidden, weight, targets, V)
    with torch.no_grad():
        weight[V:] = 1e6
    assert torch.equal(CrossEntropy(4)(hidden, weight, targets, V), first)


@pytest.mark.parametrize("columns", [V + 1, PADDED])
def test_a_product_wider_than_the_vocabulary_changes_nothing(monkeypatch, columns):
    """What a GPU multiplies for alignment: padded rows get no gradient and give none, whatever they hold."""
    hidden, weight, targets = make()
    with torch.no_grad():
        weight[V:] = 1e6
    wanted = torch.autograd.grad(whole(hidden, weight, targets), (hidden, weight))
    monkeypatch.setattr("megalith.nn.loss.product_columns", lambda vocabulary, weight: columns)
    found = CrossEntropy(4)(hidden, weight, targets, V)
    gradients = torch.autograd.grad(found, (hidden, weight))
    assert close(found, whole(hidden, weight, targets))
    assert close(gradients[0], wanted[0])
    assert close(gradients[1], wanted[1])
    assert gradients[1][V:].eq(0).all()
    with torch.no_grad():
        assert close(CrossEntropy(4)(hidden, weight, targets, V), found)


@pytest.mark.parametrize(("device", "columns"), [("cpu", 11), ("meta", 16)])
def test_the_product_is_aligned_off_the_cpu(device, columns):
    assert product_columns(11, torch.empty(128, 4, device=device)) == columns
    assert product_columns(11, torch.empty(11, 4, device=device)) == 11


def test_numerical_gradient():
    """Against finite differences, so that the formula is not judged by autograd alone."""
    hidden, weight, targets = make()
    loss = CrossEntropy(5)
    assert torch.autograd.gradcheck(lambda h, w: loss(h, w, targets, V) / 3, (hidden, weight))


def test_large_logits_do_not_overflow():
    hidden, weight, targets = make()
    expected = whole(hidden * 1e5, weight, targets)
    found = CrossEntropy(4)(hidden * 1e5, weight, targets, V)
    assert torch.isfinite(found)
    assert close(found, expected)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_side_gets_no_gradient(frozen):
    hidden, weight, targets = make()
    moving, still = (weight, hidden) if frozen == "hidden" else (hidden, weight)
    still.requires_grad_(False)
    CrossEntropy(4)(hidden, weight, targets, V).backward()
    assert still.grad is None
    expected = torch.autograd.grad(whole(hidden, weight, targets), moving)[0]
    assert close(moving.grad, expected)


def test_tied_table_adds_both_uses():
    """The same table looks tokens up and is the head: its gradient is the sum."""
    _, weight, targets = make()
    tokens = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(3))
    CrossEntropy(4)(F.embedding(tokens, weight) * 1.5, weight, targets, V).backward()
    expected = torch.autograd.grad(whole(F.embedding(tokens, weight) * 1.5, weight, targets), weight)[0]
    assert close(weight.grad, expected)


def test_two_backward_passes_through_one_forward():
    hidden, weight, targets = make()
    total = CrossEntropy(4)(hidden, weight, targets, V)
    (total * 2).backward(retain_graph=True)
    first = hidden.grad.clone(), weight.grad.clone()
    (total * 3).backward()
    assert close(hidden.grad, first[0] * 2.5)
    assert close(weight.grad, first[1] * 2.5)


def test_two_losses_of_one_hidden():
    hidden, weight, targets = make()
    other = targets.flip(0)
    loss = CrossEntropy(4)
    (loss(hidden, weight, targets, V) + loss(hidden, weight, other, V)).backward()
    expected = torch.autograd.grad(
        whole(hidden, weight, targets) + whole(hidden, weight, other), (hidden, weight)
    )
    assert close(hidden.grad, expected[0])
    assert close(weight.grad, expected[1])


def test_nothing_counted():
    hidden, weight, targets = make()
    total = CrossEntropy(4)(hidden, weight, torch.full_like(targets, -1), V)
    total.backward()
    assert total == 0
    assert hidden.grad.eq(0).all()
    assert weight.grad.eq(0).all()


def test_no_rows():
    hidden, weight, _ = make()
    total = CrossEntropy(4)(hidden[:, :0], weight, torch.zeros(B, 0, dtype=torch.int64), V)
    total.backward()
    assert total == 0
    assert weight.grad.eq(0).all()


def test_evaluation_keeps_no_graph_and_no_gradient(monkeypatch):
    hidden, weight, targets = make()
    loss = CrossEntropy(4)
    loss.elementwise = None  # the gradient's code must not run
    with torch.no_grad():
        found = loss(hidden, weight, targets, V)
    assert not found.requires_grad
    assert close(found, whole(hidden, weight, targets))
    with torch.inference_mode():
        assert close(loss(hidden, weight, targets, V), whole(hidden, weight, targets))


def test_logits_never_exist_whole(monkeypatch):
    """Count the rows of every product with the table."""
    sizes = []
    hidden, weight, targets = make()
    loss = CrossEntropy(4)

    def spy(logits, targets, wide):
        sizes.append(tuple(logits.shape))
        return softmax_minus_one_hot(logits, targets, wide)

    loss.elementwise = spy
    loss(hidden, weight, targets, V)
    assert sizes == [(4, V)] * 5 + [(1, V)]


def test_half_precision_sums_in_fp32():
    """bf16 products, fp32 log-sum-exp and sums: within bf16 rounding of float64, the sum itself fp32."""
    hidden, weight, targets = make(torch.float32)
    loss = CrossEntropy(4)
    loss.compute_dtype = torch.bfloat16
    found = loss(hidden, weight, targets, V)
    assert found.dtype == torch.float32
    found.backward()
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = whole(*wide, targets)
    expected.backward()
    assert close(found.double(), expected, 1e-2)
    assert close(hidden.grad.double(), wide[0].grad, 2e-2)
    assert close(weight.grad.double(), wide[1].grad, 2e-2)
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_weight_gradient_accumulates_in_fp32():
    """1024 equal rows, one at a time: bf16 sums would stop growing at 256 parts."""
    hidden = torch.ones(1, 1024, 1).requires_grad_()
    weight = torch.zeros(2, 1).requires_grad_()
    loss = CrossEntropy(1)
    loss.compute_dtype = torch.bfloat16
    loss(hidden, weight, torch.zeros(1, 1024, dtype=torch.int64), 2).backward()
    assert weight.grad.flatten().tolist() == [-512.0, 512.0]


@pytest.mark.slow
def test_compiled_elementwise_is_the_same():
    hidden, weight, targets = make()
    loss = CrossEntropy(4)
    loss.elementwise = torch.compile(softmax_minus_one_hot)
    found = loss(hidden, weight, targets, V)
    gradients = torch.autograd.grad(found, (hidden, weight))
    wanted = torch.autograd.grad(whole(hidden, weight, targets), (hidden, weight))
    assert close(found, whole(hidden, weight, targets))
    assert close(gradients[0], wanted[0])
    assert close(gradients[1], wanted[1])


@pytest.mark.parametrize("columns", [V, PADDED])
@pytest.mark.parametrize("chunk", [4, 512])
def test_a_bias_of_the_logits(monkeypatch, chunk, columns):
    hidden, weight, targets = make()
    bias = torch.randn(PADDED, dtype=torch.float64).requires_grad_()
    logits = F.linear(hidden, weight[:V], bias[:V]).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum")
    wanted = torch.autograd.grad(expected * 0.3, (hidden, weight, bias))
    monkeypatch.setattr("megalith.nn.loss.product_columns", lambda vocabulary, weight: columns)
    found = CrossEntropy(chunk)(hidden, weight, targets, V, bias)
    assert close(found, expected)
    for gradient, right in zip(torch.autograd.grad(found * 0.3, (hidden, weight, bias)), wanted, strict=True):
        assert close(gradient, right)
    with torch.no_grad():
        assert close(CrossEntropy(chunk)(hidden, weight, targets, V, bias), expected)


def test_a_frozen_bias_and_no_rows():
    hidden, weight, targets = make()
    bias = torch.ones(PADDED, dtype=torch.float64)
    CrossEntropy()(hidden, weight, targets, V, bias).backward()
    assert bias.grad is None
    bias.requires_grad_()
    hidden, weight, targets = make()
    CrossEntropy()(hidden[:0], weight, targets[:0], V, bias).backward()
    assert bias.grad.eq(0).all()
    assert weight.grad.eq(0).all()


@pytest.mark.parametrize("counted", [0, 1, 20, 39])
def test_picking_counted_rows_changes_nothing(counted):
    """But the order of sums: hidden states' and the table's gradients of a batch with few targets, many, or none."""
    generator = torch.Generator().manual_seed(counted)
    hidden = torch.randn(4, 10, 8, dtype=torch.float64, generator=generator)
    weight = torch.randn(20, 8, dtype=torch.float64, generator=generator)
    targets = torch.full((40,), -1)
    targets[torch.randperm(40, generator=generator)[:counted]] = 3
    found = []
    for picks in (False, True):
        loss = CrossEntropy(chunk=7)
        loss.picks = picks
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        total = loss(*leaves, targets.view(4, 10), 17)
        found.append((total.detach(), *torch.autograd.grad(total, leaves)))
    for plain, picked in zip(*found, strict=True):
        assert torch.allclose(plain, picked, rtol=1e-12, atol=1e-12)


def test_rows_that_are_not_counted_are_left_out():
    seen = []
    loss = CrossEntropy()
    loss.picks, value = True, loss.value
    loss.value = lambda logits, *rest: seen.append(len(logits)) or value(logits, *rest)
    targets = torch.full((2, 50), -1)
    targets[:, -3:] = 1
    with torch.no_grad():
        loss(torch.randn(2, 50, 4), torch.randn(9, 4), targets, 9)
    assert seen == [6]
