"""Lightning's Trainer against `engine.fit`: the same losses to the last bit, the same files, and the same again after a resume."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from megalith.engine.fit import Every
from megalith.engine.fit import fit as plain_fit
from megalith.training.checkpointing import SaveTimes
from megalith.training.trainer import LoopSettings, fit

from .tiny import BATCH, make_engine, make_run, make_saver, stream, validation


class Rows(list):
    """A sink of rows."""

    __call__ = list.append

    def of(self, key):
        return {row["step"]: row[key] for row in self if key in row}


def plain(root, steps, *, save=4, validate=3):
    """The oracle: `engine.fit`."""
    engine = make_engine()
    saver = make_saver(engine, root / "checkpoints")
    losses, val = {}, {}

    def log(engine, report):
        losses[engine.step] = report.results[-1].loss

    def check(engine):
        total, count = engine.evaluate(validation())["lm"]
        val[engine.step] = total / count

    plain_fit(
        engine, stream(engine), max_steps=steps,
        log=Every(1, log), validate=Every(validate, check), save=Every(save, lambda e: saver.save()),
    )  # fmt: skip
    return engine, losses, val


def lightning(root, steps, *, save=4, validate=3, resume=None, engine=None, **options):
    engine = engine or make_engine()
    rows = Rows()
    run = make_run(engine, root, sinks=[rows], **options)
    settings = LoopSettings(max_steps=steps, log_every=1, validate_every=validate, save=SaveTimes(steps=save))
    outcome = fit(run, settings, resume=resume)
    return engine, rows, outcome


def files(folder):
    tensors = {p.name: load_file(p) for p in sorted(folder.glob("*.safetensors"))}
    state = json.loads((folder / "state.json").read_text())
    state.pop("loop")
    return tensors, state


def assert_same_checkpoint(one, two):
    (tensors, state), (others, other) = files(one), files(two)
    assert state == other
    assert tensors.keys() == others.keys()
    for name, group in tensors.items():
        assert group.keys() == others[name].keys()
        assert all(torch.equal(group[key], others[name][key]) for key in group)


def test_both_loops_give_the_same_losses_and_files(tmp_path):
    engine, losses, val = plain(tmp_path / "plain", 9)
    _, rows, outcome = lightning(tmp_path / "lightning", 9)
    assert rows.of("train_loss") == losses
    assert rows.of("val_loss") == val
    assert sorted(val) == [3, 6, 9]
    assert (outcome.step, outcome.stopped, outcome.trainer.global_step) == (9, None, 9)
    steps = sorted(p.name for p in (tmp_path / "plain/checkpoints").glob("step_*"))
    assert steps == ["step_0000004", "step_0000008", "step_0000009"]
    assert sorted(p.name for p in (tmp_path / "lightning/checkpoints").glob("step_*")) == steps
    for step in steps:
        assert_same_checkpoint(
            tmp_path / "plain/checkpoints" / step, tmp_path / "lightning/checkpoints" / step
        )
    assert engine.consumed_samples == 9 * BATCH


@pytest.mark.parametrize("stop_at", [1, 3, 4, 6])
def test_resume_goes_on_as_if_nothing_had_happened(tmp_path, stop_at):
    """Also at steps where a validation is due: it is neither repeated nor lost."""
    _, losses, val = plain(tmp_path / "plain", 8)
    _, before, _ = lightning(tmp_path / "run", stop_at)
    folder = tmp_path / f"run/checkpoints/step_{stop_at:07d}"
    engine, after, outcome = lightning(tmp_path / "run", 8, resume=folder)
    assert before.of("train_loss") | after.of("train_loss") == losses
    assert sorted(after.of("train_loss")) == list(range(stop_at + 1, 9))
    assert before.of("val_loss") | after.of("val_loss") == val
    assert not before.of("val_loss").keys() & after.of("val_loss").keys()
    assert outcome.trainer.global_step == engine.step == 8
    last = "checkpoints/step_0000008"
    assert_same_checkpoint(tmp_path / "plain" / last, tmp_path / "run" / last)


def test_lightning_goes_on_from_what_the_plain_loop_saved(tmp_path):
    _, losses, _ = plain(tmp_path / "plain", 8)
    plain(tmp_path / "short", 4)
    _, rows, _ = lightning(tmp_path / "short", 8, resume=tmp_path / "short/checkpoints/step_0000004")
    assert rows.of("train_loss") == {step: losses[step] for step in range(5, 9)}


def test_a_finished_run_resumed_does_nothing(tmp_path):
    lightning(tmp_path, 4)
    engine, rows, outcome = lightning(tmp_path, 4, resume=tmp_path / "checkpoints/step_0000004")
    assert (rows, engine.step, outcome.stopped) == ([], 4, None)
