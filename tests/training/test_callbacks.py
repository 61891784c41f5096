"""When a run logs, validates, saves and stops, on a run of a few steps."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import warnings

import lightning.pytorch as pl
import pytest
import torch
from rich.console import Console

from megalith.checkpoint.retention import Policy, Retention
from megalith.errors import TrainingStopped, UnsupportedError
from megalith.training.checkpointing import SaveTimes
from megalith.training.progress import ProgressDisplay, duration, say, thousands
from megalith.training.stopping import StopRequest
from megalith.training.trainer import Batches, LoopSettings, fit

from .tiny import BATCH, LENGTH, batch, make_engine, make_run, make_saver


def steps_in(root):
    return [int(p.name[5:]) for p in sorted((root / "checkpoints").glob("step_*"))]


def run(tmp_path, *, steps=6, engine=None, stop=None, run_options=None, resume=None, **settings):
    engine = engine or make_engine()
    rows = []
    made = make_run(engine, tmp_path, sinks=[rows.append], **(run_options or {}))
    outcome = fit(made, LoopSettings(max_steps=steps, **settings), stop=stop, resume=resume)
    return engine, rows, outcome


def test_rows(tmp_path):
    engine, rows, _ = run(tmp_path, steps=5, log_every=2, validate_every=2)
    train = [row for row in rows if "train_loss" in row]
    assert [row["step"] for row in train] == [1, 2, 4, 5]  # from the first step on, and the last
    assert train[-1]["consumed_samples"] == 5 * BATCH == engine.consumed_samples
    assert train[-1]["consumed_tokens"] == 5 * BATCH * LENGTH
    assert train[0]["lr"] == engine.schedule.lr(type(engine.done)())
    assert {"grad_norm", "tokens_per_second", "tflops_per_second", "loss_scale", "skipped"} <= train[0].keys()
    assert train[2]["tokens_per_second"] * train[2]["step_seconds"] == pytest.approx(BATCH * LENGTH)
    val = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in val] == [2, 4]
    assert next(list(row) for row in rows if row["step"] == 2)[3] == "train_loss"  # before its validation


def test_validation_mean_is_over_targets_not_batches(tmp_path):
    def uneven():
        yield batch(0, 4)
        few = batch(50, 2)
        few["targets"][:, 2:] = -1
        yield few

    engine = make_engine()
    made = make_run(engine, tmp_path)
    made.validation = Batches(uneven)
    outcome = fit(made, LoopSettings(max_steps=1, validate_every=1))
    total, count = 0.0, 0
    model = engine.model.eval()
    with torch.no_grad():
        for part in uneven():
            logits = model.logits(model(part["tokens"])).double()
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), part["targets"].flatten(), ignore_index=-1, reduction="sum"
            )
            total, count = total + loss.item(), count + int((part["targets"] >= 0).sum())
    assert outcome.validation.targets == count
    assert outcome.validation.loss == pytest.approx(total / count, rel=1e-6)
    assert outcome.validation.perplexity == pytest.approx(2.718281828459045 ** (total / count), rel=1e-6)


@pytest.mark.parametrize(
    ("save", "validate", "expected"),
    [
        (SaveTimes(steps=2), None, [2, 4, 5]),
        (SaveTimes(), 2, [2, 4, 5]),  # neither steps nor time: after each validation
        (SaveTimes(), None, [5]),
        (SaveTimes(steps=100), 2, [5]),
        (SaveTimes(seconds=1e-9), None, [1, 2, 3, 4, 5]),
        (None, 2, []),
    ],
)
def test_when_it_saves(tmp_path, save, validate, expected):
    run(tmp_path, steps=5, save=save, validate_every=validate)
    assert steps_in(tmp_path) == expected


def test_checkpoints_know_the_validation_of_their_own_step_only(tmp_path):
    _, rows, _ = run(tmp_path, steps=4, save=SaveTimes(steps=1), validate_every=2)
    val = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    for step in steps_in(tmp_path):
        manifest = json.loads((tmp_path / f"checkpoints/step_{step:07d}/manifest.json").read_text())
        assert manifest["metrics"].get("val_loss") == val.get(step)
        assert manifest["metrics"]["consumed_samples"] == step * BATCH
        assert manifest["metrics"]["train_loss"] > 0


def test_top_k_and_names(tmp_path):
    policy = Policy(save_top_k=1, filename="gpt--{val_loss:.2f}-{step}-{consumed_samples}")
    engine = make_engine()
    saver = make_saver(engine, tmp_path / "checkpoints", retention=Retention(policy))
    _, rows, _ = run(tmp_path, engine=engine, steps=5, validate_every=1, run_options={"saver": saver})
    val = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    best = min(val, key=val.get)
    assert steps_in(tmp_path) == sorted({best, 5})
    links = {p.name: os.readlink(p) for p in (tmp_path / "checkpoints").iterdir() if p.is_symlink()}
    name = f"gpt--val_loss={val[best]:.2f}-step={best}-consumed_samples={best * BATCH}.0"
    assert links[name] == f"step_{best:07d}"
    assert links[f"gpt--val_loss={val[5]:.2f}-step=5-consumed_samples={5 * BATCH}.0-last"] == "step_0000005"


class Send(pl.Callback):
    """Sends a signal to this very process at a step."""

    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_train_batch_start(self, trainer, module, *_):
        if trainer.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_after_the_step_and_stops(tmp_path, number, capfd):
    before = signal.getsignal(number)
    options = {"callbacks": [Send(number, 3)]}
    _engine, rows, outcome = run(tmp_path, validate_every=3, save=SaveTimes(steps=100), run_options=options)
    assert (outcome.stopped, outcome.step) == (number.name, 3)
    assert steps_in(tmp_path) == [3]
    assert not any("val_loss" in row for row in rows)  # no validation on the way out
    assert f"{number.name}: saving after this step" in capfd.readouterr().err
    assert signal.getsignal(number) is before


def test_out_of_time(tmp_path):
    _, _, outcome = run(tmp_path, stop=StopRequest(0.0), save=SaveTimes(steps=100))
    assert (outcome.step, outcome.stopped, outcome.out_of_time) == (1, None, True)
    assert steps_in(tmp_path) == [1]


def test_skips_in_a_row_stop_the_run_with_an_error_that_teaches(tmp_path):
    engine = make_engine(max_skipped=3)
    with torch.no_grad():
        engine.model.token_embedding.weight.fill_(float("nan"))
    with pytest.raises(TrainingStopped, match="3 steps in a row"):
        run(tmp_path, engine=engine, log_every=1)
    assert engine.skipped == 3
    assert steps_in(tmp_path) == []


class Remember(pl.Callback):
    """Someone else's callback, with a state."""

    def __init__(self, value=None):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def test_states_of_other_peoples_callbacks_are_kept(tmp_path):
    options = {"callbacks": [Remember({"seen": [1, 2.5, "x", None, True]})]}
    run(tmp_path, steps=2, run_options=options)
    again = Remember()
    run(tmp_path, steps=3, run_options={"callbacks": [again]}, resume=tmp_path / "checkpoints/step_0000002")
    assert again.value == {"seen": [1, 2.5, "x", None, True]}
    with pytest.raises(UnsupportedError, match="Remember"):
        run(tmp_path / "other", steps=1, run_options={"callbacks": [Remember(object())]})


def test_early_stopping_of_lightning_works(tmp_path):
    stopper = pl.callbacks.EarlyStopping(monitor="val_loss", patience=0, divergence_threshold=0.0)
    engine, _, outcome = run(tmp_path, steps=50, validate_every=2, run_options={"callbacks": [stopper]})
    assert engine.step == 2
    assert outcome.stopped is None
    assert steps_in(tmp_path) == [2]


def test_quiet_but_not_deaf(tmp_path, caplog, capfd):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run(tmp_path, steps=2, save=SaveTimes(steps=1), run_options={"callbacks": [Speak()]})
        run(tmp_path, steps=3, resume=tmp_path / "checkpoints/step_0000002")
    assert [str(w.message) for w in seen] == ["mind this"]
    error = capfd.readouterr().err
    assert "Tip" not in error
    assert "GPU available" not in error
    assert "Restoring" not in error


class Speak(pl.Callback):
    def on_train_start(self, trainer, module):
        warnings.warn("mind this", stacklevel=1)


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    text = io.StringIO()
    display = ProgressDisplay(total=4, console=Console(file=text, width=200))
    run(tmp_path, steps=4, log_every=2, validate_every=4, run_options={"display": display})
    lines = text.getvalue().splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["step 1/4", "step 2/4", "step 4/4", "step 4"]
    assert "tokens/s" in lines[0]
    assert "TFLOP/s" in lines[0]
    assert "ETA 0:00:0" in lines[0]
    assert "MFU" not in lines[0]  # no peak is known
    assert "validation loss" in lines[3]


def test_bar_on_a_terminal(tmp_path):
    text = io.StringIO()
    console = Console(file=text, width=160, force_terminal=True)
    run(tmp_path, steps=3, log_every=1, run_options={"display": ProgressDisplay(total=3, console=console)})
    assert "step 3/3" in text.getvalue() or "step 2/3" in text.getvalue()
    assert "loss" in text.getvalue()


def test_numbers_for_people():
    assert [thousands(x) for x in (999.4, 18234, 2.5e6, 3e9)] == ["999", "18.2k", "2.5M", "3G"]
    assert [duration(x) for x in (5, 3729, 90061)] == ["0:00:05", "1:02:09", "1d 1:01:01"]


class Ambient(pl.Callback):
    """What surrounds a step."""

    def __init__(self):
        self.autocast = set()

    def on_train_batch_start(self, trainer, module, *_):
        self.autocast.add(torch.is_autocast_enabled("cpu"))


def test_lightning_never_learns_what_the_engine_owns(tmp_path):
    ambient = Ambient()
    engine = make_engine(precision="bf16-mixed", clip=0.5)
    _, _, outcome = run(tmp_path, engine=engine, steps=2, run_options={"callbacks": [ambient]})
    trainer = outcome.trainer
    assert (trainer.precision, trainer.gradient_clip_val, trainer.accumulate_grad_batches) == (
        "32-true",
        None,
        1,
    )
    assert ambient.autocast == {False}
    assert not list(outcome.module.parameters())
    assert trainer.num_devices == 1


def test_on_a_terminal_lines_are_wrapped_between_words_under_what_they_say():
    text = io.StringIO()
    console = Console(file=text, width=60, force_terminal=True)
    say(console, "machine    CPU; precision bf16-mixed: this CPU multiplies bf16 natively (avx512_bf16)")
    say(
        console, "warning: removed /a/folder/step_0000008.partial, an unfinished save of a process that ended"
    )
    assert text.getvalue().splitlines() == [
        "machine    CPU; precision bf16-mixed: this CPU multiplies",
        "           bf16 natively (avx512_bf16)",
        "warning: removed /a/folder/step_0000008.partial, an",
        "    unfinished save of a process that ended",
    ]


def test_elsewhere_a_line_stays_whole():
    text = io.StringIO()
    say(Console(file=text, width=40), "word " * 30)
    assert len(text.getvalue().splitlines()) == 1


def test_the_last_measurements_stay_when_the_bar_goes(tmp_path):
    text = io.StringIO()
    console = Console(file=text, width=160, force_terminal=True, color_system=None)
    run(tmp_path, steps=3, log_every=1, run_options={"display": ProgressDisplay(total=3, console=console)})
    assert re.search(r"^step 3/3 \| loss \d", text.getvalue().split("\x1b[2K")[-1])


@pytest.mark.parametrize("terminal", [True, False])
def test_a_signal_does_not_write_into_the_bar(tmp_path, terminal, capfd):
    text = io.StringIO()
    console = Console(file=text, width=160, force_terminal=terminal, color_system=None)
    display = ProgressDisplay(total=9, console=console)
    options = {"callbacks": [Send(signal.SIGTERM, 2)], "display": display}
    run(tmp_path, steps=9, save=SaveTimes(steps=100), run_options=options)
    words = "SIGTERM: saving after this step"
    assert (words in text.getvalue()) is terminal  # drawn below the bar, at its next refresh
    assert (words in capfd.readouterr().err) is not terminal


def test_a_number_stays_with_its_unit_on_a_narrow_terminal():
    text = io.StringIO()
    console = Console(file=text, width=50, force_terminal=True)
    say(console, "step 20/20 | loss 7.288 | norm 0.68 | 10.2k tokens/s | 0.012 TFLOP/s")
    assert text.getvalue().splitlines() == [
        "step 20/20 | loss 7.288 | norm 0.68 |",
        "    10.2k tokens/s | 0.012 TFLOP/s",
    ]
