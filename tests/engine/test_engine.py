"""The update is right, whatever the cut of the batch; bad steps change nothing but the counters."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F

from megalith.errors import ConfigError, TrainingStopped, UnsupportedError
from megalith.nn.dropout import sample_keys
from megalith.optim.scaler import ConstantScaler, DynamicScaler
from tests.engine.tiny import gradients, snapshot, tiny_batch, tiny_engine, worst

DROPOUT = {"attention_dropout": 0.1}


# -- the numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_cut_of_the_batch_gives_the_same_update(size):
    """Unequal counts, a micro-batch with none, dropout on, clipping active, decay groups."""
    whole, cut = (tiny_engine(model=DROPOUT, micro_batch_size=n) for n in (8, size))
    for step in range(3):
        a, b = whole.train_step(tiny_batch(step)), cut.train_step(tiny_batch(step))
        assert worst(gradients(whole), gradients(cut)) < 1e-10
        assert b.loss == pytest.approx(a.loss, rel=1e-12)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-12)
        assert a.grad_norm > whole.clip
    assert worst(snapshot(whole), snapshot(cut)) < 1e-10


def test_three_steps_equal_plain_pytorch():
    """The oracle: whole logits, torch's mean cross-entropy, torch's clipping, AdamW with groups by hand."""
    engine, oracle = tiny_engine(), tiny_engine()
    model = oracle.model
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, eps=1e-4, foreach=False)
    for step in range(3):
        batch = tiny_batch(step)
        result = engine.train_step(batch)
        for group in adamw.param_groups:
            group["lr"] = result.lr
        logits = model.logits(model(batch["tokens"], keys=sample_keys(7, step, batch["sample"])))
        loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=-1)
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), engine.clip)
        adamw.step()
        assert result.loss == pytest.approx(loss.item(), rel=1e-12)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-12)
    left, right = ({n: p.detach() for n, p in m.named_parameters()} for m in (engine.model, model))
    assert worst(left, right) < 1e-10


def test_megatrons_loss_average_is_the_mean_of_means():
    engine = tiny_engine(loss_average="micro_batches", model={"hidden_dropout": 0.0})
    oracle = tiny_engine(model={"hidden_dropout": 0.0}).model
    batch = tiny_batch()
    terms = engine.forward_backward(batch)
    means = []
    for rows in range(0, 8, 2):
        targets = batch["targets"][rows : rows + 2].flatten()
        logits = oracle.logits(oracle(batch["tokens"][rows : rows + 2])).flatten(0, 1)
        counted = (targets >= 0).sum().clamp(min=1)
        means.append(F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum") / counted)
    expected = torch.stack(means).mean()
    expected.backward()
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-12)
    assert worst(gradients(engine), {n: p.grad for n, p in oracle.named_parameters()}) < 1e-10
    by_tokens = tiny_engine(model={"hidden_dropout": 0.0})
    by_tokens.forward_backward(batch)
    assert worst(gradients(engine), gradients(by_tokens)) > 1e-2


def autocast_engine(**settings):
    """An engine whose model and loss run under torch.autocast instead of casting by themselves."""
    engine = tiny_engine(precision="32", **settings)
    for name in ("forward", "loss"):
        setattr(engine.model, name, torch.autocast("cpu", torch.bfloat16)(getattr(engine.model, name)))
    return engine


@pytest.mark.parametrize("model", [{}, DROPOUT, {"share_embeddings_and_output_weights": False}], ids=str)
def test_own_casts_are_bit_equal_to_autocast(model):
    own = tiny_engine(precision="bf16-mixed", model=model)
    autocast = autocast_engine(model=model)
    fp32 = tiny_engine(precision="32", model=model)
    for engine in (own, autocast, fp32):
        engine.forward_backward(tiny_batch())
    left, right, plain = gradients(own), gradients(autocast), gradients(fp32)
    assert all(g.dtype == torch.float32 for g in left.values())
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert worst(left, plain) > 1e-4  # the casts happened


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "16-mixed"])
def test_lower_precisions_stay_near_float64(precision):
    exact, engine = tiny_engine(), tiny_engine(precision=precision, scaler=ConstantScaler(2.0**10))
    exact.forward_backward(tiny_batch())
    engine.forward_backward(tiny_batch())
    scaled = {n: g.double() / 2**10 for n, g in gradients(engine).items()}
    limit = {"32": 1e-5, "bf16-mixed": 5e-2, "16-mixed": 1e-2}[precision]
    assert worst(gradients(exact), scaled) < limit


def test_a_loss_scale_leaves_the_update_alone():
    """A power of two changes exponents only, so the update of an fp32 run is the same to the bit."""
    plain, scaled = (tiny_engine(precision="32", scaler=ConstantScaler(s)) for s in (1.0, 2.0**8))
    for step in range(2):
        a, b = plain.train_step(tiny_batch(step)), scaled.train_step(tiny_batch(step))
        assert (a.loss, a.grad_norm, b.loss_scale) == (b.loss, b.grad_norm, 2.0**8)
    left, right = snapshot(plain), snapshot(scaled)
    assert all(torch.equal(left[name], right[name]) for name in left)


# -- rates and groups ----------------------------------------------------------------------------------------------


def test_biases_and_norms_do_not_decay_and_multipliers_apply():
    engine = tiny_engine(
        optim={"start_weight_decay": 0.1, "end_weight_decay": 0.5, "weight_decay_incr_style": "linear"}
    )
    engine.optimizer.param_groups[0]["lr_mult"] = 0.5
    result = engine.train_step(tiny_batch())
    matrices, others = engine.optimizer.param_groups
    assert matrices["lr"] == result.lr * 0.5
    assert others["lr"] == result.lr
    assert matrices["weight_decay"] == pytest.approx(0.1 + 0.4 / 20)
    assert others["weight_decay"] == 0.0
    assert all(name.endswith("bias") or "norm" in name for name in others["names"])


def test_frozen_parameters_stay_and_have_no_moments():
    engine = tiny_engine(frozen=[r"^blocks\.0\.", "embedding"])
    before = snapshot(engine)
    engine.train_step(tiny_batch())
    after = snapshot(engine)
    changed = {n for n in before if n.startswith("model.") and not torch.equal(before[n], after[n])}
    assert changed
    assert not any("blocks.0." in n or "embedding" in n for n in changed)
    assert not any(n.startswith(("optim.blocks.0.", "optim.token_embedding")) for n in after)


def test_freezing_nothing_is_an_error():
    with pytest.raises(ConfigError, match="no parameter matches 'blokcs'"):
        tiny_engine(frozen=["blokcs"])


def test_parameters_without_a_gradient_are_named():
    engine = tiny_engine()
    unused = torch.nn.Parameter(torch.ones(3))
    engine.trainable["unused.weight"] = unused
    with pytest.raises(
        UnsupportedError, match=r"no gradient reached 1 of \d+ trainable parameters: unused.weight"
    ):
        engine.train_step(tiny_batch())


# -- bad steps -----------------------------------------------------------------------------------------------------


def poison(engine, value=math.nan):
    """The next backward brings one bad number in one gradient."""
    parameter = engine.trainable["blocks.1.mlp.up.bias"]

    def bad(gradient):
        handle.remove()
        gradient = gradient.clone()
        gradient[3] = value
        return gradient

    handle = parameter.register_hook(bad)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("precision", ["64", "32", "bf16-mixed", "16-mixed"])
def test_a_bad_gradient_skips_the_step(precision, value, caplog):
    engine = tiny_engine(precision=precision, scaler=ConstantScaler(64.0))
    engine.train_step(tiny_batch(0))
    before, done = snapshot(engine), engine.done
    poison(engine, value)
    with caplog.at_level(logging.INFO):
        result = engine.train_step(tiny_batch(1))
    assert result.skipped
    assert "step 1 skipped" in caplog.text
    after = snapshot(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert engine.done == done
    assert (engine.step, engine.skipped, engine.skipped_in_a_row) == (2, 1, 1)
    assert (engine.consumed_samples, engine.consumed_tokens) == (16, 128)
    result = engine.train_step(tiny_batch(2))
    assert not result.skipped
    assert result.lr == engine.schedule.lr(done, engine.schedule.per_step)
    assert (engine.done.step, engine.done.samples, engine.skipped_in_a_row) == (2, 16, 0)


def test_adams_own_counter_does_not_move_on_a_skip():
    engine = tiny_engine()
    for step in range(3):
        if step == 1:
            poison(engine)
        engine.train_step(tiny_batch(step))
    assert {int(s["step"]) for s in engine.optimizer.state.values()} == {2}


def test_a_batch_without_targets_is_skipped_without_nan(caplog):
    scaler = DynamicScaler(initial=64.0, hysteresis=1)
    engine = tiny_engine(precision="16-mixed", scaler=scaler)
    before, batch = snapshot(engine), tiny_batch()
    batch["targets"][:] = -1
    result = engine.train_step(batch)
    assert result.skipped
    assert (result.loss, result.grad_norm, scaler.scale) == (0.0, 0.0, 64.0)
    assert "no target" in caplog.text
    after = snapshot(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not engine.train_step(tiny_batch(1)).skipped


def test_too_many_bad_steps_stop_the_run():
    engine = tiny_engine(max_skipped=2)
    poison(engine)
    engine.train_step(tiny_batch(0))
    poison(engine)
    with pytest.raises(TrainingStopped, match=r"(?s)2 steps in a row.*learning rate") as caught:
        engine.train_step(tiny_batch(1))
    assert caught.value.exit_code == 1
    assert engine.step == 2


def test_fp16_finds_its_scale():
    scaler = DynamicScaler(initial=2.0**32, growth_interval=5, hysteresis=2)
    engine = tiny_engine(precision="16-mixed", scaler=scaler)
    results = [engine.train_step(tiny_batch(step)) for step in range(30)]
    skipped = [r.skipped for r in results]
    first = skipped.index(False)
    assert all(skipped[:first])
    assert results[first].loss_scale == 2.0 ** (32 - first + 1)  # hysteresis: the first bad step is free
    assert {r.loss_scale for r in results[first:]} != {results[first].loss_scale}  # it grows again
    assert all(t.isfinite().all() for t in engine.tensors().values())
    assert engine.done.step == skipped.count(False)
    assert engine.skipped == skipped.count(True)


# -- evaluation ----------------------------------------------------------------------------------------------------


def test_evaluation_is_exact_and_leaves_training_alone():
    engine, undisturbed = tiny_engine(micro_batch_size=4), tiny_engine(micro_batch_size=4)
    for step in range(2):
        result = engine.train_step(tiny_batch(step))
        assert result == undisturbed.train_step(tiny_batch(step))
        before = snapshot(engine)
        found = engine.evaluate([tiny_batch(8), tiny_batch(9, samples=7)])  # the last micro-batch is short
        assert all(torch.equal(before[name], tensor) for name, tensor in engine.tensors().items())
    total, count = 0.0, 0
    model = engine.model.eval()
    for batch in (tiny_batch(8), tiny_batch(9, samples=7)):
        logits, targets = model.logits(model(batch["tokens"])).flatten(0, 1), batch["targets"].flatten()
        total += F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum").item()
        count += int((targets >= 0).sum())
    assert found["lm"][0] == pytest.approx(total, rel=1e-12)
    assert found["lm"][1] == count
    assert engine.model.train().training


def test_an_update_needs_a_gradient():
    with pytest.raises(RuntimeError, match="forward_backward"):
        tiny_engine().optimizer_step()
