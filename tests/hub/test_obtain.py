"""From a name to whole, checked files: once, by one process, from the network, a mirror or a person's hands."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from megalith.errors import CheckpointError, DataError
from megalith.hub import obtain as module
from megalith.hub.fetch import Patience
from megalith.hub.obtain import Watch, obtain, obtain_vocabulary, resolve
from megalith.hub.store import installed, published_config, vocabulary_files
from tests.hub.published import (
    MERGES,
    MODEL,
    RANK,
    SINGLE,
    TINY,
    TRACKER,
    VOCABULARY,
    WEIGHTS,
    WORDS,
    archive,
)

QUICK = Patience(timeout=5, tries=2, pause=0.001)


class Told:
    """A watch that remembers."""

    def __init__(self):
        self.notices, self.bytes = [], {}
        self.watch = Watch(
            self.notices.append, lambda name, done, total: self.bytes.update({name: (done, total)}), QUICK
        )


@pytest.fixture
def told():
    return Told()


def refused(entry, told, **more):
    with pytest.raises(DataError) as caught:
        obtain(entry, watch=told.watch, **more)
    return caught.value.problem


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_model_comes_with_its_vocabulary(mirror, home, told):
    found = obtain(TINY, watch=told.watch)
    assert found == home / "hub" / "tiny"
    files = files_of(found)
    record = json.loads(files.pop("hub.json"))
    assert files == {
        "latest_checkpointed_iteration.txt": TRACKER,
        RANK: WEIGHTS,
        "vocab.json": WORDS,
        "merges.txt": MERGES,
    }
    assert record["files"] == {name: len(content) for name, content in files.items()}
    assert record["sha256"] == {"tiny_v0.zip": hashlib.sha256(MODEL).hexdigest()}
    assert record["from"] == {"tiny_v0.zip": f"{mirror.url}/tiny/tiny_v0.zip"}
    assert published_config(found / "release") == {"num_attention_heads": 8}
    assert told.bytes["tiny_v0.zip"] == (len(MODEL), len(MODEL))
    names = sorted(path.name for path in (home / "hub").iterdir())
    assert names == [".tiny.lock", ".tiny.sha256", ".words.lock", "tiny", "words"]


def test_what_is_here_is_not_asked_for(mirror, told):
    obtain(TINY, watch=told.watch)
    asked = len(mirror.asked)
    assert asked == 3
    obtain(TINY, watch=told.watch)
    obtain(VOCABULARY, watch=told.watch)
    assert len(mirror.asked) == asked


def test_a_model_of_one_file_is_that_file(mirror, home, told):
    assert obtain(SINGLE, watch=told.watch) == home / "hub" / "single" / "M.pt"


def test_another_folder(mirror, home, tmp_path, told):
    assert obtain(SINGLE, tmp_path / "there", watch=told.watch) == tmp_path / "there" / "single" / "M.pt"
    assert not home.exists()


def test_a_first_checksum_is_kept_and_said(mirror, home, told):
    obtain(SINGLE, watch=told.watch)
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    assert (home / "hub" / ".single.sha256").read_text() == f"{digest}  M.pt\n"
    assert any("no checksum was published" in notice and digest in notice for notice in told.notices)
    (home / "hub" / "single" / "M.pt").unlink()
    told.notices.clear()
    obtain(SINGLE, watch=told.watch)
    assert not any("no checksum" in notice for notice in told.notices)


def test_a_later_download_must_have_it(mirror, home, told):
    obtain(SINGLE, watch=told.watch)
    (home / "hub" / "single" / "M.pt").unlink()
    mirror.files["/single/M.pt"] = WEIGHTS[::-1]
    problem = refused(SINGLE, told)
    assert "that of the first download" in problem.what
    assert "what came was removed" in problem.what
    assert problem.where == f"{mirror.url}/single/M.pt"
    assert [path.name for path in (home / "hub" / "single").iterdir()] == ["hub.json"]
    assert installed(SINGLE, home / "hub") is None


def test_a_published_checksum_must_be_met(mirror, home, told):
    mirror.files["/words/vocab.json"] = WORDS[::-1]
    problem = refused(VOCABULARY, told)
    assert f"the published one is {VOCABULARY.files[0].sha256}" in problem.what
    assert list((home / "hub" / "words").iterdir()) == []
    mirror.files["/words/vocab.json"] = WORDS
    obtain(VOCABULARY, watch=told.watch)


def test_a_file_that_was_cut_on_the_disk_comes_again(mirror, home, told):
    folder = obtain(TINY, watch=told.watch)
    (folder / RANK).write_bytes(b"cut")
    obtain(TINY, watch=told.watch)
    assert (folder / RANK).read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (archive({"../../evil": b"x"}), "would lie outside the folder"),
        (MODEL[:-40], "is no zip that can be read"),
    ],
    ids=["slip", "cut"],
)
def test_an_archive_that_cannot_be_trusted_leaves_nothing(mirror, home, tmp_path, told, content, words):
    mirror.files["/tiny/tiny_v0.zip"] = content
    assert words in refused(TINY, told).what
    assert list((home / "hub" / "tiny").iterdir()) == []
    assert not list(tmp_path.rglob("evil"))
    mirror.files["/tiny/tiny_v0.zip"] = MODEL  # its checksum was not kept
    obtain(TINY, watch=told.watch)


def test_offline(mirror, home, told, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    problem = refused(TINY, told)
    assert "HF_HUB_OFFLINE forbids the network" in problem.what
    for name in ("words/vocab.json", "words/merges.txt", "tiny/tiny_v0.zip"):
        assert f"fetch {mirror.url}/{name} as {home / 'hub' / name}" in problem.fix
    assert "megalith hub download tiny" in problem.fix
    assert mirror.asked == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "false")
    obtain(TINY, watch=told.watch)
    monkeypatch.setenv("MEGALITH_OFFLINE", "1")
    obtain(TINY, watch=told.watch)


def test_files_put_there_by_hand(mirror, home, told, monkeypatch):
    monkeypatch.setenv("MEGALITH_OFFLINE", "1")
    refused(TINY, told)
    for place, content in (
        ("words/vocab.json", WORDS),
        ("words/merges.txt", MERGES),
        ("tiny/tiny_v0.zip", MODEL),
    ):
        (home / "hub" / place).parent.mkdir(exist_ok=True)
        (home / "hub" / place).write_bytes(content)
    assert (obtain(TINY, watch=told.watch) / RANK).read_bytes() == WEIGHTS


def test_a_wrong_file_put_there_is_left_there(mirror, home, told):
    place = home / "hub" / "words" / "vocab.json"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"{}")
    problem = refused(VOCABULARY, told)
    assert (problem.where, place.read_bytes()) == (str(place), b"{}")
    assert "remove the file" in problem.fix


def test_no_network_says_what_to_do_by_hand(mirror, home, told, monkeypatch):
    monkeypatch.setenv("MEGALITH_HUB_URL", "http://127.0.0.1:9")
    problem = refused(SINGLE, told)
    assert "no connection" in problem.what
    assert f"fetch http://127.0.0.1:9/single/M.pt as {home / 'hub' / 'single' / 'M.pt'}" in problem.fix


def test_without_a_mirror_the_publisher_is_asked(mirror, told, monkeypatch):
    monkeypatch.delenv("MEGALITH_HUB_URL")
    here = replace(SINGLE, files=(replace(SINGLE.files[0], url=f"{mirror.url}/single/M.pt"),))
    obtain(here, watch=told.watch)
    assert mirror.asked == [("/single/M.pt", "")]


def test_a_folder_that_cannot_be_made(mirror, tmp_path, told):
    (tmp_path / "file").write_text("")
    problem = refused(SINGLE, told, root=tmp_path / "file")
    assert "cannot be written" in problem.what
    assert "MEGALITH_HOME" in problem.fix


def test_a_file_system_without_locks(mirror, home, told, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(module.fcntl, "flock", flock)
    obtain(SINGLE, watch=told.watch)
    assert sorted(path.name for path in (home / "hub" / "single").iterdir()) == ["M.pt", "hub.json"]


# ---- several processes ----

OBTAIN = """
import sys
from megalith.hub import catalogue
from tests.hub import published
catalogue.ENTRIES = published.ENTRIES
from megalith.hub.obtain import resolve
print(resolve("tiny"))
"""


def start():
    return subprocess.Popen(
        [sys.executable, "-c", OBTAIN],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def test_two_processes_fetch_once(mirror, home):
    mirror.gate = threading.Event()
    first = start()
    assert mirror.halfway.wait(20)
    second = start()
    said = second.stderr.readline()
    mirror.gate.set()
    for process in (first, second):
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out.strip()) == (0, str(home / "hub" / "tiny")), err
    assert "another process is downloading" in said
    assert sorted(path for path, _ in mirror.asked) == [
        "/tiny/tiny_v0.zip",
        "/words/merges.txt",
        "/words/vocab.json",
    ]


def test_a_killed_download_goes_on(mirror, home, told):
    obtain(VOCABULARY, watch=told.watch)
    mirror.halfway.clear()
    mirror.gate = threading.Event()
    process = start()
    part, half = home / "hub" / "tiny" / "tiny_v0.zip.part", len(MODEL) // 2
    assert mirror.halfway.wait(20)
    while process.poll() is None and not (part.exists() and part.stat().st_size == half):
        threading.Event().wait(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    mirror.gate.set()
    assert part.stat().st_size == half
    mirror.asked.clear()
    found = obtain(TINY, watch=told.watch)
    assert mirror.asked == [("/tiny/tiny_v0.zip", f"bytes={half}-")]
    assert (found / RANK).read_bytes() == WEIGHTS


# ---- names ----


def test_names_stand_for_models(mirror, home, tmp_path, told, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("tiny_by_alias", told.watch) == home / "hub" / "tiny"
    assert resolve("no/such") == Path("no/such")
    (tmp_path / "tiny").mkdir()
    assert resolve("tiny") == Path("tiny")
    with pytest.raises(CheckpointError, match="is a vocabulary, not a model"):
        resolve("words")


def test_names_stand_for_vocabularies(mirror, home, told):
    with pytest.raises(DataError, match="the vocabulary words is not on this machine"):
        vocabulary_files("tiny")
    assert vocabulary_files("elsewhere") is None
    for name in ("tiny", None, "elsewhere"):
        obtain_vocabulary(name, told.watch)
    folder = home / "hub" / "words"
    files = {"vocab_file": str(folder / "vocab.json"), "merge_file": str(folder / "merges.txt")}
    assert vocabulary_files("words-by-alias") == {"type": "GPT2BPETokenizer", **files}
    assert not (home / "hub" / "tiny").exists()


@pytest.mark.parametrize("record", ["", "{}", "[1]", '{"format_version": 2, "files": {}}'])
def test_a_record_that_is_none_of_ours(home, record):
    folder = home / "hub" / "tiny"
    folder.mkdir(parents=True)
    (folder / "hub.json").write_text(record)
    assert installed(TINY, home / "hub") is None
    assert published_config(folder) is None
