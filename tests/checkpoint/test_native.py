"""Saving and loading: what comes back is what was there at the moment of the save, or nothing was touched."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalith.checkpoint import layout
from megalith.checkpoint.native import (
    load,
    newest_verified,
    read_config,
    read_state,
    read_tensors,
    verify,
)
from megalith.errors import CheckpointError

from .helpers import blank, checkpointer, same, save, snapshot, state_of, tensors_of

both = pytest.mark.parametrize("asynchronous", [False, True])


@both
def test_a_round_trip_is_bit_equal(tmp_path, asynchronous):
    saver = checkpointer(tmp_path / "a" / "b", asynchronous=asynchronous)
    folder = saver.save(7, tensors_of(7), state_of(7), config_yaml="a: é\n", metrics={"val_loss": 2.5})
    saver.wait()
    assert folder == tmp_path / "a/b/step_0000007"
    assert (tmp_path / "a/b/latest").read_text() == "step_0000007\n"
    live = blank()
    assert load(folder, live) == {"format_version": 1, "step": 7} | state_of(7)
    assert same(live, tensors_of(7))
    assert read_config(folder) == "a: é\n"
    assert read_state(folder)["nested"] == {"list": [1, None, "é"]}
    assert sorted(p.name for p in (tmp_path / "a/b").iterdir()) == ["latest", "step_0000007"]


def test_other_libraries_open_the_files(tmp_path):
    folder = save(tmp_path, 7)
    theirs = load_file(folder / "model.safetensors") | load_file(folder / "optim.safetensors")
    assert same(theirs, tensors_of(7))


@both
def test_the_same_save_gives_the_same_bytes(tmp_path, asynchronous):
    for name in "ab":
        save(tmp_path / name, 7, saver=checkpointer(tmp_path / name, asynchronous=asynchronous))
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_an_asynchronous_save_holds_the_numbers_of_its_own_step(tmp_path, monkeypatch):
    """The tensors change while the writer is held back, and again while a second save waits for the first."""
    gate, real = threading.Event(), os.write

    def slow(descriptor, data):
        gate.wait(10)
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", slow)
    saver, live, state = checkpointer(tmp_path, asynchronous=True), tensors_of(1), state_of(1)
    saver.save(1, live, state, config_yaml="x")
    for name, tensor in tensors_of(2).items():
        live[name].copy_(tensor)
    state["nested"]["list"].append("later")
    second = threading.Thread(target=lambda: saver.save(2, live, state_of(2), config_yaml="x"))
    second.start()
    second.join(0.05)
    assert second.is_alive(), "a second save waits for the first"
    assert newest_verified(tmp_path) == (None, [])
    gate.set()
    second.join()
    saver.wait()
    for step in (1, 2):
        loaded = blank()
        assert load(tmp_path / layout.step_name(step), loaded) == {
            "format_version": 1,
            "step": step,
        } | state_of(step)
        assert same(loaded, tensors_of(step))


def test_host_buffers_are_used_again(tmp_path):
    saver = checkpointer(tmp_path, asynchronous=True)
    save(tmp_path, 1, saver=saver)
    places = {name: buffer.data_ptr() for name, buffer in saver._staging._buffers.items()}
    assert saver._staging.nbytes == sum(t.nbytes for t in tensors_of(1).values())
    save(tmp_path, 2, 3, saver=saver)
    assert places == {name: buffer.data_ptr() for name, buffer in saver._staging._buffers.items()}
    other = tensors_of(4) | {"model.scale": torch.ones(3)}
    other.pop("model.empty")
    saver.save(4, other, {}, config_yaml="")
    saver.wait()
    assert saver._staging._buffers.keys() == other.keys()
    loaded = {name: torch.zeros_like(tensor) for name, tensor in other.items()}
    load(tmp_path / "step_0000004", loaded)
    assert same(loaded, other)


@both
def test_an_error_is_raised_once_and_the_saver_goes_on(tmp_path, monkeypatch, asynchronous, caplog):
    save(tmp_path, 1)
    before = snapshot(tmp_path)
    saver = checkpointer(tmp_path, asynchronous=asynchronous)

    def full(descriptor, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(CheckpointError, match=r"step 2 failed .No space left"),
    ):
        save(tmp_path, 2, saver=saver)
    assert ("saving step 2 failed" in caplog.text) == asynchronous
    monkeypatch.undo()
    assert snapshot(tmp_path) == before
    saver.wait()
    save(tmp_path, 3, saver=saver)
    assert newest_verified(tmp_path) == (tmp_path / "step_0000003", [])


def test_the_next_save_raises_the_error_of_the_one_before(tmp_path, monkeypatch):
    saver = checkpointer(tmp_path, asynchronous=True)
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    saver.save(1, tensors_of(1), {}, config_yaml="")
    with pytest.raises(CheckpointError, match=r"step 1 failed .Input/output error"):
        saver.save(2, tensors_of(2), {}, config_yaml="")
    assert not list(tmp_path.glob("step*"))


def test_what_is_not_an_io_error_comes_through_and_leaves_nothing(tmp_path, monkeypatch):
    saver = checkpointer(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        saver.save(1, tensors_of(1), {}, config_yaml="")
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("megalith.checkpoint.native.free_bytes", lambda folder: 1_000_000)
    with pytest.raises(CheckpointError, match=r"step 5 needs .* 1\.0 MB are free") as caught:
        save(tmp_path / "c", 5)
    assert "save_top_k" in str(caught.value)
    assert list((tmp_path / "c").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be saved here"):
        save(tmp_path / "file" / "checkpoints", 1)


def test_leftovers_that_cannot_be_removed_are_a_user_error(tmp_path, monkeypatch):
    (tmp_path / "step_0000001.partial").mkdir()
    monkeypatch.setattr(
        layout, "remove_tree", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    with pytest.raises(CheckpointError, match=r"cannot be saved here .Permission denied"):
        checkpointer(tmp_path)


@pytest.mark.parametrize(
    ("state", "error", "why"),
    [
        ({"a": (1, 2)}, TypeError, r"state\['a'\] is a tuple"),
        ({"a": [{"b": torch.ones(1)}]}, TypeError, r"state\['a'\]\[0\]\['b'\] is a Tensor"),
        ({"a": {1: 2}}, TypeError, r"state\['a'\] has the key 1"),
        ({"step": 4}, ValueError, "the save is of 3"),
        ({"format_version": 9}, ValueError, "format_version"),
    ],
)
def test_a_state_that_would_not_come_back_is_refused_at_once(tmp_path, state, error, why):
    with pytest.raises(error, match=why):
        checkpointer(tmp_path, asynchronous=True).save(3, tensors_of(3), state, config_yaml="")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["weight", "model.", ".weight", "../x.weight", "a/b.c"])
def test_a_tensor_name_without_a_kind_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="starts with its kind"):
        checkpointer(tmp_path).save(3, {name: torch.ones(1)}, {}, config_yaml="")


def test_floats_of_the_state_come_back_exactly(tmp_path):
    values = [0.1 + 0.2, 1e-323, float("inf"), -0.0, 2**53 + 1, 10**30]
    saver = checkpointer(tmp_path)
    folder = saver.save(1, tensors_of(1), {"values": values}, config_yaml="")
    assert repr(read_state(folder)["values"]) == repr(values)


def test_the_tokenizer_is_copied_and_verified(tmp_path):
    source = tmp_path / "tokenizer"
    source.mkdir()
    for name in ("tokenizer.json", "megalith_tokenizer.json"):
        (source / name).write_text(f"{{{name}")
    saver = checkpointer(tmp_path / "c")
    folder = saver.save(1, tensors_of(1), {}, config_yaml="", tokenizer=source)
    assert (folder / "tokenizer/tokenizer.json").read_text() == "{tokenizer.json"
    assert verify(folder) == []
    (folder / "tokenizer/tokenizer.json").write_text("{tokenizer.jsom")
    assert len(verify(folder)) == 1
    one = saver.save(2, tensors_of(2), {}, config_yaml="", tokenizer=source / "tokenizer.json")
    assert [p.name for p in (one / "tokenizer").iterdir()] == ["tokenizer.json"]
    with pytest.raises(CheckpointError, match="tokenizer cannot be copied") as caught:
        saver.save(3, tensors_of(3), {}, config_yaml="", tokenizer=tmp_path / "absent")
    assert "absent" in str(caught.value)


def test_a_step_saved_again_replaces_the_old_one(tmp_path):
    folder = save(tmp_path, 5)
    saver = checkpointer(tmp_path)
    saver.save(5, tensors_of(55), {"again": True}, config_yaml="")
    live = blank()
    assert load(folder, live)["again"] is True
    assert same(live, tensors_of(55))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_0000005"]


def test_two_processes_are_kept_from_one_folder(tmp_path):
    code = "import sys, time; print('ready', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        save(tmp_path, 4)
        owner = layout.Owner(layout.Owner.me().host, other.pid, layout._start_time(other.pid))
        (tmp_path / "step_0000005.partial").mkdir()
        layout.owner_file(tmp_path, "step_0000005").write_text(json.dumps(owner.__dict__))
        saver = checkpointer(tmp_path)
        assert [f"process {other.pid}" in notice for notice in saver.notices] == [True]
        with pytest.raises(CheckpointError, match=f"process {other.pid} on .* is writing step_0000005"):
            save(tmp_path, 5, saver=saver)
        assert (tmp_path / "step_0000005.partial").is_dir(), "it is not ours to remove"
    finally:
        other.stdin.close()
        other.wait()
        other.stdout.close()
    assert save(tmp_path, 5).name == "step_0000005"


# Loading ------------------------------------------------------------------------------------------------------------


def test_every_difference_is_listed_and_nothing_is_touched(tmp_path):
    folder = save(tmp_path, 7)
    live = blank()
    live["model.scale"] = torch.ones((), dtype=torch.float32)
    live["model.blocks.0.norm.weight"] = torch.ones(5).bfloat16()
    live["model.new"] = torch.ones(1)
    del live["optim.w.exp_avg"]
    before = {name: tensor.clone() for name, tensor in live.items()}
    with pytest.raises(CheckpointError) as caught:
        load(folder, live)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[0].endswith("4 tensors do not fit this model; nothing was loaded")
    assert lines[1:5] == [
        "model.blocks.0.norm.weight: bfloat16 [4] in the checkpoint, bfloat16 [5] here",
        "model.new: not in the checkpoint",
        "model.scale: float64 [] in the checkpoint, float32 [] here",
        "optim.w.exp_avg: in the checkpoint only",
    ]
    assert same(live, before)


@pytest.mark.parametrize("verified", [False, True])
def test_damage_is_found_before_anything_is_touched(tmp_path, verified):
    folder = save(tmp_path, 7)
    path = folder / "optim.safetensors"
    content = bytearray(path.read_bytes())
    content[3 if verified else -1] ^= 4  # the header's length is checked even when the hash is taken on trust
    path.write_bytes(content)
    live = blank()
    with pytest.raises(CheckpointError, match=r"optim\.safetensors"):
        load(folder, live, verified=verified)
    assert same(live, blank())


def test_weights_alone(tmp_path):
    folder = save(tmp_path, 7)
    live = blank(optimizer=False)
    load(folder, live)
    assert same(live, tensors_of(7, optimizer=False))
    content = bytearray((folder / "optim.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "optim.safetensors").write_bytes(content)
    load(folder, blank(optimizer=False))
    with pytest.raises(CheckpointError, match="damaged"):
        load(folder, blank())


def test_a_checkpoint_without_optimizer_says_what_to_do(tmp_path):
    saver = checkpointer(tmp_path)
    folder = saver.save(1, tensors_of(1, optimizer=False), {}, config_yaml="")
    assert not (folder / "optim.safetensors").exists()
    with pytest.raises(CheckpointError, match=r"no optimizer state .*init_from"):
        load(folder, blank())
    load(folder, blank(optimizer=False))


def test_lazy_tensors(tmp_path):
    folder = save(tmp_path, 7)
    lazy = {tensor.name: tensor for tensor in read_tensors(folder)}
    assert list(lazy) == sorted(tensors_of(7, optimizer=False))
    assert same({name: tensor.read() for name, tensor in lazy.items()}, tensors_of(7, optimizer=False))
    assert [t.name for t in read_tensors(folder, "optim.")] == ["optim.w.exp_avg", "optim.w.exp_avg_sq"]
    assert [t.name for t in read_tensors(folder, "model.blocks.")] == ["model.blocks.0.norm.weight"]
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="too few"):
        list(read_tensors(folder))


def test_small_files_are_checked_when_read(tmp_path):
    folder = save(tmp_path, 7)
    (folder / "state.json").write_text('{"step": 7}')
    with pytest.raises(CheckpointError, match="damaged"):
        read_state(folder)
    (folder / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_config(folder)
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        read_config(tmp_path)
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        load(tmp_path / "nowhere", blank())


# The end of the process ---------------------------------------------------------------------------------------------


ENDINGS = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from checkpoint.helpers import checkpointer, state_of, tensors_of

real = os.write
def slow(descriptor, data):
    time.sleep(0.02)
    return real(descriptor, data)
os.write = slow

def begin(name):
    saver = checkpointer(Path(sys.argv[2]) / name, asynchronous=True)
    saver.save(1, tensors_of(1), state_of(1), config_yaml="")

children = {}
for name in ("falls off the end", "exits", "raises"):
    children[name] = os.fork()
    if children[name] == 0:
        break
else:
    codes = {name: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for name, pid in children.items()}
    assert codes == {"falls off the end": 0, "exits": 3, "raises": 1}, codes
    os._exit(0)
begin(name)
if name == "exits":
    sys.exit(3)
if name == "raises":
    raise ValueError("a bug elsewhere")
"""


def test_the_process_ends_after_the_save(tmp_path):
    tests = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", ENDINGS, tests, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for name in ("falls off the end", "exits", "raises"):
        live = blank()
        load(tmp_path / name / "step_0000001", live)
        assert same(live, tensors_of(1))
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["latest", "step_0000001"]
