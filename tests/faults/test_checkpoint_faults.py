"""Whatever happens to a save or to its files, a whole checkpoint is found, or the load says no and touches nothing."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from megalith.checkpoint.layout import newest_verified
from megalith.checkpoint.manifest import MANIFEST, _own_digest
from megalith.checkpoint.native import Checkpointer, load
from megalith.errors import CheckpointError
from megalith.topology.topology import Topology

modes = pytest.mark.parametrize("mode", ["sync", "async"])


@pytest.fixture
def memory_folder(tmp_path):
    """A folder that fsync costs nothing in, where there is one: what kill −9 leaves behind does not depend on the disk."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared, prefix="megalith-crashes-") as folder:
        yield Path(folder)


def crashes(kind: str, mode: str, folder: Path) -> dict[str, object]:
    script = Path(__file__).with_name("checkpoint_crashes.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), kind, mode, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@modes
def test_killed_at_every_change_of_the_disk(mode, memory_folder):
    result = crashes("every", mode, memory_folder)
    assert result["crashes"] > 60
    assert set(result["found"]) == {"2", "3", "1000003"}, "crashes before, between and after were among them"


@modes
def test_killed_at_random_times_again_and_again(mode, memory_folder):
    result = crashes("random", mode, memory_folder)
    assert result["steps"] > 10
    assert result["lost"] == 0


# Damaged files ------------------------------------------------------------------------------------------------------


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"model.w": torch.full((50, 3), value), "optim.w.exp_avg": torch.full((50, 3), -value)}


def saver(root: Path) -> Checkpointer:
    return Checkpointer(root, Topology.single())


@pytest.fixture
def root(tmp_path):
    for step in (1, 2):
        saver(tmp_path).save(step, tensors(step), {"consumed_samples": step}, config_yaml="a: 1\n")
    return tmp_path


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 16
    path.write_bytes(content)


def signed(folder: Path, **changes: object) -> None:
    body = json.loads((folder / MANIFEST).read_text()) | changes
    body.pop("sha256")
    (folder / MANIFEST).write_text(json.dumps(body | {"sha256": _own_digest(body)}))


DAMAGES = {
    "truncated weights": lambda f: os.truncate(f / "model.safetensors", 100),
    "empty weights": lambda f: os.truncate(f / "model.safetensors", 0),
    "longer weights": lambda f: os.truncate(f / "model.safetensors", 10_000),
    "flipped bit in a weight": lambda f: flip(f / "model.safetensors", -1),
    "flipped bit in a header": lambda f: flip(f / "optim.safetensors", 20),
    "huge header": lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x7f" + bytes(700)),
    "missing weights": lambda f: (f / "model.safetensors").unlink(),
    "missing optimizer": lambda f: (f / "optim.safetensors").unlink(),
    "missing state": lambda f: (f / "state.json").unlink(),
    "missing manifest": lambda f: (f / MANIFEST).unlink(),
    "extra shard": lambda f: (f / "model-2.safetensors").write_bytes(b""),
    "extra folder with a file": lambda f: ((f / "x").mkdir(), (f / "x/y").touch()),
    "state of other numbers": lambda f: (f / "state.json").write_text('{"step": 2}'),
    "state not json": lambda f: (f / "state.json").write_text("{"),
    "config edited": lambda f: (f / "config.yaml").write_text("a: 2\n"),
    "manifest not json": lambda f: (f / MANIFEST).write_text("{'a': 1}"),
    "manifest empty": lambda f: (f / MANIFEST).write_text(""),
    "manifest edited": lambda f: (f / MANIFEST).write_text(
        (f / MANIFEST).read_text().replace('"step": 2', '"step": 3')
    ),
    "manifest of the other step": lambda f: (f / MANIFEST).write_bytes(
        (f.parent / "step_0000001" / MANIFEST).read_bytes()
    ),
    "manifest leading outside": lambda f: signed(f, files={"../../x": {"bytes": 1, "sha256": "0" * 64}}),
    "manifest of a later format": lambda f: signed(f, format_version=7),
    "weights of the other step": lambda f: (f / "model.safetensors").write_bytes(
        (f.parent / "step_0000001/model.safetensors").read_bytes()
    ),
    "a loop of links": lambda f: (
        (f / "model.safetensors").unlink(),
        (f / "model.safetensors").symlink_to("model.safetensors"),
    ),
    "a pipe": lambda f: ((f / "model.safetensors").unlink(), os.mkfifo(f / "model.safetensors")),
    "a folder in place of a file": lambda f: ((f / "state.json").unlink(), (f / "state.json").mkdir()),
    "a link into itself": lambda f: (f / "again").symlink_to("."),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_and_passed_over(root, damage):
    folder = root / "step_0000002"
    DAMAGES[damage](folder)
    live = tensors(9)
    with pytest.raises(CheckpointError) as caught:
        load(folder, live)
    assert str(folder) in str(caught.value)
    assert all(torch.equal(live[name], tensor) for name, tensor in tensors(9).items()), "nothing was touched"
    found, notices = newest_verified(root)
    assert found == root / "step_0000001"
    assert str(folder) in notices[0]
    load(found, live)
    assert torch.equal(live["model.w"], tensors(1)["model.w"])


def test_a_damaged_step_can_be_saved_over(root):
    for damage in ("missing manifest", "extra folder with a file", "a link into itself"):
        DAMAGES[damage](root / "step_0000002")
    saver(root).save(2, tensors(2), {}, config_yaml="")
    assert newest_verified(root) == (root / "step_0000002", [])


# A full disk --------------------------------------------------------------------------------------------------------


def large(value: float) -> dict[str, torch.Tensor]:
    return {"model.w": torch.full((1 << 20,), value), "optim.w.exp_avg": torch.full((1 << 20,), value)}


def save_large(root: Path, asynchronous: bool) -> None:
    failing = Checkpointer(root, Topology.single(), asynchronous=asynchronous)
    failing.save(3, large(3), {}, config_yaml="")
    failing.wait()


def attempt(root: Path) -> None:
    """In a child: a save of 8 MB that must fail and leave the folder as it was, asynchronous or not."""
    before = sorted(p.name for p in root.iterdir())
    for asynchronous in (False, True):
        with pytest.raises(CheckpointError, match=r"saving step 3 failed") as caught:
            save_large(root, asynchronous)
        assert "untouched" in str(caught.value)
        assert sorted(p.name for p in root.iterdir()) == before
    assert (root / "latest").read_text() == "step_0000002\n"
    assert newest_verified(root) == (root / "step_0000002", [])


def in_child(work) -> None:
    """Runs `work` in a forked child, whose limits and mounts die with it."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_file_that_may_not_grow_further(root):
    """The kernel itself says no, in the middle of a write."""

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))
        attempt(root)

    in_child(work)


def test_a_disk_that_is_full(tmp_path):
    """A file system of 6 MB, in a mount namespace of the child's own."""
    probe = subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "none", str(tmp_path)], capture_output=True
    )
    if probe.returncode != 0:
        pytest.skip("mounting a small file system is not allowed here")
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "import faults.test_checkpoint_faults as t, megalith.checkpoint.native as n\n"
        "root = Path(sys.argv[2]) / 'c'\n"
        "for step in (1, 2): t.saver(root).save(step, t.tensors(step), {}, config_yaml='')\n"
        "try: t.saver(root).save(3, t.large(3), {}, config_yaml='')\n"
        "except t.CheckpointError as error: assert 'are free' in str(error), error\n"
        "n.free_bytes = lambda folder: 1 << 40  # as if another process had filled it meanwhile\n"
        "t.attempt(root)"
    )
    mounted = 'mount -t tmpfs -o size=6m none "$3" && exec "$0" -c "$1" "$2" "$3"'
    tests = str(Path(__file__).parents[1])
    command = ["unshare", "-m", "sh", "-c", mounted, sys.executable, code, tests, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# What must be on disk before what -----------------------------------------------------------------------------------


def test_everything_is_forced_to_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """A power cut is not a kill: the order of fsync and rename is what counts, so it is written down and read."""
    log: list[tuple[str, str]] = []
    real_fsync, real_rename, real_replace = os.fsync, os.rename, os.replace

    def fsync(descriptor):
        log.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", lambda a, b: (log.append(("rename", Path(b).name)), real_rename(a, b)))
    monkeypatch.setattr(
        os, "replace", lambda a, b: (log.append(("replace", Path(b).name)), real_replace(a, b))
    )
    (tmp_path / "tokenizer.json").write_text("{}")
    root = tmp_path / "checkpoints"
    saver(root).save(1, tensors(1), {}, config_yaml="", tokenizer=tmp_path / "tokenizer.json")
    published = log.index(("rename", "step_0000001"))
    written = {name for kind, name in log[:published] if kind == "fsync"}
    files = {p.name for p in (root / "step_0000001").rglob("*")}
    assert written == files | {"step_0000001.partial"}
    after = log[published + 1 :]
    assert after == [
        ("fsync", "checkpoints"),
        ("fsync", ".latest"),
        ("replace", "latest"),
        ("fsync", "checkpoints"),
    ]
