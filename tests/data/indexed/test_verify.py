"""`verify` finds every kind of damage, all of it at once, and nothing in whole files."""

import struct

import numpy as np
import pytest

from megalith.data.indexed import verify as module
from megalith.data.indexed.builder import IndexedWriter
from megalith.data.indexed.sidecar import SideCar, TokenizerRecord, content_record, write_side_car
from megalith.data.indexed.verify import verify
from megalith.errors import DataError

from .corpus import make_pair, make_tokenizer

HEADER, ITEMS = 34, 4


def write(prefix, layout="mmap", eod=99, vocab_size=100):
    """Four documents of 10, 20, 30, 40 tokens, ids 0 … 98, each document ending with 99."""
    tokens = np.arange(100) % 99
    tokens[[9, 29, 59, 99]] = eod
    writer = IndexedWriter(prefix, np.int32, layout)
    writer.add_block(tokens, np.array([10, 20, 30, 40]))
    written = writer.finish()
    record = TokenizerRecord("GPT2BPETokenizer", "0" * 64, vocab_size, 99)
    write_side_car(
        prefix, SideCar(record, content_record(written), written.items, 4, 100, True, "megalith test")
    )
    return prefix


@pytest.fixture
def pair(tmp_path):
    return write(tmp_path / "x")


def patch(prefix, suffix, offset, data):
    path = prefix.with_name(prefix.name + suffix)
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def found(prefix, *words, **options):
    """The problems; every word must be in one of them."""
    problems = verify(prefix, **options).problems
    assert problems
    for word in words:
        assert any(word in problem for problem in problems), problems
    return problems


@pytest.mark.parametrize("layout", ["mmap", "cached"])
def test_whole_files(tmp_path, layout):
    report = verify(write(tmp_path / "x", layout))
    assert (report.problems, report.notes) == ([], [])
    assert (report.items, report.documents, report.tokens) == (4, 4, 100)


def test_a_real_pair_and_what_could_not_be_checked(real_data):
    report = verify(real_data("megatron-fixtures") / "meg-gpt2-openwebtext_text_document")
    assert report.problems == []
    assert len(report.notes) == 2


def test_progress_counts_the_tokens_bytes(pair, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_BYTES", 64)
    steps = []
    verify(pair, progress=steps.append)
    assert (sum(steps), len(steps)) == (400, 7)


@pytest.mark.parametrize("bit", [0, 5, 399])
def test_one_flipped_bit_in_the_tokens(pair, bit):
    data = bytearray(pair.with_name("x.bin").read_bytes())
    data[bit] ^= 1
    pair.with_name("x.bin").write_bytes(data)
    found(pair, "x.bin: its content is not what was written")


def test_every_flipped_byte_of_the_index_is_found(pair):
    whole = pair.with_name("x.idx").read_bytes()
    for place in range(len(whole)):
        patch(pair, ".idx", place, bytes([whole[place] ^ 0x55]))
        found(pair)
        pair.with_name("x.idx").write_bytes(whole)


def test_structure_is_found_without_a_side_car(pair):
    """Pointers, sizes and documents contradict each other; no hash is needed to see it."""
    pair.with_name("x.meta.json").unlink()
    offsets, documents = HEADER + 4 * ITEMS, HEADER + 12 * ITEMS
    cases = {
        (HEADER + 4, struct.pack("<i", -20)): ("1 items have a negative length; the first is item 1", "items are not where"),
        (HEADER + 4, struct.pack("<i", 21)): ("2 items are not where they should; the first is item 2", "truncated by 4 bytes"),
        (HEADER + 12, struct.pack("<i", 39)): ("4 bytes longer",),
        (offsets + 8, struct.pack("<q", 44)): ("1 items are not where they should; the first is item 1",),
        (documents, struct.pack("<q", 1)): ("begins with 1, not 0",),
        (documents + 16, struct.pack("<q", 0)): ("1 document boundaries lie before", "the first is document 1"),
        (documents + 32, struct.pack("<q", 9)): ("ends with 9, not 4",),
    }  # fmt: skip
    whole = pair.with_name("x.idx").read_bytes()
    for (offset, data), words in cases.items():
        patch(pair, ".idx", offset, data)
        found(pair, *words)
        pair.with_name("x.idx").write_bytes(whole)


def test_chunks_join(pair, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_ITEMS", 2)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 12)
    assert verify(pair).problems == []
    patch(pair, ".bin", 4 * 70, struct.pack("<i", 5000))
    patch(pair, ".idx", HEADER + 12 * ITEMS + 24, struct.pack("<q", 1))
    found(pair, "the first is in item 3", "the first is document 2")


@pytest.mark.parametrize(("token", "item"), [(100, 1), (-1, 2), (2**31 - 1, 0)])
def test_ids_outside_the_vocabulary(pair, token, item):
    patch(pair, ".bin", 4 * (10, 30, 0)[(1, 2, 0).index(item)], struct.pack("<i", token))
    found(pair, f"1 token ids are outside the vocabulary of 100; the first is in item {item}")


def test_a_vocabulary_size_may_be_given(pair):
    found(pair, "outside the vocabulary of 50", vocab_size=50)


def test_documents_that_do_not_end(tmp_path):
    prefix = write(tmp_path / "x", eod=7)
    assert verify(prefix).problems == [
        "4 documents do not end with the end-of-document id 99; the first is document 0"
    ]


def test_counts_that_differ_from_the_side_car(pair):
    text = pair.with_name("x.meta.json").read_text()
    pair.with_name("x.meta.json").write_text(text.replace('"tokens": 100', '"tokens": 90'))
    found(pair, "the side-car says 90 tokens, the files hold 100")


def test_everything_at_once(pair):
    patch(pair, ".bin", 0, struct.pack("<i", 5000))
    pair.with_name("x.bin").write_bytes(pair.with_name("x.bin").read_bytes()[:-3])
    patch(pair, ".idx", HEADER + 4, struct.pack("<i", -1))
    words = (
        "negative length",
        "not where they should",
        "outside the vocabulary",
        "x.bin: its content",
        "x.idx: its content",
    )
    assert len(found(pair, *words)) >= 5


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_half_a_pair_is_a_finding(pair, suffix):
    pair.with_name("x" + suffix).unlink()
    found(pair, f"x{suffix}: missing")


def test_a_damaged_side_car_is_a_finding(pair):
    pair.with_name("x.meta.json").write_text("{")
    found(pair, "damaged side-car")


def test_nothing_there_is_the_users_mistake(tmp_path):
    with pytest.raises(DataError, match="no such token files"):
        verify(tmp_path / "nothing")
    with pytest.raises(DataError, match="a folder"):
        verify(tmp_path)


def test_empty_files(tmp_path):
    IndexedWriter(tmp_path / "x", np.uint16).finish()
    assert verify(tmp_path / "x").problems == []


def test_files_made_with_a_tokenizer(tmp_path):
    make_tokenizer(tmp_path / "tokenizer")
    assert verify(make_pair(tmp_path / "x", tmp_path / "tokenizer")).problems == []
