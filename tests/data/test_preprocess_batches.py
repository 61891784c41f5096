"""Files cut into batches: every line exactly once, wherever the borders fall."""

from __future__ import annotations

from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.data.preprocess.batches import LineReader, PlainFile, Span, memory_batches
from megalith.errors import DataError


def lines_of(reader: LineReader, file: PlainFile, start: int, stop: int, data: bytes) -> list[bytes]:
    found = []
    for item in reader.batches(file, start, stop):
        if isinstance(item, Span):
            found.append(data[item.start : item.end])
        else:
            found += bytes(item).removesuffix(b"\n").split(b"\n")
    return found


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 40), max_size=12),
    st.integers(1, 60),
    st.integers(1, 30),
    st.integers(1, 30),
    st.booleans(),
)
def test_every_line_once(tmp_path_factory, lengths, block, batch, record, ends):
    lines = [bytes([97 + number % 26]) * length for number, length in enumerate(lengths)]
    data = b"\n".join(lines) + (b"\n" if ends else b"")
    path = tmp_path_factory.mktemp("lines") / "x"
    path.write_bytes(data)
    expected = data.removesuffix(b"\n").split(b"\n") if data else []
    reader = LineReader(batch_bytes=batch, record_bytes=record)
    with closing(PlainFile(str(path))) as file:
        found = [
            line
            for start in range(0, len(data), block)
            for line in lines_of(reader, file, start, start + block, data)
        ]
    assert found == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 60), st.integers(1, 30))
def test_whether_a_record_is_long_depends_on_its_length_alone(tmp_path_factory, lengths, block, batch):
    data = b"\n".join(b"x" * length for length in lengths) + b"\n"
    path = tmp_path_factory.mktemp("lines") / "x"
    path.write_bytes(data)
    reader = LineReader(batch_bytes=batch, record_bytes=20)
    spans = []
    with closing(PlainFile(str(path))) as file:
        for start in range(0, len(data), block):
            for item in reader.batches(file, start, start + block):
                spans += [item.end - item.start] if isinstance(item, Span) else []
    assert spans == [length for length in lengths if length > 20]


@pytest.mark.parametrize("batch", [1, 3, 7, 100])
def test_memory_batches(batch):
    data = b"one\n\nthree is longer\nfour"
    batches = [bytes(view) for view in memory_batches(memoryview(data), batch)]
    assert b"".join(batches) == data
    assert all(part.endswith(b"\n") for part in batches[:-1])


def test_a_file_that_shrinks_is_an_error(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"line\n" * 100)
    with closing(PlainFile(str(path))) as file:
        path.write_bytes(b"line\n" * 10)
        with pytest.raises(DataError, match="shorter"):
            list(LineReader().batches(file, 0, 500))
