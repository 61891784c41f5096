"""Groups, update rules, clipping and loss scaling, each against arithmetic written out by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch

from megalith.optim.adamw import get_updates, make_optimizer, moment_names, set_updates
from megalith.optim.clip import clip_, gradient_norm
from megalith.optim.config import OptimConfig
from megalith.optim.groups import parameter_groups, set_rates
from megalith.optim.scaler import ConstantScaler, DynamicScaler, make_scaler


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "table.weight": (5, 3),
        "up.weight": (4, 3),
        "up.bias": (4,),
        "norm.weight": (3,),
        "frozen": (2, 2),
    }
    out = {n: torch.nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for n, s in shapes.items()}
    out["frozen"].requires_grad_(False)
    return out


@pytest.mark.parametrize("name", ["fused_adam", "adam", "sgd"])
def test_nothing_to_update_is_a_step_too(name):
    frozen = {"frozen": parameters()["frozen"]}
    optimizer = make_optimizer(parameter_groups(frozen.items(), 0.1), OptimConfig(name=name))
    set_rates(optimizer, 1e-3, 0.1)
    set_updates(optimizer, 3)
    optimizer.step()
    assert get_updates(optimizer) == 0


def gradients(named, step):
    generator = torch.Generator().manual_seed(100 + step)
    return {
        n: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for n, p in named.items()
        if p.requires_grad
    }


def test_groups_leave_biases_norms_and_frozen_parameters_alone():
    groups = parameter_groups(parameters().items(), 0.1)
    assert [g["names"] for g in groups] == [["table.weight", "up.weight"], ["up.bias", "norm.weight"]]
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert len(parameter_groups({"b": torch.nn.Parameter(torch.zeros(2))}.items(), 0.1)) == 1


def by_hand(kind, p, g, state, lr, decay, t, betas=(0.9, 0.98), eps=1e-4, momentum=0.8):
    if kind == "sgd":
        g = g + decay * p
        state["v"] = momentum * state.get("v", torch.zeros_like(p)) + g
        return p - lr * state["v"]
    if kind == "adam":
        g = g + decay * p
    else:
        p = p - lr * decay * p
    state["m"] = betas[0] * state.get("m", torch.zeros_like(p)) + (1 - betas[0]) * g
    state["v"] = betas[1] * state.get("v", torch.zeros_like(p)) + (1 - betas[1]) * g * g
    m, v = state["m"] / (1 - betas[0] ** t), state["v"] / (1 - betas[1] ** t)
    return p - lr * m / (v.sqrt() + eps)


@pytest.mark.parametrize("kind", ["fused_adam", "adamw", "adam", "sgd"])
def test_updates_equal_the_arithmetic(kind):
    named = parameters()
    config = OptimConfig(name=kind, lr=0.1, betas=(0.9, 0.98), eps=1e-4, momentum=0.8)
    optimizer = make_optimizer(parameter_groups(named.items(), 0.3), config)
    expected = {n: p.detach().clone() for n, p in named.items()}
    states = {n: {} for n in named}
    for t in range(1, 5):
        lr, decay = 0.1 / t, 0.3 * t
        set_rates(optimizer, lr, decay)
        for n, g in gradients(named, t).items():
            named[n].grad = g
            expected[n] = by_hand(kind, expected[n], g, states[n], lr, decay * (g.ndim > 1), t)
        optimizer.step()
    for n, p in named.items():
        assert torch.allclose(p, expected[n], rtol=1e-12, atol=1e-13), n
    assert get_updates(optimizer) == (0 if kind == "sgd" else 4)


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_state_is_there_at_build_and_a_load_into_it_goes_on_bit_equal(kind):
    config = OptimConfig(name=kind, lr=0.05)

    def run(named, optimizer, steps):
        for t in steps:
            for n, g in gradients(named, t).items():
                named[n].grad = g
            optimizer.step()

    straight = parameters(torch.float32)
    one = make_optimizer(parameter_groups(straight.items(), 0.1), config)
    run(straight, one, range(6))
    first = parameters(torch.float32)
    two = make_optimizer(parameter_groups(first.items(), 0.1), config)
    run(first, two, range(3))
    second = parameters(torch.float32)
    three = make_optimizer(parameter_groups(second.items(), 0.1), config)
    for n, p in second.items():
        p.data.copy_(first[n])
        for moment in moment_names(config):
            if p.requires_grad:
                three.state[p][moment].copy_(two.state[first[n]][moment])
    set_updates(three, get_updates(two))
    run(second, three, range(3, 6))
    assert all(torch.equal(straight[n], second[n]) for n in straight)


def test_state_made_at_build_is_the_state_torch_would_make():
    named = parameters(torch.float32)
    ours = make_optimizer(parameter_groups(named.items(), 0.1), OptimConfig())
    lazy = torch.optim.AdamW([p for p in parameters(torch.float32).values() if p.requires_grad], fused=True)
    for p in lazy.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    lazy.step()
    made = {k: (v.dtype, v.ndim) for k, v in ours.state[named["up.weight"]].items()}
    assert made == {k: (v.dtype, v.ndim) for k, v in lazy.state[lazy.param_groups[0]["params"][1]].items()}


def test_norm_counts_every_element_once_in_double():
    grads = [torch.full((3,), 2.0), torch.full((2, 2), -1.0)]
    assert gradient_norm(grads).item() == 4.0
    assert gradient_norm(grads).dtype == torch.float64
    assert gradient_norm(grads, reduce=lambda total: total * 4).item() == 8.0
    assert gradient_norm([]).item() == 0.0
    many = torch.full((3_000_000,), 0.1)
    assert gradient_norm([many]).item() == pytest.approx(math.sqrt(3e6) * many[0].item(), rel=1e-7)
    huge = torch.full((1000,), 1e20)  # whose squares float32 has no room for
    assert gradient_norm([huge]).item() == pytest.approx(math.sqrt(1000) * huge[0].item(), rel=1e-10)
    assert not torch.isfinite(gradient_norm([*grads, torch.tensor([float("nan")])]))
    assert not torch.isfinite(gradient_norm([*grads, torch.tensor([float("inf")])]))


def test_clip():
    grads = [torch.tensor([3.0], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)]
    assert clip_(grads, 5.0, 10.0) == 1.0
    assert clip_(grads, 5.0, 0.0) == 1.0
    assert [g.item() for g in grads] == [3, 4]
    factor = clip_(grads, 5.0, 1.0)
    assert factor == 1.0 / (5.0 + 1e-6)
    assert [g.item() for g in grads] == [3 * factor, 4 * factor]


def test_scaler_hysteresis():
    scaler = DynamicScaler(initial=1024, growth_interval=4, hysteresis=2, minimum=64)
    story = [word == "bad" for word in ("bad " * 3 + "ok ok bad ok ok ok ok" + " bad" * 7).split()]
    # the first bad step is forgiven, each further one halves; four clean ones in a row double and forgive again
    expected = [1024, 512, 256, 256, 256, 128, 128, 128, 128, 256, 256, 128, 64, 64, 64, 64, 64]
    seen = []
    for bad in story:
        scaler.update(bad)
        seen.append(scaler.scale)
    assert seen == expected


def test_scaler_state_goes_through_json_with_its_patience():
    scaler = DynamicScaler(initial=1024, hysteresis=2)
    scaler.update(True)
    restored = DynamicScaler(initial=8, hysteresis=2)
    restored.load_state_dict(json.loads(json.dumps(scaler.state_dict())))
    restored.update(True)
    assert restored.scale == 512  # a fresh hysteresis would have forgiven this one


def test_make_scaler():
    assert make_scaler("bf16-mixed") == ConstantScaler(1.0)
    assert make_scaler("16-mixed", constant=128) == ConstantScaler(128.0)
    dynamic = make_scaler("16-mixed", initial=2.0**16, growth_interval=10, hysteresis=3)
    assert dynamic == DynamicScaler(2.0**16, 10, 3)
    constant = ConstantScaler(128.0)
    constant.update(True)
    constant.load_state_dict({"scale": 4.0})
    assert constant.scale == 128.0
