"""`megalith pretrain` on a nano corpus, whole: begin, go on, lengthen, change the batch, begin from weights.

What a family could do otherwise runs for each; what all have in common, for GPT.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from megalith.errors import EXIT_SUCCESS, CheckpointError, ConfigError, MegalithError

from .nano import (
    BATCH,
    FAMILIES,
    TOKENS,
    family_of,
    losses,
    make_corpus,
    overrides,
    pretrain,
    rows,
    steps_in,
)

RELATIVE = "exp_manager.checkpoint_callback_params"
each_family = pytest.mark.parametrize("corpus", FAMILIES, indirect=True)


@pytest.fixture(scope="module")
def corpus(request, tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), getattr(request, "param", "gpt"))


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """An uninterrupted run of 12 steps."""
    folder = tmp_path_factory.mktemp("whole")
    code, text = pretrain(corpus, folder)
    assert code == EXIT_SUCCESS
    return folder, text


@each_family
def test_a_run_trains_logs_and_saves(corpus, whole):
    folder, text = whole
    family = family_of(corpus)
    found = losses(folder)
    assert list(found) == list(range(1, 13))
    assert found[12] < found[1]
    assert list(losses(folder, "val_loss")) == [4, 8, 12]
    assert rows(folder)[-1]["consumed_samples"] == 12 * BATCH
    assert rows(folder)[-1]["consumed_tokens"] == 12 * BATCH * TOKENS[family]
    assert steps_in(folder) == [4, 8, 12]  # after each validation
    links = {p.name for p in (folder / "checkpoints").iterdir() if p.is_symlink()}
    last = losses(folder, "val_loss")[12]
    assert f"megatron_{family}--val_loss={last:.2f}-step=12-consumed_samples={12 * BATCH}.0-last" in links
    for word in ("parameters", "tokens, ", "from new weights", "done: step 12 of 12, validation loss"):
        assert word in text
    names = {p.name for p in folder.iterdir()}
    assert {
        "cmd-args.log",
        "config.yaml",
        "metrics.jsonl",
        "megalith_log_globalrank-0_localrank-0.txt",
    } <= names
    assert_terms(family, folder, text)
    step = folder / "checkpoints/step_0000012"
    assert {p.name for p in (step / "tokenizer").iterdir()} >= {"tokenizer.json"}
    state = json.loads((step / "state.json").read_text())
    assert {"architecture", "data_plan", "tokenizer", "origin", "scaler", "seed", "updates"} <= state.keys()


@pytest.mark.parametrize("corpus", ["t5"], indirect=True)
def test_a_prefix_language_model(corpus, tmp_path):
    """T5's other objective: the decoder goes on where the encoder's half of a window ends."""
    documents = f"model.data.data_prefix=[{corpus}/whole]"
    code, text = pretrain(corpus, tmp_path, "model.data.dataset_type=t5_prefix_lm", documents)
    assert code == EXIT_SUCCESS
    assert "done: step 12 of 12" in text
    found = losses(tmp_path)
    assert found[12] < found[1]


def assert_terms(family, folder, text):
    """A BERT's loss is a sum, and its perplexity that of the masked tokens; other losses have no parts."""
    (train,) = (row for row in rows(folder) if row["step"] == 12 and "train_loss" in row)
    (val,) = (row for row in rows(folder) if row["step"] == 12 and "val_loss" in row)
    metrics = json.loads((folder / "checkpoints/step_0000012/manifest.json").read_text())["metrics"]
    if family != "bert":
        assert not {key for key in (*train, *val, *metrics) if "lm" in key or "sop" in key}
        assert val["val_perplexity"] == pytest.approx(math.exp(val["val_loss"]))
        return
    assert train["train_loss"] == pytest.approx(train["lm loss"] + train["sop loss"])
    assert val["val_loss"] == pytest.approx(val["val_lm_loss"] + val["val_sop_loss"])
    assert val["val_perplexity"] == pytest.approx(math.exp(val["val_lm_loss"]))
    assert val["val_targets"] > 2 * BATCH, "tokens, not pairs"
    assert metrics["reduced_lm_train_loss"] == train["lm loss"]
    assert metrics["val_sop_loss"] == val["val_sop_loss"]
    assert f"(lm {train['lm loss']:.3f}, sop {train['sop loss']:.3f}) | lr" in text
    assert f"(lm {val['val_lm_loss']:.4f}, sop {val['val_sop_loss']:.4f}) | perplexity" in text


@each_family
def test_resume_is_bit_identical(corpus, whole, tmp_path):
    # The run is cut at a step between two validations and started again by the same command.
    pretrain(corpus, tmp_path, f"+{RELATIVE}.every_n_train_steps=5", "trainer.max_steps=5")
    code, text = pretrain(corpus, tmp_path)
    assert code == EXIT_SUCCESS
    assert "going on from step 5" in text
    assert losses(tmp_path) == losses(whole[0])
    assert losses(tmp_path, "val_loss") == losses(whole[0], "val_loss")
    for file in ("model.safetensors", "optim.safetensors"):
        ours, theirs = (load_file(f / "checkpoints/step_0000012" / file) for f in (tmp_path, whole[0]))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    moved = {p.name for p in (tmp_path / "run_0").iterdir()}
    assert {"cmd-args.log", "config.yaml"} <= moved


def test_a_complete_run_has_nothing_to_do_until_it_is_lengthened(corpus, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder, symlinks=True)
    code, text = pretrain(corpus, folder)
    assert (code, "nothing to do" in text) == (EXIT_SUCCESS, True)
    assert losses(folder) == losses(whole[0])
    code, _ = pretrain(corpus, folder, steps=14)
    assert code == EXIT_SUCCESS
    longer = losses(folder)
    assert {step: longer[step] for step in range(1, 13)} == losses(whole[0])
    assert list(longer) == list(range(1, 15))


@each_family
def test_another_batch_size_from_here_on_keeps_the_order(corpus, tmp_path):
    pretrain(corpus, tmp_path, "trainer.max_steps=4")
    pretrain(corpus, tmp_path, "model.global_batch_size=8", "model.micro_batch_size=4", steps=6)
    consumed = {row["step"]: row["consumed_samples"] for row in rows(tmp_path) if "train_loss" in row}
    assert consumed == {1: 4, 2: 8, 3: 12, 4: 16, 5: 24, 6: 32}


@each_family
def test_megatron_order_blend_and_ramp_up(corpus, tmp_path):
    blend = f"model.data.data_prefix=[0.3,{corpus}/nano,0.7,{corpus}/more]"
    more = ["model.data.order=megatron", "model.rampup_batch_size=[2,2,6]", blend]
    code, _ = pretrain(corpus, tmp_path, *more, steps=8)
    assert code == EXIT_SUCCESS
    sizes = {row["step"]: row["global_batch_size"] for row in rows(tmp_path) if "train_loss" in row}
    assert [sizes[step] for step in sorted(sizes)] == [2, 2, 2, 4, 4, 4, 4, 4]


@each_family
def test_begin_from_weights_once(corpus, whole, tmp_path):
    begin = f"model.init_from={whole[0]}"
    code, text = pretrain(corpus, tmp_path, begin, "trainer.max_steps=4")
    assert code == EXIT_SUCCESS
    assert "from the weights of" in text
    first = rows(tmp_path)[0]
    assert (first["step"], first["consumed_samples"]) == (1, BATCH)
    assert first["train_loss"] < losses(whole[0])[4]  # it knows what the base has learnt
    assert first["lr"] == rows(whole[0])[0]["lr"]  # the schedule begins anew
    before = losses(tmp_path)
    code, text = pretrain(corpus, tmp_path, begin, steps=6)
    assert "going on from step 4" in text
    assert {step: losses(tmp_path)[step] for step in before} == before
    assert list(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]


def test_resume_from_another_run_takes_everything(corpus, whole, tmp_path):
    folder = whole[0] / "checkpoints/step_0000008"
    code, _ = pretrain(corpus, tmp_path, f"model.resume_from_checkpoint={folder}")
    assert code == EXIT_SUCCESS
    assert losses(tmp_path) == {step: loss for step, loss in losses(whole[0]).items() if step > 8}


@pytest.mark.parametrize("key", ["model.init_from", "model.resume_from_checkpoint", "restore_from_path"])
def test_a_mistyped_path_ends_with_code_2_and_makes_nothing(corpus, whole, tmp_path, key):
    folder = tmp_path / "run"
    for path in (f"{whole[0]}x", f"{whole[0]}/checkpoints/step_0000009"):
        with pytest.raises(CheckpointError) as caught:
            pretrain(corpus, folder, f"{key}={path}")
        assert caught.value.exit_code == 2
    assert not folder.exists()


def test_another_model_or_tokenizer_is_refused_by_name(corpus, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder, symlinks=True)
    with pytest.raises(CheckpointError, match=r"model\.activation: gelu_tanh in the checkpoint, relu here"):
        pretrain(corpus, folder, "model.activation=relu")
    with pytest.raises(CheckpointError, match=r"model\.num_layers"):
        pretrain(corpus, folder, "model.num_layers=3")
    with pytest.raises(ConfigError, match="seed"):
        pretrain(corpus, folder, "model.seed=99", steps=14)
    assert losses(folder) == losses(whole[0])


def test_damage_falls_back_and_says_so(corpus, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder, symlinks=True)
    with open(folder / "checkpoints/step_0000012/optim.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    _, text = pretrain(corpus, folder)
    assert "step_0000012 is damaged" in text
    assert "going on from step 8" in text
    assert losses(folder) == losses(whole[0])


def test_trial_leaves_nothing_behind(corpus, tmp_path):
    code, text = pretrain(corpus, tmp_path / "run", "trainer.fast_dev_run=2")
    assert code == EXIT_SUCCESS
    assert "step 2/2" in text
    assert "validation loss" in text
    assert not (tmp_path / "run").exists()


def test_out_of_time_is_no_error(corpus, tmp_path):
    code, text = pretrain(corpus, tmp_path, "trainer.max_time=00:00:00:00")
    assert code == EXIT_SUCCESS
    assert "max_time is over" in text
    assert steps_in(tmp_path) == [1]


@each_family
def test_sixteen_bit_deterministic_async_profiled_and_tested(corpus, tmp_path):
    code, text = pretrain(
        corpus, tmp_path, "trainer.precision=16-mixed", "trainer.deterministic=true", "trainer.profiler=simple",
        "trainer.test_at_end=true", "trainer.limit_test_batches=1", f"{RELATIVE}.asynchronous=true",
        "model.initial_loss_scale=1048576", "exp_manager.create_tensorboard_logger=true", steps=4,
    )  # fmt: skip
    torch.use_deterministic_algorithms(False)
    assert code == EXIT_SUCCESS
    assert "test loss" in text
    assert "test_loss" in rows(tmp_path)[-1]
    assert all(math.isfinite(loss) for loss in losses(tmp_path).values())
    names = {p.name.split(".")[0] for p in tmp_path.iterdir()}
    assert {"events", "hparams", "fit-profile"} <= names
    assert steps_in(tmp_path) == [4]


def test_no_checkpoints_when_they_are_switched_off(corpus, tmp_path):
    pretrain(corpus, tmp_path, "exp_manager.create_checkpoint_callback=false", steps=4)
    assert steps_in(tmp_path) == []


def test_without_validation_it_saves_by_the_clock_and_keeps_the_newest(corpus, tmp_path):
    _, text = pretrain(corpus, tmp_path, "trainer.limit_val_batches=0", f"{RELATIVE}.save_top_k=2", steps=3)
    assert "every 0:30:00 (h:mm:ss), and at the end" in text
    more = [f"{RELATIVE}.every_n_train_steps=1", f"{RELATIVE}.save_top_k=2", "trainer.limit_val_batches=0"]
    _, text = pretrain(corpus, tmp_path, *more, steps=6)
    assert "after every step, and at the end" in text
    assert steps_in(tmp_path) == [5, 6]


def test_a_bad_template_is_an_error_before_anything_is_trained(corpus, tmp_path, monkeypatch):
    for template in ("a/b", "{val_loss:.2q}", "{}"):
        with pytest.raises(MegalithError, match="checkpoint_callback_params"):
            pretrain(corpus, tmp_path / "run", f"{RELATIVE}.filename='{template}'")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    wandb = ["wandb_logger_kwargs.name=a", "wandb_logger_kwargs.project=b", "create_wandb_logger=true"]
    with pytest.raises(ConfigError, match="wandb is not installed"):
        pretrain(corpus, tmp_path / "run", *(f"exp_manager.{key}" for key in wandb))
    assert not (tmp_path / "run").exists()


@each_family
def test_overrides_are_what_the_tests_think(corpus, tmp_path):
    assert len({item.split("=")[0] for item in overrides(corpus, tmp_path)}) == len(
        overrides(corpus, tmp_path)
    )


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(corpus, tmp_path):
    (tmp_path / "file").write_text("in the way", "utf-8")
    with pytest.raises(ConfigError, match=r"file/run cannot be used: Not a directory"):
        pretrain(corpus, tmp_path / "file" / "run")
