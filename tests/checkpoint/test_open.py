"""Every way a user may name a checkpoint, and what a mistyped one is answered with."""

from __future__ import annotations

import os

import pytest

from megalith.checkpoint.open import locate, resolve, resolve_all
from megalith.checkpoint.retention import Policy
from megalith.errors import CheckpointError

from .helpers import TEMPLATE, checkpointer, save


@pytest.fixture
def run(tmp_path):
    """A run folder `gpt` with steps 10 and 20, and the links of the retention."""
    root = tmp_path / "gpt" / "checkpoints"
    save(root, 10, 20, saver=checkpointer(root, policy=Policy(filename=TEMPLATE)), val_loss=2.0)
    return tmp_path / "gpt"


def test_each_spelling_leads_to_the_newest(run, monkeypatch):
    newest = run / "checkpoints/step_0000020"
    last = next((run / "checkpoints").glob("*step=20*-last"))
    for path in (
        run,
        str(run),
        run / "checkpoints",
        run / "checkpoints/latest",
        newest,
        newest / "manifest.json",
        newest / "model.safetensors",
        last,
        last / "config.yaml",
        run / "checkpoints" / ".." / "checkpoints",
    ):
        assert resolve(path) == newest
    monkeypatch.chdir(run.parent)
    assert resolve("gpt") == newest
    monkeypatch.setenv("HOME", str(run.parent))
    assert resolve("~/gpt") == newest


def test_an_older_step_by_folder_or_link(run):
    older = run / "checkpoints/step_0000010"
    assert resolve(older) == older
    assert resolve(next(p for p in (run / "checkpoints").glob("*step=10*"))) == older


def test_a_copied_and_renamed_step_folder(run, tmp_path):
    os.rename(run / "checkpoints/step_0000010", tmp_path / "my model")
    assert resolve(tmp_path / "my model") == tmp_path / "my model"


def test_an_incomplete_latest_is_passed_over_but_an_explicit_step_is_not(run):
    (run / "checkpoints/step_0000020/optim.safetensors").unlink()
    assert resolve(run) == run / "checkpoints/step_0000010"
    for path in (run / "checkpoints/step_0000020", run / "checkpoints/latest"):
        with pytest.raises(CheckpointError, match=r"damaged\n\s+optim.safetensors: missing"):
            resolve(path)
    (run / "checkpoints/step_0000010/manifest.json").unlink()
    with pytest.raises(CheckpointError, match="none of its checkpoints is complete") as caught:
        resolve(run)
    assert "step_0000010: no manifest.json" in str(caught.value)
    assert "step_0000020: optim.safetensors: missing" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"damaged\n\s+no manifest.json"):
        resolve(run / "checkpoints/step_0000010")


def test_a_lost_or_wrong_latest_is_no_obstacle(run):
    for text in ("step_0000099\n", "nonsense"):
        (run / "checkpoints/latest").write_text(text)
        assert resolve(run) == run / "checkpoints/step_0000020"
        with pytest.raises(CheckpointError, match="which is not here"):
            resolve(run / "checkpoints/latest")
    (run / "checkpoints/latest").unlink()
    assert resolve(run) == run / "checkpoints/step_0000020"


def test_near_names_are_offered(run):
    for wrong, right in (
        (run.parent / "gtp", run),
        (run / "checkpoint", run / "checkpoints"),
        (run / "checkpoints/step_000020", run / "checkpoints/step_0000020"),
        (run.parent / "gptt/checkpoints/step_0000020", run),
    ):
        with pytest.raises(CheckpointError, match="there is no such file or folder") as caught:
            resolve(wrong)
        assert f"{right}" in str(caught.value)
        assert "did you mean" in str(caught.value)
    with pytest.raises(CheckpointError, match="holds gpt"):
        resolve(run.parent / "zzz")
    with pytest.raises(CheckpointError, match="no such file"):
        resolve(run / "checkpoints/step_0000020/config.yaml/x")


def test_what_is_not_a_checkpoint_is_named_with_what_is_there(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint in it") as caught:
        resolve(tmp_path / "empty")
    assert "is empty" in str(caught.value)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match="is a file, not a checkpoint"):
        resolve(tmp_path / "notes.txt")
    with pytest.raises(CheckpointError, match="it holds runs") as caught:
        resolve(tmp_path)
    assert str(run) in str(caught.value)


def test_links_that_lead_nowhere(run, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="cannot be followed"):
        resolve(tmp_path / "loop")
    (tmp_path / "gone").symlink_to("step_0000001")
    with pytest.raises(CheckpointError, match="a link to step_0000001, which is gone"):
        resolve(tmp_path / "gone")


def test_all_of_a_run_or_one(run):
    folders = [run / "checkpoints/step_0000010", run / "checkpoints/step_0000020"]
    (folders[0] / "manifest.json").unlink()
    assert resolve_all(run) == folders
    assert resolve_all(run / "checkpoints/latest") == folders[1:]
    assert resolve_all(folders[0]) == folders[:1]
    assert locate(run) == run / "checkpoints"
    for folder in folders:
        os.rename(folder, run / f"{folder.name}.partial")
    with pytest.raises(CheckpointError, match="there is no checkpoint in it"):
        resolve_all(run)
