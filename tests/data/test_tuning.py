"""Batches of tuning samples: order, padding, shares, resuming; two passes are equal."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from megalith.data.schedule import BatchRampUp
from megalith.data.tuning import (
    Padding,
    Rounds,
    TuningLoader,
    fingerprint,
    in_file_order,
    refuse_changes,
    state_of,
)
from megalith.data.tuning_samples import Maker, Rules
from megalith.data.tuning_tasks import tagged
from megalith.errors import ConfigError
from megalith.tokenizers.train import TrainingOptions, train_bpe

COUNT, SEED = 11, 5


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["one two three four five six seven eight " * 20], TrainingOptions(vocab_size=290))


def samples_of(tokenizer, tmp_path, count=COUNT, start=None):
    words = ["one", "two", "three", "four", "five", "six", "seven"]
    rows = [
        {"prompt_tag": "ab"[i % 2], "text": " ".join(words[: 1 + i % 5]), "answer": f" {words[i % 7]}"} for i in range(count)
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [tagged("a", 2, answer_only=True).at(290), tagged("b", 2, answer_only=True).at(292)]
    return Maker(tokenizer, tasks, Rules(64, eos=tokenizer.eod, start=start)).read([str(path)], training=True)


def loader(samples, *, rank=0, size=1, order=None, padding=None):
    return TuningLoader(
        samples, order or Rounds(len(samples), SEED), padding or Padding(0), data_rank=rank, data_size=size
    )


def taken(batches):
    return [{name: tensor.clone() for name, tensor in batch.items()} for batch in batches]


def same(one, two):
    assert len(one) == len(two)
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_round_is_a_permutation_and_the_next_is_another(tokenizer):
    order = Rounds(COUNT, SEED)
    first, second = (order.numbers(np.arange(COUNT * k, COUNT * (k + 1))).tolist() for k in (0, 1))
    assert sorted(first) == sorted(second) == list(range(COUNT))
    assert first != second != list(range(COUNT))
    across = order.numbers(np.arange(COUNT - 2, COUNT + 2)).tolist()
    assert across == [*first[-2:], *second[:2]]
    assert Rounds(COUNT, SEED + 1).numbers(np.arange(COUNT)).tolist() != first


def test_rounds_that_are_forgotten_while_another_thread_adds_one():
    order = Rounds(COUNT, SEED)

    class Number(int):
        """Between its turn and the next one another thread is at work."""

        def __sub__(self, other: int) -> int:
            order._kept[77] = np.arange(COUNT)
            return int(self) - other

    order._kept.update({Number(number): np.arange(COUNT) for number in range(3)})
    assert sorted(order.numbers(np.arange(9 * COUNT, 10 * COUNT)).tolist()) == list(range(COUNT))
    assert {*order._kept} == {9, 77}


def test_every_sample_of_a_round_is_in_a_batch(tokenizer, tmp_path):
    samples = samples_of(tokenizer, tmp_path)
    batches = list(loader(samples).training(BatchRampUp.constant(4), consumed=0, end=44))
    assert [batch["sample"].tolist()[0] for batch in batches] == list(range(0, 44, 4))
    numbers = Rounds(COUNT, SEED).numbers(np.concatenate([batch["sample"].numpy() for batch in batches]))
    assert np.bincount(numbers).tolist() == [4] * COUNT


def test_a_batch_holds_what_the_model_reads_and_predicts(tokenizer, tmp_path):
    samples = samples_of(tokenizer, tmp_path)
    (batch,) = loader(samples, order=in_file_order()).evaluation(1, 4)()
    assert set(batch) == {"tokens", "targets", "sample"}
    assert batch["tokens"].shape[1] % 8 == 0
    for i, sample in enumerate(samples.samples[:4]):
        read, length = batch["tokens"][i], len(sample.tokens)
        assert read[: length - 1].tolist() == sample.tokens[:-1].tolist()
        assert not read[length - 1 :].any()
        wanted = np.where(sample.scored[1:], sample.tokens[1:], -1)
        assert batch["targets"][i, : length - 1].tolist() == wanted.tolist()
        assert (batch["targets"][i, length - 1 :] == -1).all()
        assert read[0] == 290 + 2 * (i % 2)


def test_the_last_virtual_token_predicts_the_first_of_the_text(tokenizer, tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"prompt_tag": "a", "text": "one", "answer": " two"}) + "\n")
    task = tagged("a", 3, answer_only=False).at(290)
    samples = Maker(tokenizer, [task], Rules(64)).read([str(path)], training=True)
    (batch,) = loader(samples).evaluation(1, 1)()
    targets = batch["targets"][0].tolist()
    assert targets[:2] == [-1, -1]
    assert targets[2] == tokenizer.encode("one")[0]


def test_two_sides(tokenizer, tmp_path):
    samples = samples_of(tokenizer, tmp_path, start=(3,))
    (batch,) = loader(samples, order=in_file_order()).evaluation(1, 3)()
    assert set(batch) == {"tokens", "targets", "lengths", "encoder_tokens", "encoder_lengths", "sample"}
    for i, sample in enumerate(samples.samples[:3]):
        assert batch["encoder_tokens"][i, : batch["encoder_lengths"][i]].tolist() == sample.encoder.tolist()
        assert batch["tokens"][i, : batch["lengths"][i]].tolist() == sample.tokens[:-1].tolist()
        assert batch["tokens"][i, 0] == 3


def test_two_passes_are_equal(tokenizer, tmp_path):
    """NeMo 1.7 filled up the stored rows themselves, and from the second pass on took the filling for text."""
    samples = samples_of(tokenizer, tmp_path)
    before = fingerprint(samples)
    start = loader(samples, order=in_file_order()).evaluation(9, 4)
    same(taken(start()), taken(start()))
    train = loader(samples)
    same(*(taken(train.training(BatchRampUp.constant(4), consumed=0, end=3 * COUNT)) for _ in range(2)))
    assert fingerprint(samples) == before
    counted = {int((batch["targets"] >= 0).sum()) for batch in start()}
    assert 0 < max(counted) < 20, "answers and ends, no filling"


def test_a_run_goes_on_anywhere(tokenizer, tmp_path):
    samples = samples_of(tokenizer, tmp_path)
    whole = taken(loader(samples).training(BatchRampUp.constant(3), consumed=0, end=36))
    rest = taken(loader(samples).training(BatchRampUp.constant(3), consumed=15, end=36))
    same(whole[5:], rest)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_share_a_batch_and_pad_it_alike(tokenizer, tmp_path, size):
    samples = samples_of(tokenizer, tmp_path)
    whole = taken(loader(samples).training(BatchRampUp.constant(8), consumed=0, end=32))
    parts = [
        taken(loader(samples, rank=r, size=size).training(BatchRampUp.constant(8), consumed=0, end=32))
        for r in range(size)
    ]
    joined = [
        {name: torch.cat([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    same(whole, joined)


def test_a_validation_reads_each_sample_once_and_fills_up(tokenizer, tmp_path):
    samples = samples_of(tokenizer, tmp_path)
    batches = list(loader(samples, order=in_file_order()).evaluation(50, 8)())
    assert [batch["sample"].tolist() for batch in batches] == [list(range(8)), [8, 9, 10, *[-1] * 5]]
    assert (batches[1]["targets"][3:] == -1).all()
    total = sum(int((batch["targets"] >= 0).sum()) for batch in batches)
    assert total == sum(int(sample.scored[1:].sum()) for sample in samples.samples)
    (small,) = loader(samples_of(tokenizer, tmp_path, 3), order=in_file_order()).evaluation(1, 8)()
    assert small["sample"].tolist() == [0, 1, 2, *[-1] * 5], "a file smaller than a batch"


def test_threads_change_nothing(tokenizer, tmp_path):
    samples = samples_of(tokenizer, tmp_path)
    ahead = TuningLoader(samples, Rounds(COUNT, SEED), Padding(0), workers=3)
    schedule = BatchRampUp.constant(2)
    same(
        taken(loader(samples).training(schedule, consumed=0, end=40)),
        taken(ahead.training(schedule, consumed=0, end=40)),
    )


def test_lengths_that_the_layout_needs(tokenizer, tmp_path):
    padding = Padding(0, unit=6, roomy=24, limit=20)
    assert [padding.length(n) for n in (1, 6, 7, 13)] == [6, 6, 12, 18]
    assert Padding(0, unit=6, roomy=24).length(7) == 24
    with pytest.raises(ConfigError, match=r"19 tokens cannot be filled up to a multiple of 6 within 20"):
        padding.length(19)
    with pytest.raises(ConfigError, match="max_seq_length"):
        loader(samples_of(tokenizer, tmp_path), padding=Padding(0, unit=64, roomy=64, limit=32))


def test_other_samples_or_another_order_cannot_go_on(tokenizer, tmp_path):
    before = json.loads(json.dumps(state_of(samples_of(tokenizer, tmp_path), seed=SEED, length=64)))
    refuse_changes(before, state_of(samples_of(tokenizer, tmp_path), seed=SEED, length=32))
    with pytest.raises(ConfigError) as caught:
        refuse_changes(before, state_of(samples_of(tokenizer, tmp_path, 10), seed=9, length=64))
    assert "model.seed" in str(caught.value)
    assert "11 then, 10 now" in str(caught.value)
