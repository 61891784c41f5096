"""Files that would run something, or fill the memory, or lie about themselves: each is refused by name, and nothing runs."""

from __future__ import annotations

import io
import json
import pickle
import re
import resource
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from megalith.checkpoint.pickles.names import Verdict
from megalith.checkpoint.pickles.reader import open_pickle
from megalith.checkpoint.pickles.scan import scan
from megalith.cli.checkpoint import app
from megalith.errors import EXIT_USER_ERROR, CheckpointError

from .pickle_corpus import CANARY, HOSTILE, TOUCH, _calls, _text, content, kinds, program_of, zipped


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder that is the current one, so that a program that ran would leave its file there."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not list(tmp_path.rglob(CANARY))


def refusal(path: Path, raw: bytes) -> str:
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as found:
        open_pickle(path)
    assert found.value.exit_code == EXIT_USER_ERROR
    assert str(found.value).startswith(f"{path}: ")
    assert "\n  fix: " in str(found.value)
    return str(found.value)


def test_the_corpus_runs_when_it_is_let(folder):
    """Python's own unpickler does create the file: the tests below would see it."""
    pickle.loads({name: raw for name, raw, _ in HOSTILE}["stack global"])
    assert (folder / CANARY).exists()
    (folder / CANARY).unlink()


@pytest.mark.parametrize(("name", "raw", "named"), HOSTILE, ids=[name for name, _, _ in HOSTILE])
def test_nothing_runs_and_the_refusal_names_it(folder, name, raw, named):
    torch.save(content()["model"], "good.pt")
    _, storages = program_of(Path("good.pt"))
    old = io.BytesIO()
    for head in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(head, old, protocol=2)
    for number, file in enumerate((raw, zipped(raw, **storages), old.getvalue() + raw + pickle.dumps([]))):
        message = refusal(folder / f"hostile{number}.pt", file)
        assert (
            f"refused: loading it would have run {named}" in message or f" {named}" in message.splitlines()[0]
        )
        assert "megalith checkpoint scan" in message
        (found,) = scan(folder / f"hostile{number}.pt")
        assert found.verdict is Verdict.RUNS
        assert any(named in each for each, verdict in found.names.items() if verdict is Verdict.RUNS)


def test_the_scan_sees_what_follows_bytes_that_stop_the_machine(folder):
    raw = b"\x80\x02]r\xff\xff\xff\x7f0" + _calls("os", "system", TOUCH)[2:]
    refusal(folder / "x.pkl", raw)
    (found,) = scan(folder / "x.pkl")
    assert found.verdict is Verdict.RUNS
    assert "memo" in found.problem


def test_the_scan_looks_into_archives(folder):
    evil = zipped(_calls("os", "system", TOUCH))
    (folder / "evil.pt").write_bytes(evil)
    with zipfile.ZipFile("ngc.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write("evil.pt", "release/mp_rank_00/model_optim_rng.pt")
        archive.writestr("release/latest.txt", "release")
    for name, mode in (("plain.nemo", "w"), ("packed.nemo", "w:gz")):
        with tarfile.open(name, mode) as archive:
            archive.add("evil.pt", "./model_weights.ckpt")
    (folder / "twice.zip").write_bytes(zipped(b"\x80\x02N.", **{"data.pkl ": b""}))
    (folder / "many.distcp").write_bytes(zipped(b"\x80\x02N.") + evil + zipped(b"\x80\x02N."))
    (folder / "notes.txt").write_bytes(b"no pickle")
    (folder / "hidden.txt").write_bytes(evil)
    found = {each.file: each.verdict for each in scan(folder)}
    assert found == {
        "evil.pt": Verdict.RUNS, "hidden.txt": Verdict.RUNS, "many.distcp": Verdict.RUNS,
        "ngc.zip:release/mp_rank_00/model_optim_rng.pt": Verdict.RUNS,
        "plain.nemo:./model_weights.ckpt": Verdict.RUNS, "packed.nemo:./model_weights.ckpt": Verdict.RUNS,
        "twice.zip": Verdict.ALLOWED,
    }  # fmt: skip


def test_the_scan_of_good_files(folder):
    kinds(folder)
    found = {each.file: each for each in scan(folder)}
    assert set(found) == {
        "new.pt", "old.pt", "plain.pkl", "sharded/.metadata", "sharded/__0_0.distcp", "tarred.nemo:./model_weights.ckpt",
    }  # fmt: skip
    assert not any(each.problem for each in found.values())
    assert found["new.pt"].names["argparse.Namespace"] is Verdict.INERT
    assert found["new.pt"].names["torch.FloatStorage"] is Verdict.ALLOWED
    assert found["sharded/__0_0.distcp"].verdict is Verdict.ALLOWED
    assert {each.verdict for each in found.values()} == {Verdict.ALLOWED, Verdict.INERT}


def test_the_scan_as_a_user_runs_it(folder):
    runner = CliRunner()
    torch.save(content(), "good.pt")
    result = runner.invoke(app, ["scan", "good.pt"])
    assert result.exit_code == 0, result.output
    assert "argparse.Namespace" in result.output
    (folder / "evil.pt").write_bytes(_calls("os", "system\x1b[2J", TOUCH, stack=True))
    result = runner.invoke(app, ["scan", str(folder)])
    assert result.exit_code == 1
    assert "os.system" in result.output
    assert "\x1b" not in result.output
    result = runner.invoke(app, ["scan", str(folder), "--json"])
    assert result.exit_code == 1
    evil, good = json.loads(result.output)
    assert (evil["file"], evil["verdict"], evil["problem"]) == ("evil.pt", "would run code", "")
    assert good["names"]["torch.FloatStorage"] == "allowed"
    result = runner.invoke(app, ["scan", "nowhere"])
    assert isinstance(result.exception, CheckpointError)


MANY = 280_000
BOMBS = {
    "lists": (b"]" * MANY, "on the stack"),
    "dicts in a list": (b"](" + (b"}" * 100 + b"e(") * (MANY // 100) + b"e.", "more objects"),
    "marks": (b"(" * (MANY + 1), "on the stack"),
    "the same again": (b"]" + b"2" * MANY, "on the stack"),
    "memo": (b"]r\xff\xff\xff\x7f.", "in its memo"),
    "laughter": (b"(](K\x01eq\x00" + b"".join(b"](" + b"h%c" % n * 10 + b"eq%c" % (n + 1) for n in range(9)) + b"t.", "stands for"),
    "laughter in tuples": (b"(K\x01q\x00" + b"".join(b"(" + b"h%c" % n * 10 + b"tq%c" % (n + 1) for n in range(9)) + b"t.", "stands for"),
    "deep lists": (b"]" * 20_000 + b"a" * 19_999 + b".", "200 deep"),
    "deep tuples": (b")" + b"\x85" * 20_000 + b".", "200 deep"),
    "a deep key": (b"})" + b"\x85" * 20_000 + b"Ns.", "keys cannot be"),
    "a list in itself": (b"]q\x00h\x00a.", "holds itself"),
    "a dict in itself": (b"}q\x00K\x01h\x00s.", "holds itself"),
    "a list as a key": (b"}]Ns.", "keys cannot be"),
    "keys of one hash": (b"}(" + b"".join(b"\x8a\x09" + (n * (2**61 - 1)).to_bytes(9, "little") + b"N" for n in range(1, 60)) + b"u.", "bits"),
    "a long number": (b"\x8b\xff\xff\xff\x7f.", "whole number of 2147483647 bytes"),
    "a negative length": (b"\x8b\xff\xff\xff\xff.", "whole number of -1 bytes"),
    "many digits": (b"I" + b"9" * 100_000 + b"\n.", "whole number of 100000 digits"),
    "a long text": (b"\x8d" + b"\xff" * 7 + b"\x7f.", "a string of"),
    "long bytes": (b"\x8e\0\0\0\0\x10\0\0\0.", "a string of"),
    "bytes beyond the end": (b"B\xff\xff\xff\x0f.", "truncated"),
    "a line without end": (b"c" + b"a" * 2_000_000, "does not end"),
    "copies of a text": (b"(" + _text("a" * 500_000) + b"\x94c_codecs\nencode\n\x940" + b"h\x01h\x00X\x06\0\0\0latin1\x86R" * 100 + b"t.", "copies more"),
    "copies of a list": (b"]\x94(" + b"K\x01K\x02\x86" * 10_000 + b"e0(" + b"ccollections\nOrderedDict\nh\x00\x85R" * 200 + b"t.", "copies more"),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "words"), BOMBS.values(), ids=BOMBS.keys())
def test_what_would_fill_the_memory_or_never_end(folder, raw, words):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = folder / "bomb.pkl"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=words):
        open_pickle(path)
    scan(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def tensor(kind: bytes = b"ctorch\nFloatStorage\n", numel: int = 4, offset: int = 0, shape: bytes = b"K\x04\x85", stride: bytes = b"K\x01\x85", key: str = "0") -> bytes:  # fmt: skip
    storage = (
        b"(" + _text("storage") + kind + _text(key) + _text("cpu") + b"J" + struct.pack("<i", numel) + b"tQ"
    )
    place = b"J" + struct.pack("<i", offset) + shape + stride
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + place + b"\x89}tR."


LIES = {
    "beyond the end": (tensor(offset=1), "ends at byte 20"),
    "before the beginning": (tensor(offset=-1), "a tensor at -1"),
    "a longer shape": (tensor(shape=b"K\x05\x85"), "ends at byte 20"),
    "wider strides": (tensor(stride=b"K\x02\x85"), "ends at byte 28"),
    "negative strides": (tensor(stride=b"J\xff\xff\xff\xff\x85"), "something else than sizes"),
    "a huge shape": (tensor(shape=b"\x8a\x08" + b"\xff" * 7 + b"\x0f\x85", stride=b"K\x00\x85"), "repeats"),
    "an overflowing shape": (tensor(shape=b"(" + b"\x8a\x05\0\0\0\0\x01" * 4 + b"t", stride=b"(K\0K\0K\0K\0t"), r"a tensor \["),
    "more strides than dims": (tensor(stride=b"K\x01K\x01\x86"), "with strides"),
    "a shape of text": (tensor(shape=_text("ab")), "a shape of 'ab'"),
    "another dtype": (tensor(b"ctorch\nDoubleStorage\n"), "16 bytes where its pickle says 4 torch.float64"),
    "more elements": (tensor(numel=5), "16 bytes where"),
    "fewer elements": (tensor(numel=3, shape=b"K\x03\x85"), "16 bytes where"),
    "no such storage": (tensor(key="7"), "no member 'archive/data/7'"),
    "a path as a key": (tensor(key="../../data.pkl"), "no member"),
    "two dtypes at once": (b"\x80\x02(" + tensor()[2:-1] + tensor(b"ctorch\nIntStorage\n")[2:-1] + b"t.", "float32, and 4 torch.int32"),
    "no storage": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\x00))\x89}tR.", "no storage"),
    "an odd reference": (b"\x80\x02(K\x01K\x02tQ.", "refers to a tuple"),
    "a reference in text": (b"P12345\n.", "refers to '12345'"),
    "a storage of a class": (tensor(b"cargparse\nNamespace\n"), "a storage of a Name"),
    "a reference of itself": (b"\x80\x02]q\x00h\x00aQ.", "refers to a list"),
}  # fmt: skip


@pytest.mark.parametrize(("program", "words"), LIES.values(), ids=LIES.keys())
def test_tensors_that_lie(folder, program, words):
    assert re.search(words, refusal(folder / "x.pt", zipped(program, data__0=bytes(16))))


def test_the_program_of_those_lies_is_read_when_it_does_not_lie(folder):
    Path("x.pt").write_bytes(zipped(tensor(), data__0=struct.pack("<4f", 1, 2, 3, 4)))
    assert open_pickle(Path("x.pt")).content.read().tolist() == [1, 2, 3, 4]


def packed(*members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, inner in members:
            archive.writestr(name, inner)
    return buffer.getvalue()


GOOD = ("archive/data.pkl", b"\x80\x02N.")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_files_that_hide_something(folder):
    whole = packed(GOOD, ("archive/data/0", bytes(100)))
    assert open_pickle_of(folder, whole) is None
    entry = whole.index(b"PK\x01\x02")
    second = whole.index(b"PK\x01\x02", entry + 4)
    for raw, words in (
        (packed(GOOD, GOOD), "two members named"),
        (packed(GOOD, compression=zipfile.ZIP_DEFLATED), "compressed"),
        (packed(GOOD, ("../../etc/passwd", b"")), "leads out"),
        (packed(GOOD, ("/etc/passwd", b"")), "leads out"),
        (packed(GOOD, ("other/data.pkl", b"N.")), "not one of torch.save"),
        (packed(("data.pkl", b"N.")), "not one of torch.save"),
        (whole + b"more", "goes on after|without its end"),
        (b"MZ" + whole, "no instruction"),
        (whole[:second + 42] + whole[entry + 42 : entry + 46] + whole[second + 46 :], "at one place"),
        (whole[: entry + 20] + b"\xff\xff\0\0\xff\xff\0\0" + whole[entry + 28 :], "reaches into"),
        (whole[: entry + 42] + b"\x40\0\0\0" + whole[entry + 46 :], "truncated"),
        (whole[: entry + 42] + b"\0\0\xff\x7f" + whole[entry + 46 :], "beyond its directory"),
        (whole.replace(b"\x80\x02N.", b"\x80\x02\x88."), "checksum differs"),
    ):  # fmt: skip
        assert re.search(words, refusal(folder / "x.pt", raw)), words


def open_pickle_of(folder: Path, raw: bytes) -> object:
    (folder / "x.pt").write_bytes(raw)
    return open_pickle(folder / "x.pt").content
