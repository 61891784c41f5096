"""Batches are a function of the samples consumed: for any number of ranks, workers, batch sizes and restarts."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalith.data.loader import Loader, ordered
from megalith.data.masks import MaskOptions
from megalith.data.sampler import CyclicSampler
from megalith.data.schedule import BatchRampUp
from megalith.errors import ConfigError, DataError
from tests.data.corpus import random_lengths, run_data, tokens_of, write

WITHOUT_FIXTURE_CHECK = [HealthCheck.function_scoped_fixture]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("loader") / "a", random_lengths(0))
    return run_data(path, samples={"train": 1000, "validation": 1000}, splits_string="75,25,0")


def take(batches, count):
    found = [next(batches) for _ in range(count)]
    batches.close()
    return found


def rows_of(batches):
    return [
        row.tolist() for batch in batches for row in torch.cat([batch["tokens"], batch["targets"][:, -1:]], 1)
    ]


@given(
    consumed=st.integers(0, 300),
    size=st.integers(1, 6),
    ranks=st.integers(1, 3),
    workers=st.sampled_from([0, 1, 3]),
    count=st.integers(1, 6),
)
@settings(max_examples=40, deadline=None, suppress_health_check=WITHOUT_FIXTURE_CHECK)
def test_the_ranks_together_read_the_stream(data, consumed, size, ranks, workers, count):
    schedule = BatchRampUp.constant(size * ranks)
    shares = [
        take(
            Loader(data.train, data_rank=r, data_size=ranks, workers=workers).training(
                schedule, consumed=consumed
            ),
            count,
        )
        for r in range(ranks)
    ]
    together = [shares[r][step] for step in range(count) for r in range(ranks)]
    numbers = range(consumed, consumed + size * ranks * count)
    assert rows_of(together) == tokens_of(data.train, numbers)
    assert torch.cat([batch["sample"] for batch in together]).tolist() == list(numbers)


@given(
    stops=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    ramp=st.sampled_from([[2, 2, 30], [4, 4, 60], [8, 1, 0]]),
)
@settings(max_examples=20, deadline=None, suppress_health_check=WITHOUT_FIXTURE_CHECK)
def test_resuming_anywhere_gives_the_same_stream(data, stops, ramp):
    schedule = BatchRampUp.from_config(ramp, 8)
    loader = Loader(data.train)
    whole = take(loader.training(schedule), sum(stops))
    pieces, consumed = [], 0
    for stop in stops:
        part = take(loader.training(schedule, consumed=consumed), stop)
        consumed += sum(len(batch["tokens"]) for batch in part)
        pieces += part
    assert [len(batch["tokens"]) for batch in pieces] == [len(batch["tokens"]) for batch in whole]
    assert rows_of(pieces) == rows_of(whole)


def test_another_batch_size_from_a_resume_on(data):
    before = take(Loader(data.train).training(BatchRampUp.constant(4)), 3)
    after = take(Loader(data.train).training(BatchRampUp.constant(6), consumed=12), 3)
    assert rows_of(before + after) == tokens_of(data.train, range(30))


def test_what_a_batch_holds(data):
    masks = MaskOptions(eod=3, reset_positions=True, reset_attention=True, mask_loss=True)
    (batch,) = take(Loader(data.train, masks).training(BatchRampUp.constant(4)), 1)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()} == {
        "tokens": (torch.int64, (4, 8)),
        "targets": (torch.int64, (4, 8)),
        "positions": (torch.int64, (4, 8)),
        "documents": (torch.int32, (4, 8)),
        "sample": (torch.int64, (4,)),
    }


def test_it_ends_with_the_last_whole_batch(data):
    batches = list(Loader(data.train).training(BatchRampUp.constant(8), consumed=8, end=30))
    assert [batch["sample"].tolist() for batch in batches] == [list(range(8, 16)), list(range(16, 24))]


# ---- validation ----


def test_validation_is_the_same_every_time(data):
    loader = Loader(data.validation)
    positions = loader.evaluation_positions(3, 2)
    first, second = (rows_of(loader.read(positions)) for _ in range(2))
    assert first == second == tokens_of(data.validation, range(6))


@pytest.mark.parametrize("ranks", [1, 2])
def test_validation_reads_each_sample_at_most_once(data, ranks):
    once, size = data.validation.once, 4
    assert once % size, "this test wants a rest"
    notices: list[str] = []
    seen, counted = [], 0
    for rank in range(ranks):
        loader = Loader(data.validation, data_rank=rank, data_size=ranks)
        positions = loader.evaluation_positions(100, size, drop_last=False, notice=notices.append)
        for batch in loader.read(positions):
            assert len(batch["tokens"]) == size // ranks, "all ranks bring equal shapes"
            seen += batch["sample"].tolist()
            counted += int((batch["targets"] >= 0).sum())
            assert bool((batch["targets"][batch["sample"] < 0] == -1).all())
    assert sorted(s for s in seen if s >= 0) == list(range(once))
    assert counted == once * 8
    assert f"{once} samples make {-(-once // size)} batches of 4, not 100" in notices[0]
    dropped = Loader(data.validation).evaluation_positions(100, size)
    assert len(dropped) == once // size


def test_less_than_one_batch_is_still_validated(data):
    (positions,) = Loader(data.validation).evaluation_positions(5, 64)
    assert sorted(positions[positions >= 0].tolist()) == list(range(data.validation.once))


def test_a_megatron_validation_is_as_long_as_planned(tmp_path):
    path = write(tmp_path / "a", random_lengths(0))
    stream = run_data(path, samples=20, order="megatron").train
    assert len(Loader(stream).evaluation_positions(5, 4)) == 5
    assert len(Loader(stream).evaluation_positions(6, 4)) == 5


# ---- errors ----


def test_an_id_outside_the_vocabulary(data):
    with pytest.raises(DataError, match=r"a: holds token id \d+; the vocabulary ends at 999"):
        take(Loader(data.train, vocab_size=1000).training(BatchRampUp.constant(4)), 1)
    take(Loader(data.train, vocab_size=10**6).training(BatchRampUp.constant(4)), 1)


def test_cyclic(tmp_path):
    path = write(tmp_path / "a", random_lengths(0))
    stream = run_data(path, order="megatron", dataloader_type="cyclic", samples=25).train
    sampler = CyclicSampler(stream.plan.cycle, 2, 1)
    loader = Loader(stream, sampler=sampler)
    batches = take(loader.training(BatchRampUp.constant(4)), 20)
    numbers = sampler.numbers(np.arange(80))
    assert rows_of(batches) == tokens_of(stream, numbers)
    assert torch.cat([batch["sample"] for batch in batches]).tolist() == list(range(80)), (
        "dropout keys differ by round"
    )
    with pytest.raises(ConfigError, match="whole micro-batches"):
        take(loader.training(BatchRampUp.constant(4), consumed=3), 1)


# ---- threads ----


def loader_threads():
    return [t for t in threading.enumerate() if t.name.startswith("loader")]


def test_work_is_ordered_and_ahead():
    started = []

    def work(i):
        started.append(i)
        time.sleep(0.01 if i % 2 else 0)
        return i

    batches = ordered(work, iter(range(20)), 3)
    assert next(batches) == 0
    time.sleep(0.1)
    assert 3 < len(started) < 12, "some ahead, not everything"
    assert list(batches) == list(range(1, 20))


@pytest.mark.parametrize("how", ["close", "drop", "break", "exception in work", "exception in consumer"])
def test_threads_end_with_the_loop(data, how):
    def work(i):
        if how == "exception in work" and i == 5:
            raise RuntimeError("no")
        return i

    def consume():
        batches = ordered(work, iter(range(1000)), 2)
        for i in batches:
            if i == 3 and how == "close":
                batches.close()
                return
            if i == 3 and how == "exception in consumer":
                raise RuntimeError("no")
            if i == 3 and how in ("break", "drop"):
                break
        if how == "drop":
            del batches

    if how.startswith("exception"):
        with pytest.raises(RuntimeError, match="no"):
            consume()
    else:
        consume()
    gc.collect()
    assert loader_threads() == []


INTERRUPTED = """
import sys, time
from tests.data.corpus import run_data
from megalith.data.loader import Loader
from megalith.data.schedule import BatchRampUp
for batch in Loader(run_data(sys.argv[1]).train, workers=2).training(BatchRampUp.constant(4)):
    print("batch", flush=True)
    time.sleep(0.05)
"""


def test_ctrl_c_ends_the_process_at_once(tmp_path):
    path = write(tmp_path / "a", random_lengths(0))
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background ignores SIGINT, and its children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "batch\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert error.strip().endswith("KeyboardInterrupt")
    assert "Exception ignored" not in error
