"""Pickle files that are cut short, have a bit turned over, or are mutated: a `CheckpointError`, never anything else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megalith.checkpoint.pickles.distributed import open_distributed
from megalith.checkpoint.pickles.reader import open_pickle
from megalith.checkpoint.pickles.scan import scan
from megalith.errors import CheckpointError

from .pickle_corpus import CANARY, kinds
from .pickle_fuzz import fuzz, tensors_in

MUTATIONS = int(os.environ.get("MEGALITH_FUZZ", "300"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return kinds(folder)


@pytest.mark.parametrize("name", ["new.pt", "old.pt", "plain.pkl"])
def test_cut_short_anywhere(whole, tmp_path, name):
    content, path = whole[name].read_bytes(), tmp_path / name
    for length in (*range(40), *range(40, len(content), 1 + len(content) // 150), len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="fix: "):
            open_pickle(path)
        scan(path)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_distributed_folder_cut_short_anywhere(whole, tmp_path, name):
    files = {file.name: file.read_bytes() for file in whole["sharded"].iterdir()}
    for each, content in files.items():
        (tmp_path / each).write_bytes(content)
    for length in range(0, len(files[name]), 1 + len(files[name]) // 60):
        (tmp_path / name).write_bytes(files[name][:length])
        with pytest.raises(CheckpointError, match="fix: "):
            dict(open_distributed(tmp_path).objects)
        scan(tmp_path)


@pytest.mark.parametrize("name", ["new.pt", "old.pt", "plain.pkl"])
def test_a_bit_turned_over_anywhere(whole, tmp_path, name):
    """The content of tensors has no checksum that is looked at; everything else is read, or refused."""
    content, path = whole[name].read_bytes(), tmp_path / name
    refused = 0
    for bit in range(0, 8 * len(content), 1 + 8 * len(content) // 300):
        broken = bytearray(content)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        scan(path)
        try:
            for tensor in tensors_in(open_pickle(path).content):
                tensor.read()
        except CheckpointError:
            refused += 1
    assert refused > 30


def test_a_file_that_shrinks_after_it_was_opened(whole, tmp_path):
    content, path = whole["new.pt"].read_bytes(), tmp_path / "x.pt"
    path.write_bytes(content)
    tensor = open_pickle(path).content["model"]["weight"]
    path.write_bytes(content[:100])
    with pytest.raises(EOFError):
        tensor.read()


def test_mutations(tmp_path, monkeypatch):
    """`MEGALITH_FUZZ` of them: 300 here, 10,000 in `make fuzz`."""
    monkeypatch.chdir(tmp_path)
    outcome = fuzz(tmp_path, MUTATIONS)
    print(outcome)
    assert outcome.read + outcome.refused == MUTATIONS
    assert min(outcome.read, outcome.refused) > 0
    assert outcome.slowest < 5
    assert outcome.grown < 200 << 20
    assert not list(Path(tmp_path).rglob(CANARY))
