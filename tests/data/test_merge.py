"""Merging: every document in order, nothing mixed silently, damaged inputs and own outputs refused."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.data.indexed.builder import IndexedWriter
from megalith.data.indexed.mmap import open_indexed
from megalith.data.indexed.sidecar import read_side_car
from megalith.data.indexed.verify import verify
from megalith.data.merge import merge
from megalith.errors import DataError

from .indexed.corpus import make_pair, make_tokenizer

DOCUMENTS = st.lists(st.lists(st.lists(st.integers(0, 300), max_size=4), max_size=3), max_size=4)


@pytest.fixture
def folder(tmp_path):
    make_tokenizer(tmp_path / "tokenizer")
    parts = tmp_path / "parts"
    parts.mkdir()
    make_pair(parts / "b", tmp_path / "tokenizer", ["second", "third"])
    make_pair(parts / "a", tmp_path / "tokenizer", ["first"])
    return tmp_path


def write(prefix, documents, impl="mmap"):
    with IndexedWriter(prefix, np.int32, impl) as writer:
        for document in documents:
            for item in document:
                writer.add_item(np.array(item, np.int32))
            writer.end_document()
    return prefix


def read(prefix):
    dataset = open_indexed(prefix)
    ends = dataset.document_indices.tolist()
    return [[dataset[item].tolist() for item in range(first, last)] for first, last in pairwise(ends)]


@settings(max_examples=30, deadline=None)
@given(inputs=st.lists(st.tuples(DOCUMENTS, st.booleans()), min_size=1, max_size=4))
def test_documents_and_items_are_concatenated(tmp_path_factory, inputs):
    base = tmp_path_factory.mktemp("merge")
    names = [
        write(base / f"{number}", documents, "cached" if legacy else "mmap")
        for number, (documents, legacy) in enumerate(inputs)
    ]
    expected = [document for documents, _ in inputs for document in documents]
    if not any(expected):
        with pytest.raises(DataError, match="none of the inputs"):
            merge(names, base / "out")
        return
    merge(names, base / "out")
    assert read(base / "out") == expected
    assert verify(base / "out").problems == []


def test_merging_megatrons_file_with_itself_doubles_it(real_data, tmp_path):
    source = real_data("megatron-fixtures") / "meg-gpt2-openwebtext_text_document"
    steps = []
    merged = merge([source, source], tmp_path / "out", progress=steps.append)
    data = source.with_name(source.name + ".bin").read_bytes()
    assert (tmp_path / "out.bin").read_bytes() == data + data
    assert (merged.written.documents, merged.written.tokens) == (2000, 2 * 1_361_845)
    assert sum(steps) == 2 * len(data)
    sizes = open_indexed(source).sizes.tolist()
    assert open_indexed(tmp_path / "out").sizes.tolist() == sizes + sizes


def test_one_pair_merged_is_itself(real_data, tmp_path):
    source = real_data("megatron-fixtures") / "ag_news_prompt_inputs_document"
    merge([source], tmp_path / "out")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"out{suffix}").read_bytes() == source.with_name(source.name + suffix).read_bytes()


def test_a_folder_is_its_pairs_by_name(folder):
    merged = merge([folder / "parts"], folder / "out")
    assert [path.name for path in merged.inputs] == ["a", "b"]
    side_car = read_side_car(folder / "out")
    assert (side_car.documents, side_car.append_eod) == (3, True)
    assert side_car.sources == ["a.jsonl", "b.jsonl"]
    assert side_car.tokenizer == read_side_car(folder / "parts" / "a").tokenizer
    assert verify(folder / "out").problems == []


def test_the_order_given_is_kept(folder):
    merged = merge([folder / "parts" / "b.bin", folder / "parts" / "a.idx"], folder / "out")
    assert [path.name for path in merged.inputs] == ["b", "a"]
    assert len(open_indexed(folder / "out")[2]) == len(open_indexed(folder / "parts" / "a")[0])


def test_another_tokenizer_needs_force(folder):
    make_tokenizer(folder / "other", 260)
    make_pair(folder / "parts" / "c", folder / "other", ["fourth"])
    with pytest.raises(DataError, match="another tokenizer"):
        merge([folder / "parts"], folder / "out")
    assert not (folder / "out.bin").exists()
    merged = merge([folder / "parts"], folder / "out", force=True)
    assert any("--force" in notice for notice in merged.notices)
    assert read_side_car(folder / "out").tokenizer is None


def test_another_end_of_document_setting_needs_force(folder):
    make_pair(folder / "parts" / "c", folder / "tokenizer", ["fourth"], append_eod=False)
    with pytest.raises(DataError, match="without --append-eod"):
        merge([folder / "parts"], folder / "out")
    merge([folder / "parts"], folder / "out", force=True)
    side_car = read_side_car(folder / "out")
    assert (side_car.append_eod, side_car.tokenizer is not None) == (False, True)


def test_an_input_without_side_car_is_noticed(folder):
    make_pair(folder / "parts" / "c", folder / "tokenizer", ["fourth"], side_car=False)
    merged = merge([folder / "parts"], folder / "out")
    assert any("no side-car" in notice for notice in merged.notices)
    assert read_side_car(folder / "out").tokenizer is None


def test_an_empty_input_is_noticed(folder):
    IndexedWriter(folder / "parts" / "c", np.uint16).finish()
    merged = merge([folder / "parts"], folder / "out")
    assert any("holds no documents" in notice for notice in merged.notices)
    assert merged.written.documents == 3


def test_different_storage_types(folder):
    write(folder / "parts" / "c", [[[1, 2]]])
    with pytest.raises(DataError, match="holds int32"):
        merge([folder / "parts"], folder / "out", force=True)


def test_the_output_must_not_be_an_input(folder):
    merge([folder / "parts"], folder / "parts" / "out")
    with pytest.raises(DataError, match="also an input"):
        merge([folder / "parts"], folder / "parts" / "out")
    with pytest.raises(DataError, match="also an input"):
        merge([folder / "parts" / "a"], folder / "parts" / ".." / "parts" / "a")


def test_a_damaged_input_is_refused_before_anything_is_written(folder):
    make_pair(folder / "parts" / "b", folder / "tokenizer", ["one", "two", "three"])
    path = folder / "parts" / "b.idx"
    data = bytearray(path.read_bytes())
    data[34 + 12 + 8] ^= 1  # the offset of item 1 of 3
    path.write_bytes(data)
    with pytest.raises(DataError, match="not where they should"):
        merge([folder / "parts"], folder / "out")
    assert not list(folder.glob("out*"))


def test_modes_are_not_lost_silently(folder):
    with (folder / "parts" / "b.idx").open("ab") as file:
        file.write(bytes([0, 1]))
    with pytest.raises(Exception, match="multimodal"):
        merge([folder / "parts"], folder / "out")
    assert not list(folder.glob("out*"))


def test_missing_inputs(folder):
    with pytest.raises(DataError, match="no such token files"):
        merge([folder / "parts" / "z"], folder / "out")
    (folder / "none").mkdir()
    with pytest.raises(DataError, match="holds no token files"):
        merge([folder / "none"], folder / "out")
    with pytest.raises(DataError, match="no such folder"):
        merge([folder / "parts"], folder / "nowhere" / "out")
