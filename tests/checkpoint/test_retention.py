"""What stays, what goes, and the links: decided by exact numbers, in an order that a crash cannot hurt."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as some

from megalith.checkpoint import retention
from megalith.checkpoint.layout import newest_verified, step_folders, step_name, step_of
from megalith.checkpoint.manifest import read_manifest, verify
from megalith.checkpoint.native import load
from megalith.checkpoint.retention import Policy, Retention

from .helpers import TEMPLATE, blank, checkpointer, same, save, snapshot, tensors_of


def run(root: Path, policy: Policy, *losses: float | None, first: int = 1) -> list[int]:
    """Saves a step for each loss (None: no validation yet) under `policy`; the steps that are left."""
    saver = checkpointer(root, policy=policy)
    for step, loss in enumerate(losses, start=first):
        save(root, step, saver=saver, **({} if loss is None else {"val_loss": loss}))
    return steps(root)


def steps(root: Path) -> list[int | None]:
    return [step_of(folder.name) for folder in step_folders(root)]


def links(root: Path) -> dict[str, str]:
    return {p.name: str(p.readlink()) for p in root.iterdir() if p.is_symlink()}


def test_the_best_and_the_last_stay(tmp_path):
    assert run(tmp_path, Policy(save_top_k=2), 5, 3, 4, 2, 6) == [2, 4, 5]


def test_mode_max(tmp_path):
    assert run(tmp_path, Policy(save_top_k=2, mode="max"), 5, 3, 4, 2, 1) == [1, 3, 5]


def test_all_none_and_the_most_recent(tmp_path):
    assert run(tmp_path / "a", Policy(save_top_k=-1), 5, 3, 4) == [1, 2, 3]
    assert run(tmp_path / "b", Policy(save_top_k=0), 5, 3, 4) == [3]
    assert run(tmp_path / "c", Policy(save_top_k=2, monitor=None), 1, 2, 3, 4) == [3, 4]


def test_values_closer_than_a_name_can_tell_are_told_apart(tmp_path):
    """Both names say val_loss=2.00; NeMo, which reads its names back, could not choose."""
    policy = Policy(save_top_k=1, filename=TEMPLATE)
    assert run(tmp_path, policy, 2.0, 2.0 - 1e-12, 2.0 + 1e-12, 9) == [2, 4]


def test_of_equals_the_older_stays(tmp_path):
    assert run(tmp_path, Policy(save_top_k=1), 2, 2, 2) == [1, 3]


def test_a_save_without_a_value_gives_way_to_every_one_with_a_value(tmp_path):
    assert run(tmp_path, Policy(save_top_k=2), None, 9, None, float("nan"), 8, None) == [2, 5, 6]


def test_places_that_no_value_fills_go_to_the_most_recent(tmp_path):
    nan = float("nan")
    assert run(tmp_path / "a", Policy(save_top_k=3), None, None, None, None, None) == [3, 4, 5]
    assert run(tmp_path / "b", Policy(save_top_k=3), nan, None, nan, None) == [2, 3, 4]
    assert run(tmp_path / "c", Policy(save_top_k=3), 9, None, None, 8, None, None) == [1, 4, 6]
    assert run(tmp_path / "d", Policy(save_top_k=3, mode="max"), None, 5, None, None) == [2, 3, 4]


def test_every_nth_stays_for_good(tmp_path):
    assert run(tmp_path, Policy(save_top_k=1, keep_every_n_steps=3), 1, *range(2, 9)) == [1, 3, 6, 8]


def test_a_run_that_went_back_keeps_what_it_published_last(tmp_path):
    run(tmp_path, Policy(save_top_k=1), 3, 2, 1, first=5)
    assert run(tmp_path, Policy(save_top_k=1), 4, first=6) == [6, 7]
    assert newest_verified(tmp_path)[0] == tmp_path / step_name(6)


def test_links_have_nemos_names_and_follow_what_stays(tmp_path):
    run(tmp_path, Policy(save_top_k=2, filename=TEMPLATE), 5, 3.456, 4, 2, 6)
    assert links(tmp_path) == {
        "megatron_gpt--val_loss=3.46-step=2-consumed_samples=16.0": "step_0000002",
        "megatron_gpt--val_loss=2.00-step=4-consumed_samples=32.0": "step_0000004",
        "megatron_gpt--val_loss=6.00-step=5-consumed_samples=40.0-last": "step_0000005",
    }
    run(tmp_path, Policy(save_top_k=1, filename=TEMPLATE, save_last=False), 1, first=6)
    assert links(tmp_path) == {"megatron_gpt--val_loss=1.00-step=6-consumed_samples=48.0": "step_0000006"}


def test_names_that_clash_get_numbers(tmp_path):
    run(tmp_path, Policy(save_top_k=3, filename="best-{val_loss:.1f}"), 1.01, 1.02, 1.03)
    assert links(tmp_path) == {
        "best-val_loss=1.0": "step_0000001",
        "best-val_loss=1.0-v1": "step_0000002",
        "best-val_loss=1.0-v2": "step_0000003",
        "best-val_loss=1.0-last": "step_0000003",
    }


def test_links_and_files_that_people_made_stay(tmp_path):
    policy = Policy(save_top_k=1, filename="m-{step}")
    run(tmp_path, policy, 2, 1)
    (tmp_path / "favourite").symlink_to("step_0000002")
    (tmp_path / "home").symlink_to("/")
    (tmp_path / "m-step=9-last").symlink_to("../elsewhere")
    (tmp_path / "m-step=3").write_text("a file where a link should go")
    run(tmp_path, policy, 0.5, first=3)
    assert (tmp_path / "m-step=3").read_text() == "a file where a link should go"
    assert links(tmp_path) == {"home": "/", "m-step=9-last": "../elsewhere", "m-step=3-last": "step_0000003"}


def test_the_optimizer_of_older_ones_is_dropped(tmp_path):
    run(tmp_path, Policy(save_top_k=2, drop_optimizer=True), 1, 2, 3)
    for step in (1, 2):
        folder = tmp_path / step_name(step)
        assert verify(folder) == []
        assert not (folder / "optim.safetensors").exists()
        assert read_manifest(folder).dropped == ("optim.safetensors",)
        live = blank(optimizer=False)
        load(folder, live)
        assert same(live, tensors_of(step, optimizer=False))
    live = blank()
    load(tmp_path / step_name(3), live)
    assert same(live, tensors_of(3))


def test_nothing_older_goes_when_the_newest_is_damaged(tmp_path, caplog):
    run(tmp_path, Policy(save_top_k=-1), 1, 2, 3)
    content = bytearray((tmp_path / "step_0000003/model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "step_0000003/model.safetensors").write_bytes(content)
    with caplog.at_level(logging.ERROR):
        assert Retention(Policy(save_top_k=0, drop_optimizer=True)).apply(tmp_path) == []
    assert "nothing older is removed" in caplog.text
    assert steps(tmp_path) == [1, 2, 3]
    assert verify(tmp_path / "step_0000002") == []


def test_a_damaged_manifest_is_left_for_its_owner_to_look_at(tmp_path):
    run(tmp_path, Policy(save_top_k=-1), 1, 2)
    (tmp_path / "step_0000001/manifest.json").write_text("{")
    assert run(tmp_path, Policy(save_top_k=0), 3, first=3) == [1, 3]


def test_failing_to_tidy_up_does_not_fail_the_save(tmp_path, monkeypatch, caplog):
    run(tmp_path, Policy(save_top_k=0), 1)
    monkeypatch.setattr(
        retention, "_remove", lambda folder: (_ for _ in ()).throw(OSError(13, "Permission denied"))
    )
    with caplog.at_level(logging.WARNING):
        assert run(tmp_path, Policy(save_top_k=0), 1, first=2) == [1, 2]
    assert "could not be tidied up" in caplog.text
    monkeypatch.undo()
    assert run(tmp_path, Policy(save_top_k=0), 1, first=3) == [3]


def test_a_file_system_without_links_is_tidied_all_the_same(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(
        os, "symlink", lambda *_: (_ for _ in ()).throw(OSError(1, "Operation not permitted"))
    )
    with caplog.at_level(logging.WARNING):
        assert run(tmp_path, Policy(save_top_k=0, filename=TEMPLATE), 1, 2) == [2]
    assert "links to checkpoints could not be made" in caplog.text


def test_an_empty_folder_is_no_trouble(tmp_path):
    assert Retention(Policy(filename=TEMPLATE)).apply(tmp_path) == []


@pytest.mark.parametrize(
    "wrong", [{"mode": "best"}, {"save_top_k": -2}, {"keep_every_n_steps": 0}, {"filename": "a/{step}"}]
)
def test_a_policy_that_means_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match=r".+"):
        Policy(**wrong)


def test_applying_twice_changes_nothing(tmp_path):
    run(tmp_path, Policy(save_top_k=2, filename=TEMPLATE, drop_optimizer=True), 3, 1, 2, 5)
    before = snapshot(tmp_path)
    assert Retention(Policy(save_top_k=2, filename=TEMPLATE, drop_optimizer=True)).apply(tmp_path) == []
    assert snapshot(tmp_path) == before


@example([None, 1.0], 2, None, "min")
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    losses=some.lists(some.sampled_from([1.0, 2.0, 3.0, 3.0000001, None]), min_size=1, max_size=7),
    top=some.integers(-1, 3),
    every=some.sampled_from([None, 2, 3]),
    mode=some.sampled_from(["min", "max"]),
)
def test_what_stays_is_what_a_plain_count_says(tmp_path_factory, losses, top, every, mode):
    root = tmp_path_factory.mktemp("run")
    left = run(root, Policy(save_top_k=top, mode=mode, keep_every_n_steps=every, filename=TEMPLATE), *losses)
    present: list[int] = []
    for step in range(1, len(losses) + 1):
        present.append(step)
        scored = [s for s in present if losses[s - 1] is not None]
        scored.sort(key=lambda s: losses[s - 1] if mode == "min" else -losses[s - 1])  # stable: older first
        rest = [s for s in reversed(present) if losses[s - 1] is None]
        best = present if top == -1 else (scored + rest)[:top]
        present = [s for s in present if s == step or s in best or (every and s % every == 0)]
    assert left == present
    assert all(os.path.exists(root / name) for name in links(root))


def test_latest_names_the_new_one_before_any_older_one_goes(tmp_path, monkeypatch):
    seen = []
    real = Retention.apply
    monkeypatch.setattr(
        Retention,
        "apply",
        lambda self, root: (seen.append((root / "latest").read_text()), real(self, root))[1],
    )
    run(tmp_path, Policy(save_top_k=0), 1, 2)
    assert seen == ["step_0000001\n", "step_0000002\n"]
