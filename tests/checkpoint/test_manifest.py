"""The manifest: every bit of a step folder counts, and a hostile one leads nowhere."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess

import pytest

from megalith.checkpoint.manifest import (
    MANIFEST,
    ManifestError,
    _own_digest,
    quick_problems,
    read_manifest,
    verify,
)

from .helpers import save


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "checkpoints", 10, val_loss=3.25)


def edit(folder, change):
    """Applies `change` to the manifest and signs it again, as an attacker would."""
    body = json.loads((folder / MANIFEST).read_bytes())
    body.pop("sha256")
    change(body)
    (folder / MANIFEST).write_text(json.dumps(body | {"sha256": _own_digest(body)}))


def test_a_whole_folder_has_no_problems_and_the_manifest_says_what_is_in_it(folder):
    assert verify(folder) == []
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.sequence, manifest.metrics["val_loss"]) == (10, 1, 3.25)
    assert set(manifest.files) == {"model.safetensors", "optim.safetensors", "config.yaml", "state.json"}
    assert manifest.tensors["model.head.weight"].shape == (7, 4)
    assert manifest.tensors["optim.w.exp_avg"].files == {"optim.safetensors"}


def test_hashes_are_plain_sha256(folder):
    names = read_manifest(folder).files
    out = subprocess.run(["sha256sum", *names], cwd=folder, capture_output=True, text=True, check=True).stdout
    said = {line.split()[1]: line.split()[0] for line in out.splitlines()}
    assert said == {name: record.sha256 for name, record in names.items()}


@pytest.mark.parametrize("name", ["model.safetensors", "optim.safetensors", "config.yaml", "state.json"])
def test_each_flipped_bit_is_found(folder, name):
    content = (folder / name).read_bytes()
    for position in range(0, len(content), max(1, len(content) // 40)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        (folder / name).write_bytes(flipped)
        problems = verify(folder)
        assert [p.partition(":")[0] for p in problems] == [name]
    (folder / name).write_bytes(content)
    assert verify(folder) == []


def test_each_changed_byte_of_the_manifest_is_found(folder):
    content = (folder / MANIFEST).read_bytes()
    meaning = json.loads(content)
    found = 0
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1
        with open(folder / MANIFEST, "r+b") as file:
            file.write(changed)
        try:
            read_manifest(folder)
        except ManifestError:
            found += 1
        else:
            assert json.loads(changed) == meaning, (
                f"byte {position}: {content[position - 20 : position + 20]!r}"
            )
    assert found > 0.6 * len(content), "the rest is white space"


@pytest.mark.parametrize("name", ["model.safetensors", "optim.safetensors", "config.yaml", "state.json"])
def test_truncated_and_missing_files_are_found(folder, name):
    content = (folder / name).read_bytes()
    for length in (0, 1, len(content) - 1):
        (folder / name).write_bytes(content[:length])
        assert verify(folder) == [f"{name}: {length} bytes, the manifest says {len(content)}"]
    (folder / name).unlink()
    assert verify(folder) == [f"{name}: missing"]
    assert quick_problems(folder)[1] == [f"{name}: missing"]


@pytest.mark.parametrize("name", ["stray.safetensors", "tokenizer/x.json", ".hidden", "a/b/c"])
def test_extra_files_are_found(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("x")
    assert verify(folder) == [f"{name}: not in the manifest; nothing else may lie in this folder"]


def test_pipes_folders_and_loops_in_place_of_a_file_are_found_without_waiting(folder):
    path = folder / "optim.safetensors"
    for make in (
        os.mkfifo,
        lambda p: p.symlink_to(p.name),
        lambda p: p.symlink_to(folder),
        lambda p: p.mkdir(),
    ):
        path.unlink()
        make(path)
        problems = verify(folder)
        assert len(problems) == 1, problems
        assert problems[0].startswith("optim.safetensors: ")
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
            path.touch()


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "..", ".", "", "a//b", "a/", "./a", "a\\b", MANIFEST, "a\0b"]
)
@pytest.mark.parametrize("where", ["files", "dropped"])
def test_a_manifest_that_names_a_place_outside_is_refused(folder, name, where):
    def change(body):
        if where == "files":
            body["files"][name] = {"bytes": 1, "sha256": "0"}
        else:
            body["dropped"] = [name]

    edit(folder, change)
    with pytest.raises(ManifestError, match="not a place inside the folder"):
        read_manifest(folder)
    assert len(verify(folder)) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.update(step="ten"),
        lambda b: b.pop("step"),
        lambda b: b.update(files=[1]),
        lambda b: b.update(files={"state.json": 3}),
        lambda b: b["files"].pop("state.json"),
        lambda b: b["files"].pop("config.yaml"),
        lambda b: b["files"].pop("model.safetensors"),
        lambda b: b["tensors"]["model.scale"].update(dtype="F31"),
        lambda b: b["tensors"]["model.scale"].update(dtype=[1]),
        lambda b: b["tensors"]["model.scale"].update(shape=3),
        lambda b: b.update(dropped=3),
        lambda b: b.update(metrics=None),
    ],
)
def test_a_manifest_of_another_shape_is_refused(folder, change):
    edit(folder, change)
    with pytest.raises(ManifestError):
        read_manifest(folder)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "{", '"x"', "[" * 50_000, "\xff"])
def test_what_is_not_a_manifest_is_refused(folder, text):
    (folder / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(ManifestError):
        read_manifest(folder)


def test_a_newer_format_is_named(folder):
    edit(folder, lambda body: body.update(format_version=2))
    with pytest.raises(ManifestError, match="format version 2; this Megalith reads 1"):
        read_manifest(folder)


def test_files_that_disagree_with_the_manifest_are_found_though_their_hashes_agree(folder):
    edit(folder, lambda body: body["tensors"]["model.scale"].update(shape=[3]))
    assert verify(folder) == ["model.safetensors: model.scale not as the manifest says (1 tensors)"]
    edit(folder, lambda body: body["tensors"]["model.scale"].update(shape=[]))
    edit(folder, lambda body: body.update(step=11))
    assert verify(folder) == ["state.json: step 10, the manifest says 11"]

    (folder / "state.json").write_text("[1, 2]")
    digest = hashlib.sha256(b"[1, 2]").hexdigest()
    edit(folder, lambda body: body["files"].update({"state.json": {"bytes": 6, "sha256": digest}}))
    assert verify(folder) == ["state.json: not the state of a checkpoint"]


def test_metrics_are_exact_and_may_be_infinite(tmp_path):
    value = 3.0000000000000004
    metrics = read_manifest(save(tmp_path, 1, a=value, b=math.inf, c=math.nan, d=-math.inf)).metrics
    assert metrics["a"] == value
    assert metrics["b"] == math.inf
    assert math.isnan(metrics["c"])
    assert metrics["d"] == -math.inf
    assert "Infinity" not in (tmp_path / "step_0000001" / MANIFEST).read_text()


def test_dropped_files_are_neither_missed_nor_extra(folder):
    def change(body):
        body["files"].pop("optim.safetensors")
        body["tensors"] = {k: v for k, v in body["tensors"].items() if v["file"] != "optim.safetensors"}
        body["dropped"] = ["optim.safetensors"]

    edit(folder, change)
    assert verify(folder) == []
    (folder / "optim.safetensors").unlink()
    assert verify(folder) == []


def test_verifying_some_files_still_checks_the_set_and_sizes_of_all(folder):
    (folder / "optim.safetensors").write_bytes(bytes((folder / "optim.safetensors").stat().st_size))
    assert verify(folder, only=["model.safetensors"]) == []
    assert len(verify(folder)) == 1
    (folder / "optim.safetensors").unlink()
    assert verify(folder, only=["model.safetensors"]) == ["optim.safetensors: missing"]


def test_progress_counts_every_byte(folder):
    counts = []
    verify(folder, progress=counts.append)
    assert sum(counts) == sum(record.size for record in read_manifest(folder).files.values())
