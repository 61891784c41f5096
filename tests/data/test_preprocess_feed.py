"""Streamed files cut into slots and spill files: the same records wherever the cuts fall, from any place on."""

from __future__ import annotations

import gzip
import re
import time
from contextlib import closing

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megalith.data.preprocess.feed import Feed, Position
from megalith.data.preprocess.parse import Paragraphs, TextLines
from megalith.data.preprocess.sources import find_sources
from megalith.data.preprocess.wire import SharedMemory

PIECES = st.lists(
    st.sampled_from(
        ["a", "word", "a longer line of words", "\n", "\n\n", "\n \n", "\r\n", "\t\n", " ", "é" * 9]
    ),
    max_size=30,
)


def records(path, folder, unit, block_bytes, slot_bytes, position=Position()):  # noqa: B008
    """(documents, borders) of a streamed text file, as a worker would find them."""
    shared = SharedMemory(1, np.dtype("<u2"), 64, 2, slot_bytes)
    feed = Feed(
        find_sources([str(path)]),
        unit,
        position=position,
        block_bytes=block_bytes,
        shared=shared,
        input_slots=2,
        folder=folder,
    )
    found, borders = [], []
    parser = Paragraphs() if unit == "paragraph" else TextLines()
    with closing(feed):
        while not feed.finished:
            job = feed.next()
            if job is None:
                time.sleep(0.0001)
                continue
            if job.spill:
                with open(job.spill, "rb") as file:
                    found.append(file.read().rstrip(b"\r\n"))
            else:
                found += parser.parse(shared.input(job.slot)[: job.length]).columns[0]
            borders.append(Position(job.source + 1) if job.last else Position(job.source, job.stop))
            feed.release(job)
    return [document for document in found if document.strip()], borders


@example(["a longer line of words", "\n", "\n \n", "a longer line of words"], 1, 24, "paragraph")
@settings(max_examples=120, deadline=None)
@given(PIECES, st.integers(1, 40), st.integers(24, 60), st.sampled_from(["line", "paragraph"]))
def test_records_do_not_depend_on_the_cuts(tmp_path_factory, pieces, block_bytes, slot_bytes, unit):
    folder = tmp_path_factory.mktemp("feed")
    text = "x" + "".join(pieces)
    path = folder / "t.txt.gz"
    path.write_bytes(gzip.compress(text.encode()))
    if unit == "line":
        expected = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    else:
        expected = [part.rstrip("\r\n") for part in re.split(r"\n(?:[ \t\r]*\n)+", text) if part.strip()]
    found, borders = records(path, folder, unit, block_bytes, slot_bytes)
    assert found == [document.encode() for document in expected]
    assert not list(folder.glob("spill-*"))
    middle = borders[len(borders) // 2]
    rest, _ = records(path, folder, unit, block_bytes, slot_bytes, middle)
    assert rest == found[len(found) - len(rest) :]
    assert (middle.source == 1) <= (rest == [])


@pytest.mark.parametrize("size", [0, 1, 23, 24, 25, 100])
def test_a_slot_exactly_filled(tmp_path, size):
    path = tmp_path / "t.txt.gz"
    path.write_bytes(gzip.compress(b"y" * size))
    found, borders = records(path, tmp_path, "line", 8, 24)
    assert found == ([b"y" * size] if size else [])
    assert borders[-1] == Position(1)


def test_closing_in_the_middle_of_an_endless_record(tmp_path):
    """A line that unpacks to more than anyone wants can be stopped, and leaves nothing on the disk."""
    path = tmp_path / "t.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(bytes(1 << 20))
    shared = SharedMemory(1, np.dtype("<u2"), 64, 2, 1 << 12)
    feed = Feed(
        find_sources([str(path)]),
        "line",
        position=Position(),
        block_bytes=1 << 12,
        shared=shared,
        input_slots=2,
        folder=tmp_path,
    )
    while not list(tmp_path.glob("spill-*")):
        time.sleep(0.001)
    feed.close()
    assert not list(tmp_path.glob("spill-*"))
