"""From which checkpoint a run starts: every combination of what is there and what was asked."""

from __future__ import annotations

import pytest

from megalith.errors import CheckpointError
from megalith.training.starting import choose_start

from .tiny import make_engine, make_saver


@pytest.fixture(scope="module")
def engine():
    return make_engine()


def save(engine, root, *steps, origin=None):
    saver = make_saver(engine, root)
    saver.extra["origin"] = origin or {}
    for step in steps:
        engine.step = step
        saver.save()
    return root


def damage(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_nothing_there(tmp_path):
    root = tmp_path / "checkpoints"
    assert choose_start(root, resume_if_exists=False).kind == "fresh"
    assert choose_start(root, resume_if_exists=True, ignore_no_checkpoint=True).kind == "fresh"
    with pytest.raises(CheckpointError, match="resume_ignore_no_checkpoint"):
        choose_start(root, resume_if_exists=True)


def test_own_newest_whole_one(tmp_path, engine):
    root = save(engine, tmp_path / "checkpoints", 3, 7)
    start = choose_start(root, resume_if_exists=True)
    assert (start.kind, start.folder.name, start.notices, start.state["step"]) == (
        "resume",
        "step_0000007",
        (),
        7,
    )
    damage(root / "step_0000007")
    start = choose_start(root, resume_if_exists=True)
    assert start.folder.name == "step_0000003"
    assert any("step_0000007 is damaged" in notice for notice in start.notices)
    damage(root / "step_0000003")
    with pytest.raises(CheckpointError, match="no checkpoint of this run is whole"):
        choose_start(root, resume_if_exists=True, ignore_no_checkpoint=True)


@pytest.mark.parametrize("key", ["resume_from", "init_from"])
def test_a_mistyped_path_is_an_error_never_a_fresh_start(tmp_path, engine, key):
    save(engine, tmp_path / "base/checkpoints", 5)
    for path in (tmp_path / "bases", tmp_path / "base/checkpoints/step_0000006", tmp_path):
        for ignore in (False, True):
            with pytest.raises(CheckpointError):
                choose_start(
                    tmp_path / "own", resume_if_exists=ignore, ignore_no_checkpoint=ignore, **{key: path}
                )
    damage(tmp_path / "base/checkpoints/step_0000005")
    with pytest.raises(CheckpointError, match="damaged"):
        choose_start(tmp_path / "own", resume_if_exists=False, **{key: tmp_path / "base"})


def test_resume_from_happens_once(tmp_path, engine):
    base = save(engine, tmp_path / "base/checkpoints", 5).parent
    own = tmp_path / "own"
    first = choose_start(own, resume_if_exists=True, resume_from=base)
    assert (first.kind, first.folder.name) == ("resume", "step_0000005")
    save(engine, own, 6, origin=first.origin)
    again = choose_start(own, resume_if_exists=True, resume_from=base)
    assert again.folder == own / "step_0000006"
    assert again.origin == first.origin
    # A step of the run itself: back to it once, then on from there, although another step is further.
    back = choose_start(own, resume_if_exists=True, resume_from=base / "checkpoints/step_0000005")
    assert back.folder.name == "step_0000005"


def test_init_from_happens_once(tmp_path, engine):
    base = save(engine, tmp_path / "base/checkpoints", 5).parent
    own = tmp_path / "own"
    first = choose_start(own, resume_if_exists=True, init_from=base)
    assert (first.kind, first.folder.name, first.state) == ("weights", "step_0000005", {})
    save(engine, own, 2, origin=first.origin)
    again = choose_start(own, resume_if_exists=True, init_from=base)
    assert (again.kind, again.folder.name) == ("resume", "step_0000002")
    assert choose_start(own, resume_if_exists=True).kind == "resume"


def test_init_from_into_a_run_that_began_otherwise_is_refused(tmp_path, engine):
    base = save(engine, tmp_path / "base/checkpoints", 5).parent
    own = save(engine, tmp_path / "own", 2)
    with pytest.raises(CheckpointError, match="did not begin with the weights") as caught:
        choose_start(own, resume_if_exists=True, init_from=base)
    assert "without model.init_from to go on" in str(caught.value)
    with pytest.raises(CheckpointError, match="without restore_from_path to go on"):
        choose_start(own, resume_if_exists=True, init_from=base, key="restore_from_path")


def test_both_paths_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="keep one"):
        choose_start(tmp_path, resume_if_exists=False, resume_from="a", init_from="b")
