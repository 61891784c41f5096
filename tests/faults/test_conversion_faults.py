"""Conversions that are killed, stopped, or run out of disk: nothing of their output is left, or the next one removes it.

And mutated sources: a conversion ends well, or with one error and nothing written.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalith.checkpoint.convert.certificate import Failed
from megalith.checkpoint.convert.convert import Plan, convert
from megalith.checkpoint.convert.to_megatron import Sizes
from megalith.errors import MegalithError
from megalith.models.config import ModelConfig
from tests.checkpoint.foreign_files import GPT2_LIKE, hugging_face, megatron, random_model
from tests.faults.pickle_corpus import CANARY

MUTATIONS = int(os.environ.get("MEGALITH_FUZZ", "300"))
ROOT = Path(__file__).parents[2]
SLOWLY = """
import sys, time
from megalith.checkpoint.convert import output
from megalith.checkpoint.convert.convert import Plan, convert
from megalith.checkpoint.convert.to_megatron import Sizes
write = output.write_all
def slowly(descriptor, chunk):
    write(descriptor, chunk)
    print("writing", flush=True)
    time.sleep(2)
output.write_all = slowly
convert(sys.argv[1], sys.argv[2], Plan("megatron", Sizes(2)))
"""


@pytest.fixture(scope="module")
def model():
    return random_model(ModelConfig(**GPT2_LIKE))


@pytest.fixture(scope="module")
def source(tmp_path_factory, model):
    return hugging_face(tmp_path_factory.mktemp("source"), model)


def in_the_middle(source: Path, target: Path) -> subprocess.Popen:
    """A process that has written the first block of a conversion and will take long over the next."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, str(source), str(target)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    return process


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_killed(tmp_path, source):
    """What is left lies under another name, and the next conversion removes it; while it lives, another one is refused."""
    process = in_the_middle(source, tmp_path / "out")
    try:
        with pytest.raises(MegalithError, match=f"process {process.pid} on .* is writing it"):
            convert(source, tmp_path / "out", Plan("native"))
    finally:
        process.kill()
        process.wait()
    assert names(tmp_path) == [".out.owner", "out.partial"]
    convert(source, tmp_path / "out", Plan("native"))
    assert names(tmp_path) == ["out"]


def test_stopped_by_ctrl_c(tmp_path, source):
    process = in_the_middle(source, tmp_path / "out")
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) != 0
    assert names(tmp_path) == []


@pytest.mark.parametrize("plan", [Plan("native"), Plan("huggingface"), Plan("megatron", Sizes(2))], ids=str)
def test_no_room_for_a_file(tmp_path, source, plan):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        with pytest.raises(
            MegalithError, match=r"the conversion failed \(File too large\); nothing of it is left"
        ):
            convert(source, tmp_path / "out", plan)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a file system")
def test_a_full_disk(tmp_path, source, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip("may not mount")
    try:
        with pytest.raises(MegalithError, match=r"the conversion needs .* are free"):
            convert(source, disk / "out", Plan("native"))
        monkeypatch.setattr("megalith.checkpoint.convert.target.free_bytes", lambda folder: 1 << 40)
        with pytest.raises(MegalithError, match="No space left on device"):
            convert(source, disk / "out", Plan("native"))
        assert names(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_mutated_sources(tmp_path, model, monkeypatch):
    """`MEGALITH_FUZZ` of them: 300 here, 10,000 in `make fuzz`. Never a traceback, an execution, or a partial output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megalith.checkpoint.convert.compare.ask_transformers", lambda *_: None)
    small = random_model(ModelConfig(**GPT2_LIKE | {"num_layers": 1}))
    roots = [hugging_face(tmp_path / "hf", small), megatron(tmp_path / "megatron", small, sizes=(2, 1))]
    roots.append(convert(roots[0], tmp_path / "native", Plan("native")).folder)
    files = [
        (root, path)
        for root in roots
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "conversion.json"
    ]
    draw, outcomes = random.Random(0), {"well": 0, "refused": 0, "failed": 0}
    before = names(tmp_path)
    for number in range(MUTATIONS):
        root, path = draw.choice(files)
        whole = path.read_bytes()
        path.write_bytes(mutated(whole, draw))
        plan = draw.choice([Plan("native"), Plan("huggingface"), Plan("megatron", Sizes(2))])
        try:
            convert(root, tmp_path / "out", plan)
        except MegalithError:
            outcomes["refused"] += 1
        except Failed:
            outcomes["failed"] += 1
        except Exception as error:
            raise AssertionError(f"mutation {number} of {path}: {error!r}") from error
        else:
            outcomes["well"] += 1
            json.loads((tmp_path / "out/conversion.json").read_text())
            remove(tmp_path / "out")
        path.write_bytes(whole)
        assert names(tmp_path) == before
    print(outcomes)
    assert min(outcomes["well"], outcomes["refused"]) > MUTATIONS // 20
    assert not list(tmp_path.rglob(CANARY))


def mutated(whole: bytes, draw: random.Random) -> bytes:
    """Bits turned over in the head or anywhere, or the end cut off."""
    broken = bytearray(whole)
    if draw.random() < 0.2:
        return bytes(broken[: draw.randrange(len(broken))])
    reach = draw.choice([len(broken), min(len(broken), 4000)])
    for _ in range(draw.choice((1, 1, 2, 8))):
        broken[draw.randrange(reach)] ^= 1 << draw.randrange(8)
    return bytes(broken)


def remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
