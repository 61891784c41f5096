"""What a checkpoint holds is enough to go on to the bit, and shares memory with the live engine."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from megalith.errors import CheckpointError
from megalith.optim.scaler import DynamicScaler
from megalith.topology.determinism import make_deterministic
from tests.engine.tiny import snapshot, tiny_batch, tiny_engine

PRECISIONS = ["32", "bf16-mixed", "16-mixed"]


def engine_of(precision, seed=7, **options):
    scaler = DynamicScaler(initial=2.0**20, growth_interval=2, hysteresis=2)
    return tiny_engine(
        precision=precision,
        seed=seed,
        model={"attention_dropout": 0.1},
        scaler=scaler if precision == "16-mixed" else None,
        **options,
    )


def restore(engine, tensors, state):
    targets = engine.tensors()
    assert targets.keys() == tensors.keys()
    for name, tensor in tensors.items():
        targets[name].copy_(tensor)
    engine.load_state_dict(json.loads(json.dumps(state)))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_six_steps_are_three_and_three(precision, name):
    whole, first = (engine_of(precision, optim={"name": name}) for _ in range(2))
    results = [whole.train_step(tiny_batch(step)) for step in range(6)]
    for step in range(3):
        assert repr(first.train_step(tiny_batch(step))) == repr(
            results[step]
        )  # repr: a skipped step's norm is nan
    second = engine_of(precision, seed=99, optim={"name": name})
    second.train_step(tiny_batch(17))  # a used engine is a target as good as a fresh one
    restore(second, snapshot(first), first.state_dict())
    for step in range(3, 6):
        assert repr(second.train_step(tiny_batch(step))) == repr(results[step])
    left, right = snapshot(whole), snapshot(second)
    assert all(torch.equal(left[n], right[n]) for n in left)
    assert whole.state_dict() == second.state_dict()


def test_fp16_steps_of_that_test_include_skips_and_growth():
    engine = engine_of("16-mixed")
    scales = [engine.train_step(tiny_batch(step)).loss_scale for step in range(6)]
    assert engine.skipped > 0
    assert any(later > earlier for earlier, later in pairwise(scales))


def test_tensors_are_the_live_ones_and_exist_before_the_first_step():
    engine = tiny_engine()
    tensors = engine.tensors()
    names = [name for name, _ in engine.model.named_parameters()]
    assert set(tensors) == {
        f"{part}.{name}{end}"
        for name in names
        for part, end in (("model", ""), ("optim", ".exp_avg"), ("optim", ".exp_avg_sq"))
    }
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    engine.train_step(tiny_batch())
    assert {name: tensor.data_ptr() for name, tensor in engine.tensors().items()} == addresses
    assert tensors["optim.token_embedding.weight.exp_avg"].abs().sum() > 0
    assert not any(tensor.requires_grad for tensor in tensors.values())


def test_state_is_json_and_complete():
    engine = engine_of("16-mixed")
    engine.train_step(tiny_batch())
    state = engine.state_dict()
    assert json.loads(json.dumps(state)) == state
    with pytest.raises(CheckpointError, match=r"no seed, updates"):
        engine.load_state_dict({k: v for k, v in state.items() if k not in ("updates", "seed")})


def test_repetition_is_bit_identical_and_passes_the_deterministic_switch():
    plain = tiny_engine(precision="bf16-mixed")
    for step in range(2):
        plain.train_step(tiny_batch(step))
    make_deterministic()
    try:
        strict = tiny_engine(precision="bf16-mixed")
        for step in range(2):
            strict.train_step(tiny_batch(step))
    finally:
        make_deterministic(False)
    left, right = snapshot(plain), snapshot(strict)
    assert all(torch.equal(left[n], right[n]) for n in left)
