"""Folders and files of a run: names, restarts, metrics cut back, nothing lost."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from datetime import datetime

import pytest

from megalith.errors import CheckpointError, ConfigError
from megalith.training.config import ExpManagerConfig
from megalith.training.experiment import choose_folder, git_info, hold, log_files, open_folder
from megalith.training.metrics import MetricsFile

NOW = datetime(2024, 5, 6, 7, 8, 9)


def config(tmp_path, **values):
    return ExpManagerConfig(**{"exp_dir": str(tmp_path), "name": "gpt", **values})


@pytest.mark.parametrize(
    ("values", "folder"),
    [
        ({}, "gpt/2024-05-06_07-08-09"),
        ({"resume_if_exists": True}, "gpt"),
        ({"resume_if_exists": True, "version": "a"}, "gpt/a"),
        ({"version": "3"}, "gpt/3"),
        ({"use_datetime_version": False}, "gpt/version_0"),
        ({"name": None, "resume_if_exists": True}, "default"),
    ],
)
def test_layout(tmp_path, values, folder):
    experiment = choose_folder(config(tmp_path, **values), now=NOW)
    assert experiment.folder == tmp_path / folder
    assert experiment.checkpoints == tmp_path / folder / "checkpoints"
    assert not list(tmp_path.iterdir())  # choosing creates nothing


def test_numbers_go_up_and_explicit_folders_are_exact(tmp_path):
    (tmp_path / "gpt/version_4").mkdir(parents=True)
    found = choose_folder(config(tmp_path, use_datetime_version=False)).folder
    assert found.name == "version_5"
    exact = choose_folder(config(tmp_path, exp_dir=None, explicit_log_dir=str(tmp_path / "here")))
    assert exact.folder == tmp_path / "here"
    elsewhere = {"checkpoint_callback_params": {"dirpath": str(tmp_path / "disk")}}
    assert choose_folder(config(tmp_path, **elsewhere)).checkpoints == tmp_path / "disk"


def test_default_folder_is_nemos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment = choose_folder(ExpManagerConfig(resume_if_exists=True))
    assert experiment.folder == tmp_path / "nemo_experiments/default"


@pytest.mark.parametrize(
    ("key", "where", "values"),
    [
        ("explicit_log_dir", "here/checkpoints", {"exp_dir": None, "explicit_log_dir": "here"}),
        ("version", "gpt/v7/checkpoints", {"version": "v7"}),
        ("checkpoint_callback_params.dirpath", "d", {"checkpoint_callback_params": {"dirpath": "d"}}),
    ],
)
def test_a_folder_with_checkpoints_is_not_begun_anew(tmp_path, monkeypatch, key, where, values):
    monkeypatch.chdir(tmp_path)
    (tmp_path / where / "step_0000010").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="resume_if_exists is off") as refused:
        choose_folder(config(tmp_path, **values))
    assert refused.value.problem.fix.endswith(f"another exp_manager.{key}")


def start(tmp_path, step, *, files=()):
    experiment = choose_folder(config(tmp_path, resume_if_exists=True))
    notices = open_folder(experiment, config_yaml="a: 1\n", files=files, step=step)
    return experiment, notices


def test_restart_moves_loose_files_and_cuts_metrics_back(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["megalith", "pretrain", "gpt", "model.x=a b"])
    experiment, notices = start(tmp_path, 0)
    assert notices == []
    for step in range(1, 6):
        experiment.metrics.write({"step": step, "train_loss": 1.0 / step})
    experiment.metrics.write({"step": 5, "val_loss": float("nan")})
    with open(experiment.metrics.path, "a") as file:
        file.write('{"step": 6, "train_lo')  # killed while writing
    (experiment.folder / "events.out.tfevents.1").write_text("e")
    (experiment.folder / "checkpoints").mkdir()
    full = experiment.metrics.path.read_text()

    experiment, notices = start(tmp_path, 3)
    assert [row["step"] for row in experiment.metrics.read()] == [1, 2, 3]
    assert experiment.metrics.path.read_text().endswith("\n")
    assert notices == ["metrics.jsonl: 3 rows after step 3 moved to run_0/"]
    moved = sorted(p.name for p in (experiment.folder / "run_0").iterdir())
    assert {"cmd-args.log", "config.yaml", "events.out.tfevents.1", "metrics.jsonl"} <= set(moved)
    assert (experiment.folder / "run_0/metrics.jsonl").read_text() == full
    assert (experiment.folder / "cmd-args.log").read_text() == "megalith pretrain gpt 'model.x=a b'\n"
    assert (experiment.folder / "checkpoints").is_dir()

    experiment.metrics.write({"step": 4})
    experiment, notices = start(tmp_path, 4)
    assert notices == []
    assert [row["step"] for row in experiment.metrics.read()] == [1, 2, 3, 4]
    assert not (experiment.folder / "run_1/metrics.jsonl").exists()


def test_rows_are_valid_json_and_floats_come_back_exactly(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    row = {"step": 1, "train_loss": 0.1 + 0.2, "grad_norm": float("inf"), "skipped": 1}
    file.write(row)
    text = file.path.read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {**row, "grad_norm": None}
    assert file.read()[0]["train_loss"] == 0.1 + 0.2


def test_files_to_copy(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    experiment, _ = start(tmp_path, 0, files=[str(tmp_path / "notes.txt")])
    assert (experiment.folder / "notes.txt").read_text() == "hello"
    with pytest.raises(ConfigError, match="nothere"):
        start(tmp_path, 0, files=[str(tmp_path / "nothere.txt")])


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_info(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert git_info() == ""
    for words in (["init", "-q"], ["add", "a"], ["commit", "-qm", "x"]):
        (tmp_path / "a").write_text("one\n")
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", *identity, *words], check=True)
    (tmp_path / "a").write_text("two\n")
    text = git_info()
    assert text.startswith("commit hash: ")
    assert "+two" in text


def test_log_files_hold_what_is_logged_within(tmp_path):
    logger, said = logging.getLogger("megalith.somewhere"), []
    with log_files(tmp_path, say=said.append):
        logger.info("a notice")
        logger.error("an error")
    logger.error("after")
    assert said == ["error: an error"]
    everything = (tmp_path / "megalith_log_globalrank-0_localrank-0.txt").read_text()
    assert "a notice" in everything
    assert "an error" in everything
    assert "after" not in everything
    errors = (tmp_path / "megalith_error_log.txt").read_text()
    assert "an error" in errors
    assert "a notice" not in errors


def test_an_exception_is_written_down_with_its_traceback(tmp_path):
    said = []
    with pytest.raises(ZeroDivisionError), log_files(tmp_path, say=said.append):
        raise ZeroDivisionError("so")
    assert "ZeroDivisionError: so" in (tmp_path / "megalith_error_log.txt").read_text()
    assert said == []


def test_a_second_start_of_a_running_run_is_refused(tmp_path):
    with hold(tmp_path):
        other = subprocess.Popen(
            [sys.executable, "-c", "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)",
             str(tmp_path / ".running")], stderr=subprocess.PIPE,
        )  # fmt: skip
        assert b"BlockingIOError" in other.communicate()[1]
        with pytest.raises(CheckpointError, match="trains in this folder"), hold(tmp_path):
            pass
    with hold(tmp_path):  # given back
        pass
