"""Small token files in which every token says where it is: token = 1000 · item + place."""

from __future__ import annotations

import numpy as np

from megalith.data.build import Request, open_run_data
from megalith.data.config import DataConfig
from megalith.data.indexed.builder import IndexedWriter


def write(path, lengths, *, first=0):
    """A file whose item i holds tokens 1000 · (first + i) + 0, 1, 2, …; → its path as text."""
    tokens = [1000 * (first + i) + np.arange(length) for i, length in enumerate(lengths)]
    with IndexedWriter(path, np.int32) as writer:
        writer.add_block(np.concatenate(tokens).astype(np.int32), np.array(lengths))
    return str(path)


def random_lengths(seed, items=30, longest=20):
    return np.random.default_rng(seed).integers(1, longest, items).tolist()


def run_data(prefix, *, samples=50, seq_length=8, seed=1, request=None, **config):
    """Train on all of the files (other splits by `samples` as a dict)."""
    samples = samples if isinstance(samples, dict) else {"train": samples}
    config = {"splits_string": "1,0,0", **config}
    wanted = Request(seq_length=seq_length, seed=seed, samples=samples, **(request or {}))
    return open_run_data(DataConfig(data_prefix=prefix, **config), wanted)


def tokens_of(stream, numbers):
    return [row.tolist() for row in stream.read(np.asarray(list(numbers), dtype=np.int64))]
