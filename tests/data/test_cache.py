"""The cache gives back what was built, whole or not at all, wherever it may write, and whoever else writes too."""

from __future__ import annotations

import multiprocessing
import os

import numpy as np
import pytest

from megalith.data import cache as module
from megalith.data.cache import IndexCache, cache_folders, entry_name, read_entry, write_entry
from megalith.data.index import GPTIndex, megatron_index
from tests.data.corpus import random_lengths, run_data, tokens_of, write

KEY = {"algorithm": "test 1", "file": "abc", "seed": 1}


def small(seed=1):
    return megatron_index(np.array([5, 3, 7, 4], np.int32), np.arange(4), 4, samples=9, seed=seed)


def same(a: GPTIndex, b: GPTIndex) -> bool:
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("documents", "samples", "shuffle"))


def never():
    raise AssertionError("built again")


def entries(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_written_once_and_mapped_after(tmp_path):
    cache = IndexCache([tmp_path / "index"], smallest=0)
    first = cache.get("a.train", KEY, 10, small)
    again = cache.get("a.train", KEY, 10, never)
    assert same(first, small())
    assert same(again, small())
    assert entries(tmp_path / "index") == [entry_name("a.train", KEY)]


@pytest.mark.parametrize("change", [{"seed": 2}, {"file": "xyz"}, {"epoch": 1}, {"algorithm": "test 2"}])
def test_another_key_is_another_entry(tmp_path, change):
    cache = IndexCache([tmp_path], smallest=0)
    cache.get("a", KEY, 10, small)
    other = cache.get("a", KEY | change, 10, lambda: small(2))
    assert same(other, small(2))
    assert len(entries(tmp_path)) == 2


def test_small_ones_are_not_worth_a_file(tmp_path):
    cache = IndexCache([tmp_path])
    assert same(cache.get("a", KEY, module.SMALLEST - 1, small), small())
    assert entries(tmp_path) == []


@pytest.mark.parametrize("name", ["documents.npy", "samples.npy", "shuffle.npy", "key.json"])
@pytest.mark.parametrize("how", ["cut", "flipped", "emptied", "missing"])
def test_damage_is_noticed_and_mended(tmp_path, name, how):
    notices: list[str] = []
    cache = IndexCache([tmp_path], notices.append, smallest=0)
    cache.get("a", KEY, 10, small)
    file = tmp_path / entry_name("a", KEY) / name
    data = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        flipped = data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]
        file.write_bytes({"cut": data[:-2], "emptied": b"", "flipped": flipped}[how])
    assert same(cache.get("a", KEY, 10, small), small())
    if not (name == "key.json" and how == "flipped"):  # a flipped bit in blanks may be harmless
        assert len(notices) == 1
        assert "damaged" in notices[0]
    assert same(IndexCache([tmp_path], smallest=0).get("a", KEY, 10, never), small())


def test_folders_in_turn(tmp_path):
    """The first cannot be made, the second is a file, the third takes it."""
    (tmp_path / "file").write_text("")
    notices: list[str] = []
    folders = [tmp_path / "file" / "below", tmp_path / "file", tmp_path / "good"]
    cache = IndexCache(folders, notices.append, smallest=0)
    assert same(cache.get("a", KEY, 10, small), small())
    assert len(entries(tmp_path / "good")) == 1
    assert len(notices) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    cache = IndexCache([tmp_path / "locked", tmp_path / "good"], smallest=0)
    cache.get("a", KEY, 10, small)
    assert len(entries(tmp_path / "good")) == 1


def test_a_read_only_file_system(tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(module.tempfile, "mkdtemp", read_only)
    notices: list[str] = []
    cache = IndexCache([tmp_path], notices.append, smallest=0)
    assert same(cache.get("a", KEY, 10, small), small())
    assert "stays in memory" in notices[-1]
    assert entries(tmp_path) == []


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.np, "save", full)
    assert same(IndexCache([tmp_path], smallest=0).get("a", KEY, 10, small), small())
    assert entries(tmp_path) == []


def test_a_killed_writer_is_not_in_the_way(tmp_path):
    (tmp_path / f".{entry_name('a', KEY)}.abc").mkdir()
    cache = IndexCache([tmp_path], smallest=0)
    cache.get("a", KEY, 10, small)
    assert same(cache.get("a", KEY, 10, never), small())


def _build_many(folder, barrier, failures):
    try:
        barrier.wait()
        for seed in range(20):
            key = KEY | {"seed": seed}
            index = IndexCache([folder], smallest=0).get("a", key, 10, lambda seed=seed: small(seed))
            assert same(index, small(seed))
    except BaseException as error:
        failures.put(repr(error))
        raise


def test_two_processes_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, failures = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_build_many, args=(tmp_path, barrier, failures)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0], failures.get()
    assert entries(tmp_path) == sorted(entry_name("a", KEY | {"seed": seed}) for seed in range(20))


def test_an_entry_that_appeared_meanwhile_stays(tmp_path):
    write_entry(tmp_path / "e.index", KEY, small())
    before = (tmp_path / "e.index" / "key.json").stat().st_ino
    write_entry(tmp_path / "e.index", KEY, small())
    assert (tmp_path / "e.index" / "key.json").stat().st_ino == before
    assert entries(tmp_path) == ["e.index"]


def test_an_entry_of_another_key_is_refused(tmp_path):
    write_entry(tmp_path / "e.index", KEY, small())
    with pytest.raises(ValueError, match="another index"):
        read_entry(tmp_path / "e.index", KEY | {"seed": 5})


def test_where_it_looks(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    beside = cache_folders(tmp_path / "data" / "corpus", None)
    assert beside == [tmp_path / "data", tmp_path / "home" / "megalith" / "index"]
    asked = cache_folders(tmp_path / "data" / "corpus", str(tmp_path / "mine"))
    assert asked[0] == tmp_path / "mine"


@pytest.mark.parametrize("order", ["native", "megatron"])
def test_a_run_through_the_cache_is_the_same_run(tmp_path, monkeypatch, order):
    path = write(tmp_path / "a", random_lengths(0))
    plain = tokens_of(run_data(path, order=order, samples=100).train, range(100))
    monkeypatch.setattr(IndexCache, "__init__", _with_smallest(IndexCache.__init__))
    folder = tmp_path / "maps"
    for _ in range(2):
        data = run_data(path, order=order, samples=100, index_mapping_dir=str(folder))
        assert tokens_of(data.train, range(100)) == plain
    assert len(entries(folder)) == (3 if order == "native" else 1), "an entry an epoch, or one in all"
    assert entries(tmp_path) == ["a.bin", "a.idx", "maps"]


def _with_smallest(init):
    def made(self, folders, notice=module.no_notice, smallest=0):
        init(self, folders, notice, smallest)

    return made
