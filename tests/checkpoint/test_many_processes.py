"""Saving and loading with many processes: together or not at all, and nobody holds more than his part."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from megalith.checkpoint.layout import newest_verified
from megalith.checkpoint.manifest import MANIFEST, _own_digest, read_manifest, verify
from megalith.checkpoint.native import Checkpointer, load, read_tensors
from megalith.checkpoint.summary import summarise
from megalith.cli.checkpoint import app
from megalith.errors import CheckpointError
from megalith.topology.topology import Topology
from tests.checkpoint import ranks

both = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


@pytest.fixture(scope="module")
def saved(rank_pool, tmp_path_factory):
    """A step folder of four processes, to look at."""
    root = tmp_path_factory.mktemp("saved")
    assert all(rank_pool.run(ranks.save_steps, 4, str(root), [1], False))
    return root / "step_0000001"


@pytest.fixture
def copy(saved, tmp_path):
    """One to damage."""
    return Path(shutil.copytree(saved, tmp_path / saved.name))


@both
def test_saves_hold_the_numbers_of_their_own_step(rank_pool, tmp_path, asynchronous):
    assert rank_pool.run(ranks.save_steps, 4, str(tmp_path), [1, 2, 3], asynchronous) == [True] * 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest"] + [f"step_000000{n}" for n in (1, 2, 3)]
    for step in (1, 2, 3):
        assert contents(tmp_path / f"step_000000{step}") == list_of(ranks.whole_tensors(step))
    assert newest_verified(tmp_path) == (tmp_path / "step_0000003", [])


def contents(folder: Path) -> dict[str, list]:
    every = [t for kind in ("model.", "optim.") for t in read_tensors(folder, kind)]
    return {t.name: t.read().tolist() for t in every}


def list_of(tensors: dict[str, torch.Tensor]) -> dict[str, list]:
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def test_what_lies_in_the_files(saved):
    """Every slice once, named by its place; the files are ordinary safetensors; the manifest knows where all is."""
    manifest = read_manifest(saved)
    shards = sorted(p.name for p in saved.glob("*.safetensors"))
    assert shards == [
        f"{kind}-0000{n}-of-00004.safetensors" for kind in ("model", "optim") for n in (1, 2, 3, 4)
    ]
    assert {k: len(t.slices) for k, t in manifest.tensors.items()} == {
        "model.table": 2, "model.up.weight": 2, "model.down.weight": 4, "model.norm": 1, "model.scale": 1,
        "model.empty": 1, "model.alone": 1, "model.few": 1, "optim.table.exp_avg": 2, "optim.down.exp_avg": 4,
    }  # fmt: skip
    assert manifest.tensors["model.alone"].files == {"model-00004-of-00004.safetensors"}
    entries = {name: tensor for shard in shards for name, tensor in load_file(saved / shard).items()}
    truth = ranks.whole_tensors(1)
    assert torch.equal(entries["model.down.weight[3:5,4:8]"], truth["model.down.weight"][3:5, 4:8])
    assert torch.equal(entries["model.table[6:11,0:6]"], truth["model.table"][6:])
    assert sum(t.numel() for t in entries.values()) == sum(t.numel() for t in truth.values())


def test_one_process_reads_it(saved):
    truth = ranks.whole_tensors(1)
    live = {name: torch.zeros_like(tensor) for name, tensor in truth.items()}
    assert load(saved, live)["seed"] == 1
    assert list_of(live) == list_of(truth)
    weights = {name: torch.zeros_like(t) for name, t in truth.items() if name.startswith("model.")}
    load(saved, weights)
    assert list_of(weights) == {n: t for n, t in list_of(truth).items() if n in weights}
    (table,) = read_tensors(saved, "model.table")
    assert torch.equal(table.rows(5, 8), truth["model.table"][5:8])


def test_many_processes_read_what_one_wrote(rank_pool, tmp_path):
    one = Checkpointer(tmp_path, Topology.single())
    folder = one.save(1, ranks.whole_tensors(1), {}, config_yaml="")
    assert rank_pool.run(ranks.load_here, 4, str(folder)) == [("", True)] * 4


def test_inspect_and_verify_show_it(saved):
    summary = summarise(saved)
    assert (summary["tensors"]["model"]["slices"], summary["tensors"]["model"]["files"]) == (13, 4)
    shown = CliRunner().invoke(app, ["inspect", str(saved)]).stdout
    assert "8 tensors, 161 numbers" in shown.replace("\n", " ")
    assert "model-*-of-00004.safetensors  4 files" in shown
    assert CliRunner().invoke(app, ["verify", str(saved)]).stdout == f"{saved}: whole\n"


# Damage -------------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def signed(folder: Path, change) -> None:
    body = json.loads((folder / MANIFEST).read_text())
    body.pop("sha256")
    change(body)
    (folder / MANIFEST).write_text(json.dumps(body | {"sha256": _own_digest(body)}))


def without(name: str, place: str):
    return lambda folder: signed(folder, lambda body: body["tensors"][name]["slices"].pop(place))


def moved(name: str, place: str, to: str):
    def change(body) -> None:
        slices = body["tensors"][name]["slices"]
        slices[to] = slices.pop(place)

    return lambda folder: signed(folder, change)


DAMAGES = {
    "flipped bit": (lambda f: flip(f / "optim-00003-of-00004.safetensors"), "content changed"),
    "missing shard": (lambda f: (f / "model-00002-of-00004.safetensors").unlink(), "missing"),
    "stray shard": (lambda f: (f / "model-00005-of-00004.safetensors").touch(), "nothing else may lie"),
    "truncated shard": (lambda f: os.truncate(f / "model-00001-of-00004.safetensors", 90), "90 bytes"),
    "a hole in the manifest": (without("model.table", "0:6,0:6"), "its slices hold 30 of 66"),
    "a slice elsewhere": (moved("model.up.weight", "4:8,0:5", "3:7,0:5"), "is there twice"),
    "a slice outside": (moved("model.up.weight", "4:8,0:5", "5:9,0:5"), "is no slice of"),
    "slices exchanged": (
        lambda f: signed(f, lambda b: b["tensors"].__setitem__("model.up.weight", {
            **b["tensors"]["model.up.weight"], "slices": dict(zip(
                b["tensors"]["model.up.weight"]["slices"],
                reversed(b["tensors"]["model.up.weight"]["slices"].values()), strict=True)),
        })),
        "not as the manifest says",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_by_all_alike_and_nothing_is_touched(rank_pool, copy, name):
    damage, words = DAMAGES[name]
    damage(copy)
    problems = verify(copy)
    assert any(words in problem for problem in problems)
    answers = rank_pool.run(ranks.load_here, 4, str(copy))
    assert len(set(answers)) == 1, "the same words on every process"
    assert words in answers[0][0]
    assert "CheckpointError" in answers[0][0]
    with pytest.raises(CheckpointError, match=r"damaged|malformed"):
        load(copy, {name: torch.zeros_like(t) for name, t in ranks.whole_tensors(1).items()})


def test_differences_of_any_process_are_listed_by_all(rank_pool, saved):
    answers = rank_pool.run(ranks.load_a_stranger, 4, str(saved))
    assert len(set(answers)) == 1
    lines = [line.strip() for line in answers[0].splitlines()]
    assert lines[1:4] == [
        "model.alone: in the checkpoint only",
        "model.new: not in the checkpoint",
        "model.norm: float64 [6] in the checkpoint, float64 [7] here",
    ]


# Faults -------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("fault", "guilty"),
    [("disk full", 0), ("disk full", 2), ("input/output error", 3), ("a bug", 1), ("interrupt", 2)],
)
def test_an_error_on_one_process_fails_the_save_on_all(rank_pool, tmp_path, fault, guilty, asynchronous):
    results = rank_pool.run(ranks.save_with_a_fault, 4, str(tmp_path), fault, guilty, asynchronous)
    said = [error for error, _, _ in results]
    if fault in ("a bug", "interrupt"):
        name, text = ("ZeroDivisionError", "by zero") if fault == "a bug" else ("KeyboardInterrupt", "")
        others = {f"RuntimeError: process {guilty}: {name}: {text}"}
        assert said.pop(guilty) == f"{name}: {text}"
        assert set(said) == others
    else:
        assert len(set(said)) == 1
        assert "saving step 2 failed" in said[0]
        assert ranks.FAULTS[fault][1].strerror in said[0]
    assert all(left == ["latest", "step_0000001"] for _, left, _ in results), "nothing of step 2 is left"
    assert all(fine for _, _, fine in results), "the next save works"
    assert contents(tmp_path / "step_0000001") == list_of(ranks.whole_tensors(1))


def test_saves_that_may_not_begin_are_refused_by_all(rank_pool, tmp_path):
    results = rank_pool.run(ranks.refused_arguments, 4, str(tmp_path))
    for number, words in enumerate(
        ["is a tuple", "starts with its kind", "cannot be saved: its slices hold", "tokenizer"]
    ):
        assert all(words in said[number] for said in results), results[0][number]
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_not_shared_are_named(rank_pool, tmp_path):
    answers = rank_pool.run(ranks.save_into_folders_of_their_own, 4, str(tmp_path))
    assert len(set(answers)) == 1
    assert "No such file or directory" in answers[0]
    assert "which all processes must share" in answers[0]


def test_one_decides_and_all_fail_alike(rank_pool):
    for answer in rank_pool.run(ranks.decide, 4, ""):
        assert answer[:2] == [5, [0, 1, 2, 3]]
        assert answer[2] == "CheckpointError: rank 0: no\n  fix: yes"
        assert answer[3] == "CheckpointError: rank 2: no\n  fix: yes"


def test_retention_drops_the_optimizer_from_sharded_checkpoints(rank_pool, tmp_path):
    policy = {"monitor": None, "save_top_k": 2, "drop_optimizer": True, "filename": "run--{step}"}
    assert all(rank_pool.run(ranks.save_steps, 4, str(tmp_path), [1, 2, 3], True, policy))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "latest", "run--step=2", "run--step=3", "run--step=3-last", "step_0000002", "step_0000003",
    ]  # fmt: skip
    assert not list((tmp_path / "step_0000002").glob("optim-*"))
    assert len(list((tmp_path / "step_0000003").glob("optim-*"))) == 4
    assert verify(tmp_path / "step_0000002") == []


# Memory -------------------------------------------------------------------------------------------------------------


def test_no_process_holds_or_reads_the_whole_model(rank_pool, tmp_path):
    """192 MB in one file of the model's and one of the optimizer's, onto four ranks: 48 MB each."""
    rows = 4096
    folder = Checkpointer(tmp_path / "one", Topology.single()).save(
        1, ranks.large(rows, None), {}, config_yaml=""
    )
    for found in rank_pool.run(ranks.memory_of_load_and_save, 4, str(folder), str(tmp_path / "many"), rows):
        assert found["right"]
        assert found["holds"] == 48
        assert found["load"] < 24, "buffers only"
        assert found["save"] < 24
        assert found["read"] < 2.6, "its rows alone, and its columns with their short rows"
    live = ranks.large(rows, None)
    for tensor in live.values():
        tensor.fill_(-1)
    load(tmp_path / "many" / "step_0000001", live)
    assert all(
        torch.equal(tensor, ranks.large(8, None)[n][:1].expand(rows, 1024)) for n, tensor in live.items()
    )
