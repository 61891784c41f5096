"""Reading token files: both layouts, both mmap variants, and what the reader hands out."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.data.indexed.builder import IndexedWriter
from megalith.data.indexed.format import DTYPES, storage_dtype
from megalith.data.indexed.mmap import open_indexed
from megalith.errors import DataError

ITEMS = [[7, 8, 9], [], [1], [5, 6, 4, 3]]


def write(prefix, items=ITEMS, dtype=np.uint16, impl="mmap", documents=None):
    with IndexedWriter(prefix, dtype, impl) as writer:
        for number, item in enumerate(items, start=1):
            writer.add_item(np.array(item, dtype=np.int64))
            if documents is None or number in documents:
                writer.end_document()
    return prefix


@pytest.mark.parametrize("impl", ["mmap", "cached"])
@pytest.mark.parametrize("dtype", [str(dtype) for dtype in DTYPES.values()])
def test_every_dtype_and_layout_round_trips(tmp_path, impl, dtype):
    dataset = open_indexed(write(tmp_path / "x", dtype=np.dtype(dtype), impl=impl, documents=(2, 4)))
    assert [dataset[i].tolist() for i in range(len(dataset))] == ITEMS
    assert dataset.sizes.tolist() == [3, 0, 1, 4]
    assert dataset.sizes.dtype == np.int32
    assert dataset.document_indices.tolist() == [0, 2, 4]
    assert dataset.document_indices.dtype == np.int64
    assert (dataset.num_documents, dataset.num_tokens, dataset.dtype) == (2, 8, np.dtype(dtype))


@settings(max_examples=50, deadline=None)
@given(
    items=st.lists(st.lists(st.integers(0, 65535), max_size=9), min_size=1, max_size=20), legacy=st.booleans()
)
def test_any_items_round_trip(tmp_path_factory, items, legacy):
    prefix = tmp_path_factory.mktemp("any") / "x"
    dataset = open_indexed(write(prefix, items, np.int32, "lazy" if legacy else "mmap"))
    assert [dataset[i].tolist() for i in range(len(dataset))] == items


def test_modes_are_read_and_ignored_by_items(tmp_path):
    write(tmp_path / "x")
    with (tmp_path / "x.idx").open("ab") as file:
        file.write(bytes([0, 1, 0, 1]))
    dataset = open_indexed(tmp_path / "x")
    assert dataset.index.modes.tolist() == [0, 1, 0, 1]
    assert dataset[3].tolist() == ITEMS[3]


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_either_suffix_may_be_given(tmp_path, suffix):
    write(tmp_path / "a.b")
    assert len(open_indexed(str(tmp_path / "a.b") + suffix)) == 4


def test_parts_of_an_item(tmp_path):
    dataset = open_indexed(write(tmp_path / "x"))
    assert dataset.get(3, 1, 2).tolist() == [6, 4]
    assert dataset.get(3, 2).tolist() == [4, 3]
    assert dataset.get(3, 4).tolist() == []
    for wrong in ((3, 5), (3, -1), (3, 0, 5), (1, 0, 1), (4,)):
        with pytest.raises(IndexError):
            dataset.get(*wrong)


def test_items_are_read_only_views(tmp_path):
    item = open_indexed(write(tmp_path / "x"))[0]
    assert not item.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        item[0] = 1


def test_pickles_as_its_prefix(tmp_path):
    dataset = open_indexed(write(tmp_path / "x", items=[list(range(1000))] * 100))
    data = pickle.dumps(dataset)
    assert len(data) < 500
    assert pickle.loads(data)[99].tolist() == list(range(1000))


def test_content_hash_depends_on_the_split(tmp_path):
    one = open_indexed(write(tmp_path / "one", [[1, 2], [3]]))
    two = open_indexed(write(tmp_path / "two", [[1], [2, 3]]))
    again = open_indexed(write(tmp_path / "again", [[1, 2], [3]]))
    assert one.content_hash() == again.content_hash() != two.content_hash()


@pytest.mark.parametrize("impl", ["mmap", "cached"])
def test_no_items_is_refused_unless_allowed(tmp_path, impl):
    write(tmp_path / "none", [], impl=impl)
    with pytest.raises(DataError, match="no documents"):
        open_indexed(tmp_path / "none")
    empty = open_indexed(tmp_path / "none", allow_empty=True)
    assert (len(empty), empty.num_documents, empty.num_tokens) == (0, 0, 0)


def test_documents_without_tokens(tmp_path):
    dataset = open_indexed(write(tmp_path / "x", [[], []]))
    assert (len(dataset), dataset.num_tokens, dataset[1].tolist()) == (2, 0, [])


@pytest.mark.parametrize(
    ("size", "impl", "expected"),
    [
        (50257, "mmap", "uint16"),
        (65499, "mmap", "uint16"),
        (65500, "mmap", "int32"),
        (None, "mmap", "int32"),
        (5, "lazy", "int32"),
    ],
)
def test_megatrons_dtype_rule(size, impl, expected):
    assert storage_dtype(size, impl) == np.dtype(expected)
