"""Names, order of publication, owners, and what is done about the leftovers of dead processes."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import time

import pytest

from megalith.checkpoint import layout
from megalith.checkpoint.layout import (
    Owner,
    by_publication,
    clean_leftovers,
    newest_complete,
    newest_verified,
    owner_file,
    read_latest,
    step_folders,
    step_name,
    step_of,
)
from megalith.checkpoint.manifest import verify

from .helpers import checkpointer, save, snapshot


def test_names():
    assert [step_name(n) for n in (0, 1000, 12_345_678)] == ["step_0000000", "step_0001000", "step_12345678"]
    assert [
        step_of(n)
        for n in ("step_0001000", "step_12345678", "step_1", "step_0000001.partial", "xstep_0000001")
    ] == [
        1000,
        12_345_678,
        None,
        None,
        None,
    ]


def test_folders_are_ordered_by_number_not_by_letters(tmp_path):
    for step in (12_345_678, 9_999_999, 1):
        (tmp_path / step_name(step)).mkdir()
    assert [step_of(f.name) for f in step_folders(tmp_path)] == [1, 9_999_999, 12_345_678]
    assert step_folders(tmp_path / "absent") == []


def test_the_newest_is_the_one_published_last_not_the_highest_step(tmp_path):
    """A run went back from step 30 to 10 and saved 20: going on from 30 would be going on with the abandoned branch."""
    save(tmp_path, 10, 30)
    save(tmp_path, 20)
    assert newest_verified(tmp_path) == (tmp_path / "step_0000020", [])
    assert newest_complete(tmp_path) == tmp_path / "step_0000020"
    assert [f.name for f, _ in by_publication(tmp_path)] == ["step_0000020", "step_0000030", "step_0000010"]


def test_a_folder_published_after_latest_was_written_counts(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "latest").write_text("step_0000001\n")
    assert newest_verified(tmp_path)[0] == tmp_path / "step_0000002"


def test_damage_is_passed_over_and_said(tmp_path):
    save(tmp_path, 1, 2, 3, 4)
    (tmp_path / "step_0000004/manifest.json").write_text("{")
    content = bytearray((tmp_path / "step_0000003/model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "step_0000003/model.safetensors").write_bytes(content)
    folder, notices = newest_verified(tmp_path)
    assert folder == tmp_path / "step_0000002"
    assert len(notices) == 3
    assert "step_0000004 is damaged: manifest.json is not JSON" in notices[0]
    assert "step_0000003 is damaged: model.safetensors: its content changed" in notices[1]
    assert notices[2] == "going on from step_0000002, the newest checkpoint that is whole"
    for step in (1, 2):
        (tmp_path / step_name(step) / "state.json").unlink()
    folder, notices = newest_verified(tmp_path)
    assert folder is None
    assert len(notices) == 4
    assert newest_verified(tmp_path / "absent") == (None, [])


@pytest.mark.parametrize("text", ["", "../elsewhere", "/etc", "step_1", "step_0000001\nstep_0000002", "\0"])
def test_a_latest_that_names_no_step_is_no_answer(tmp_path, text):
    (tmp_path / "latest").write_text(text)
    assert read_latest(tmp_path) is None


def dead_owner() -> str:
    """The record of a process of this machine that has ended."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    started = layout._start_time(pid) or "1"
    os.waitpid(pid, 0)
    return json.dumps({"host": socket.gethostname(), "pid": pid, "started": started})


def test_the_unfinished_saves_of_dead_processes_are_removed_and_said(tmp_path):
    save(tmp_path, 1)
    before = snapshot(tmp_path)
    for step in (2, 3):
        partial = tmp_path / f"{step_name(step)}.partial"
        partial.mkdir()
        (partial / "model.safetensors").write_text("half")
    owner_file(tmp_path, step_name(2)).write_text(dead_owner())
    owner_file(tmp_path, step_name(9)).write_text("{")
    for name in (".step_0000001.manifest", ".step_0000001.link", ".latest"):
        (tmp_path / name).write_text("half")
    notices = checkpointer(tmp_path).notices
    assert [n.rpartition("/")[2][:20] for n in notices] == ["step_0000002.partial", "step_0000003.partial"]
    assert snapshot(tmp_path) == before
    assert clean_leftovers(tmp_path) == []
    assert clean_leftovers(tmp_path / "absent") == []


def test_nothing_but_our_own_names_is_touched(tmp_path):
    save(tmp_path, 1)
    for name in (
        "mine.partial",
        "step_1.partial",
        "step_0000002.partial.bak",
        "notes",
        ".step_0000001.manifest.txt",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    (tmp_path / "step_0000007.partial").write_text("a file, not a folder")
    (tmp_path / "step_0000008.partial").symlink_to(tmp_path / "notes")
    before = snapshot(tmp_path)
    assert clean_leftovers(tmp_path) == []
    assert snapshot(tmp_path) == before


def test_a_number_used_again_by_another_process_does_not_keep_a_leftover_alive(tmp_path):
    me = Owner.me()
    assert me.alive
    assert not Owner(me.host, me.pid, "1").alive
    (tmp_path / "step_0000002.partial").mkdir()
    owner_file(tmp_path, step_name(2)).write_text(
        json.dumps({"host": me.host, "pid": me.pid, "started": "1"})
    )
    assert len(clean_leftovers(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_process_of_another_machine_is_believed_for_an_hour(tmp_path):
    partial = tmp_path / "step_0000002.partial"
    partial.mkdir()
    record = owner_file(tmp_path, step_name(2))
    record.write_text(json.dumps({"host": "elsewhere", "pid": 3, "started": "1"}))
    assert "process 3 on elsewhere may be writing it" in clean_leftovers(tmp_path)[0]
    assert partial.exists()
    long_ago = time.time() - layout.ABANDONED_AFTER - 10
    for path in (partial, record):
        os.utime(path, (long_ago, long_ago))
    assert "removed" in clean_leftovers(tmp_path)[0]
    assert list(tmp_path.iterdir()) == []


def test_a_replacement_cut_short_is_undone_by_the_next_save(tmp_path, caplog):
    """Not by the next start: a run may have chosen to load it by the name it has."""
    save(tmp_path, 1, 2)
    os.rename(tmp_path / "step_0000002", tmp_path / "step_0000002.old")
    chosen, _ = newest_verified(tmp_path)
    assert chosen == tmp_path / "step_0000002.old"
    assert newest_complete(tmp_path) == chosen
    saver = checkpointer(tmp_path)
    assert saver.notices == []
    assert verify(chosen) == []
    with caplog.at_level(logging.WARNING):
        save(tmp_path, 3, saver=saver)
    assert "step_0000002.old is step_0000002 again" in caplog.text
    assert [f.name for f in step_folders(tmp_path)] == ["step_0000001", "step_0000002", "step_0000003"]


def test_a_replacement_that_was_finished_loses_its_old_folder(tmp_path):
    save(tmp_path, 1, 2)
    shutil.copytree(tmp_path / "step_0000002", tmp_path / "step_0000002.old")
    shutil.copytree(tmp_path / "step_0000001", tmp_path / "step_0000003.deleted")
    assert newest_verified(tmp_path)[0] == tmp_path / "step_0000002"
    assert clean_leftovers(tmp_path) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_0000001", "step_0000002"]
