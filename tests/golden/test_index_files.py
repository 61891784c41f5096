"""Golden bytes of the token files: Megatron's own numbers, and its own files rewritten from their own items."""

import struct

import numpy as np
import pytest

from megalith.data.indexed.builder import IndexedWriter
from megalith.data.indexed.mmap import open_indexed

# .idx of items [3, 2] uint16, documents [0, 1, 2], computed by running Megatron's builder: 82 bytes.
TWO_ITEMS = bytes.fromhex(
    "4d4d4944494458000001000000000000000802000000000000000300000000000000030000000200000000000000000000000600"
    "000000000000000000000000000001000000000000000200000000000000"
)
FIXTURES = (
    "meg-gpt2-openwebtext_text_document",
    "ag_news_prompt_inputs_document",
    "ag_news_prompt_targets_document",
)


def test_two_items_by_item(tmp_path):
    with IndexedWriter(tmp_path / "two", np.uint16) as writer:
        for item in ([7, 8, 9], [1, 2]):
            writer.add_item(item)
            writer.end_document()
    assert (tmp_path / "two.idx").read_bytes() == TWO_ITEMS
    assert (tmp_path / "two.bin").read_bytes() == struct.pack("<5H", 7, 8, 9, 1, 2)


def test_two_items_by_block(tmp_path):
    with IndexedWriter(tmp_path / "two", np.uint16) as writer:
        writer.add_block(np.array([7, 8, 9, 1, 2], np.uint32), np.array([3, 2]))
    assert (tmp_path / "two.idx").read_bytes() == TWO_ITEMS
    assert (tmp_path / "two.bin").read_bytes() == struct.pack("<5H", 7, 8, 9, 1, 2)


@pytest.mark.parametrize("impl", ["cached", "lazy"])
def test_legacy_layout(tmp_path, impl):
    """Three sentences in two documents, spelt out from the layout's table: every number is 8 bytes."""
    with IndexedWriter(tmp_path / "old", np.int32, impl) as writer:
        writer.add_item([7, 8, 9])
        writer.add_item([1])
        writer.end_document()
        writer.add_item([5, 6])
        writer.end_document()
    header = struct.pack("<8sQ4QQ", b"TNTIDX\0\0", 1, 4, 4, 3, 3, 3)
    dim_offsets, data_offsets, sizes, documents = (0, 1, 2, 3), (0, 3, 4, 6), (3, 1, 2), (0, 2, 3)
    numbers = (*dim_offsets, *data_offsets, *sizes, *documents)
    assert (tmp_path / "old.idx").read_bytes() == header + struct.pack(f"<{len(numbers)}q", *numbers)
    assert (tmp_path / "old.bin").read_bytes() == struct.pack("<6i", 7, 8, 9, 1, 5, 6)


def test_no_items(tmp_path):
    with IndexedWriter(tmp_path / "none", np.uint16):
        pass
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 0, 1)
    assert (tmp_path / "none.idx").read_bytes() == header + struct.pack("<q", 0)
    assert (tmp_path / "none.bin").read_bytes() == b""


@pytest.mark.parametrize("name", FIXTURES)
@pytest.mark.parametrize("way", ["items", "block", "dataset"])
def test_megatron_files_rewritten_equal_themselves(real_data, tmp_path, name, way):
    source = real_data("megatron-fixtures") / name
    dataset = open_indexed(source)
    with IndexedWriter(tmp_path / name, dataset.dtype) as writer:
        if way == "items":
            ends = set(dataset.document_indices[1:].tolist())
            for number in range(len(dataset)):
                writer.add_item(dataset[number].astype(np.int64))
                if number + 1 in ends:
                    writer.end_document()
        elif way == "block":
            writer.add_block(dataset.tokens, dataset.sizes, np.diff(dataset.document_indices))
        else:
            writer.add_dataset(dataset)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / (name + suffix)).read_bytes() == source.with_name(name + suffix).read_bytes()


def test_megatron_file_as_published(real_data):
    dataset = open_indexed(real_data("megatron-fixtures") / FIXTURES[0])
    assert (len(dataset), dataset.num_documents, dataset.num_tokens) == (1000, 1000, 1_361_845)
    assert dataset.dtype == np.uint16
    assert int(dataset.sizes.sum()) == dataset.num_tokens
