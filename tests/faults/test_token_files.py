"""Damaged token files: cut at every place that matters, flipped, mismatched. Always a DataError that says what and where."""

import struct

import numpy as np
import pytest

from megalith.data.indexed.builder import IndexedWriter
from megalith.data.indexed.mmap import open_indexed
from megalith.errors import DataError, MegalithError


@pytest.fixture(params=["mmap", "cached"])
def layout(request):
    return request.param


@pytest.fixture
def pair(layout, tmp_path):
    return write(tmp_path / "corpus_text_document", layout)


@pytest.fixture
def mmap_pair(tmp_path):
    return write(tmp_path / "corpus_text_document", "mmap")


def write(prefix, layout):
    with IndexedWriter(prefix, np.int32, layout) as writer:
        writer.add_block(np.arange(100), np.array([10, 20, 30, 40]))
    return prefix


def idx(prefix):
    return prefix.with_name(prefix.name + ".idx")


def binary(prefix):
    return prefix.with_name(prefix.name + ".bin")


def patch(path, offset, data):
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def test_the_index_cut_anywhere(pair):
    whole = idx(pair).read_bytes()
    for length in range(len(whole)):
        idx(pair).write_bytes(whole[:length])
        with pytest.raises(DataError) as caught:
            open_indexed(pair)
        assert str(idx(pair)) in str(caught.value)
        if length > len(whole) - 8:
            assert f"truncated by {len(whole) - length} bytes" in str(caught.value)


@pytest.mark.parametrize("extra", [1, 3, 5, 100])
def test_the_index_too_long(pair, extra):
    idx(pair).write_bytes(idx(pair).read_bytes() + bytes(extra))
    with pytest.raises(DataError, match=f"{extra} bytes too long"):
        open_indexed(pair)


@pytest.mark.parametrize("length", [0, 1, 40, 396, 399])
def test_the_tokens_cut(pair, length):
    binary(pair).write_bytes(binary(pair).read_bytes()[:length])
    with pytest.raises(DataError, match=f"truncated by {400 - length} bytes") as caught:
        open_indexed(pair)
    assert str(binary(pair)) in str(caught.value)


def test_the_tokens_too_long(pair):
    binary(pair).write_bytes(binary(pair).read_bytes() + bytes(8))
    with pytest.raises(DataError, match="8 bytes too long"):
        open_indexed(pair)


@pytest.mark.parametrize("byte", range(7))
def test_the_magic_flipped(pair, byte):
    patch(idx(pair), byte, b"?")
    with pytest.raises(DataError, match="not a token index"):
        open_indexed(pair)


def test_another_file_instead_of_an_index(pair):
    idx(pair).write_text('{"text": "hello"}\n')
    with pytest.raises(DataError, match="not a token index"):
        open_indexed(pair)


def test_a_wrong_version(pair, layout):
    patch(idx(pair), 9 if layout == "mmap" else 8, struct.pack("<Q", 2))
    with pytest.raises(DataError, match="version 2"):
        open_indexed(pair)


@pytest.mark.parametrize(
    ("code", "message"), [(6, "is a float"), (7, "is a float"), (0, "unknown"), (99, "unknown")]
)
def test_wrong_dtype_codes(pair, layout, code, message):
    patch(idx(pair), 17 if layout == "mmap" else 16, bytes([code]))
    with pytest.raises(DataError, match=message):
        open_indexed(pair)


def test_an_element_size_that_contradicts_the_dtype(tmp_path):
    with IndexedWriter(tmp_path / "x", np.int32, "lazy") as writer:
        writer.add_block(np.arange(3), np.array([3]))
    patch(idx(tmp_path / "x"), 24, struct.pack("<Q", 8))
    with pytest.raises(DataError, match="header says 8"):
        open_indexed(tmp_path / "x")


def test_items_of_two_dimensions(tmp_path):
    with IndexedWriter(tmp_path / "x", np.int32, "lazy") as writer:
        writer.add_block(np.arange(3), np.array([3]))
    patch(idx(tmp_path / "x"), 40, struct.pack("<Q", 2))
    with pytest.raises(MegalithError, match="more than one dimension"):
        open_indexed(tmp_path / "x")


def test_a_pointer_outside_the_tokens(mmap_pair):
    patch(idx(mmap_pair), 34 + 4 * 4 + 8, struct.pack("<q", 396))
    dataset = open_indexed(mmap_pair)
    with pytest.raises(DataError, match=r"outside the \.bin"):
        dataset[1]
    assert len(dataset[2]) == 30


@pytest.mark.parametrize("pointer", [-8, 2])
def test_an_impossible_pointer(mmap_pair, pointer):
    patch(idx(mmap_pair), 34 + 4 * 4 + 8, struct.pack("<q", pointer))
    with pytest.raises(DataError, match=r"outside the \.bin"):
        open_indexed(mmap_pair)[1]


def test_a_negative_item(mmap_pair):
    patch(idx(mmap_pair), 34 + 4, struct.pack("<i", -20))
    with pytest.raises((DataError, IndexError)):
        open_indexed(mmap_pair)[1]


@pytest.mark.parametrize(("position", "value"), [(0, 1), (-1, 3), (-1, 5)])
def test_a_document_index_that_does_not_span_the_items(mmap_pair, position, value):
    content = bytearray(idx(mmap_pair).read_bytes())
    words = np.frombuffer(content, "<i8", offset=34 + 12 * 4)
    words[position] = value
    idx(mmap_pair).write_bytes(content)
    with pytest.raises(DataError, match="document index must go from 0 to 4"):
        open_indexed(mmap_pair)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_half_a_pair(pair, suffix):
    missing = pair.with_name(pair.name + suffix)
    missing.unlink()
    with pytest.raises(DataError, match="other file of the pair") as caught:
        open_indexed(pair)
    assert str(missing) in str(caught.value)


def test_a_name_that_does_not_exist_is_answered_with_the_nearest(pair):
    with pytest.raises(DataError, match=r"did you mean .*corpus_text_document"):
        open_indexed(pair.with_name("corpus"))
    with pytest.raises(DataError, match=r"did you mean .*corpus_text_document"):
        open_indexed(pair.with_name("corpus_txt_document.bin"))
    with pytest.raises(DataError, match="no folder"):
        open_indexed(pair.parent / "nowhere" / "corpus")


def test_a_folder(pair, monkeypatch):
    with pytest.raises(DataError, match="a folder, not a prefix"):
        open_indexed(pair.parent)
    monkeypatch.chdir(pair.parent)
    with pytest.raises(DataError, match="a folder, not a prefix"):
        open_indexed(".")
