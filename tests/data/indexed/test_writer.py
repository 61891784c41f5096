"""Writing token files: atomic, in bounded memory, and never a wrapped number."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from megalith.data.indexed import builder
from megalith.data.indexed.builder import IndexedWriter
from megalith.data.indexed.mmap import open_indexed
from megalith.errors import DataError, UnsupportedError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_nothing_appears_before_finish(tmp_path):
    writer = IndexedWriter(tmp_path / "x", np.uint16)
    writer.add_block(np.arange(5), np.array([2, 3]))
    assert names(tmp_path) == ["x.bin.partial"]
    writer.finish()
    assert names(tmp_path) == ["x.bin", "x.idx"]


def test_an_exception_leaves_nothing_and_keeps_the_old_pair(tmp_path):
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_block(np.arange(5), np.array([2, 3]))
    before = (tmp_path / "x.bin").read_bytes()
    with pytest.raises(KeyError), IndexedWriter(tmp_path / "x", np.uint16) as writer:  # noqa: PT012
        writer.add_block(np.zeros(4), np.array([4]))
        raise KeyError
    assert names(tmp_path) == ["x.bin", "x.idx"]
    assert (tmp_path / "x.bin").read_bytes() == before


def test_a_killed_writer_is_replaced_by_the_next(tmp_path):
    code = (
        "import os, sys, numpy as np\nfrom megalith.data.indexed.builder import IndexedWriter\n"
        "w = IndexedWriter(sys.argv[1], np.uint16)\nw.add_block(np.arange(9**6) % 9, np.full(9**5, 9))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], check=False)
    assert names(tmp_path) == ["x.bin.partial"]
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_item([1, 2])
        writer.end_document()
    assert open_indexed(tmp_path / "x")[0].tolist() == [1, 2]
    assert (tmp_path / "x.bin").stat().st_size == 4


def test_two_writers_of_one_prefix_are_refused(tmp_path):
    first = IndexedWriter(tmp_path / "x", np.uint16)
    with pytest.raises(DataError, match="another process"):
        IndexedWriter(tmp_path / "x", np.uint16)
    first.abort()
    assert names(tmp_path) == []


def test_a_pair_that_cannot_be_finished_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="still open"), IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_item([1, 2])
    assert names(tmp_path) == []


def test_overwriting_removes_the_stale_side_car(tmp_path):
    (tmp_path / "x.meta.json").write_text("{}")
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_block(np.arange(2), np.array([2]))
    assert names(tmp_path) == ["x.bin", "x.idx"]


@pytest.mark.parametrize(
    ("dtype", "tokens"), [(np.uint16, [65536]), (np.uint16, [-1]), (np.int32, [2**31]), (np.uint8, [256])]
)
def test_ids_that_do_not_fit_are_refused(tmp_path, dtype, tokens):
    writer = IndexedWriter(tmp_path / "x", dtype)
    with pytest.raises(DataError, match="do not fit"):
        writer.add_item(tokens)
    writer.abort()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint32, bool])
def test_floats_are_no_tokens(tmp_path, dtype):
    with pytest.raises(UnsupportedError, match="cannot be stored"):
        IndexedWriter(tmp_path / "x", dtype)


def test_misuse_is_an_error(tmp_path):
    writer = IndexedWriter(tmp_path / "x", np.uint16)
    with pytest.raises(ValueError, match="add up"):
        writer.add_block(np.arange(3), np.array([2]))
    with pytest.raises(ValueError, match="documents hold"):
        writer.add_block(np.arange(3), np.array([2, 1]), np.array([1]))
    with pytest.raises(ValueError, match="shape"):
        writer.add_item(np.zeros((2, 2), np.uint16))
    writer.add_item([1])
    with pytest.raises(ValueError, match="still open"):
        writer.add_block(np.arange(2), np.array([2]))
    with pytest.raises(ValueError, match="still open"):
        writer.finish()
    writer.abort()


def test_written_numbers_and_hashes(tmp_path):
    writer = IndexedWriter(tmp_path / "x", np.int32)
    writer.add_block(np.arange(6), np.array([1, 2, 3]), np.array([2, 1]))
    written = writer.finish()
    assert (written.items, written.documents, written.tokens) == (3, 2, 6)
    for suffix, digest, length in (
        (".bin", written.bin_sha256, written.bin_bytes),
        (".idx", written.idx_sha256, written.idx_bytes),
    ):
        data = (tmp_path / ("x" + suffix)).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (digest, length)


@pytest.mark.parametrize("impl", ["mmap", "cached"])
def test_spools_spill_and_chunks_join(tmp_path, monkeypatch, impl):
    """With tiny chunks and spools, the same bytes as in one piece."""
    lengths = np.arange(1000) % 7
    tokens = np.arange(lengths.sum()) % 1000

    def write(name):
        with IndexedWriter(tmp_path / name, np.int32, impl) as writer:
            writer.add_block(tokens, lengths, np.full(250, 4))
        return (tmp_path / f"{name}.idx").read_bytes()

    whole = write("whole")
    monkeypatch.setattr(builder, "_SPOOL_BYTES", 64)
    monkeypatch.setattr(builder, "_CHUNK_ITEMS", 7)
    assert write("pieces") == whole
    with IndexedWriter(tmp_path / "copy", np.int32, impl) as writer:
        writer.add_dataset(open_indexed(tmp_path / "whole"))
        writer.add_dataset(open_indexed(tmp_path / "pieces"))
    copied = open_indexed(tmp_path / "copy")
    assert copied.sizes.tolist() == [*lengths, *lengths]
    assert copied.document_indices.tolist() == list(range(0, 2001, 4))


def test_millions_of_documents_take_little_memory(tmp_path):
    """Ten million items (200 MB of index): the writer may add 80 MiB; arrays kept in memory take 160."""
    code = """
import resource, sys, numpy as np
from megalith.data.indexed.builder import IndexedWriter
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with IndexedWriter(sys.argv[1], np.uint16) as writer:
    for _ in range(100):
        writer.add_block(np.zeros(100_000, np.uint16), np.ones(100_000, np.int32))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(tmp_path / "x")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert int(done.stdout) < 80
    assert len(open_indexed(tmp_path / "x")) == 10_000_000


def test_a_full_disk_is_told_in_words_and_leaves_nothing(tmp_path):
    """A file-size limit of 1 MiB stands for a full disk: the write fails the same way."""
    code = """
import resource, signal, sys, numpy as np
from megalith.data.indexed.builder import IndexedWriter
from megalith.errors import DataError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    with IndexedWriter(sys.argv[1], np.uint16) as writer:
        for _ in range(8):
            writer.add_block(np.zeros(1 << 18, np.uint16), np.array([1 << 18]))
except DataError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "x")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "x.bin.partial: cannot be written: File too large" in done.stdout
    assert done.stderr == ""
    assert names(tmp_path) == []
