"""From the section to the streams: splits, separate files, real files, and every error that a user's data can cause."""

from __future__ import annotations

import numpy as np
import pytest

from megalith.data.build import Request, open_run_data, requested_samples
from megalith.data.config import DataConfig
from megalith.data.indexed.builder import IndexedWriter
from megalith.data.indexed.sidecar import SideCar, TokenizerRecord, content_record, write_side_car
from megalith.data.schedule import BatchRampUp
from megalith.data.sources import Vocabulary
from megalith.errors import ConfigError, DataError
from tests.data.corpus import random_lengths, run_data, tokens_of, write

MINE = Vocabulary("GPT2BPETokenizer", "1" * 64, 50257, 50256)


def write_with_side_car(path, *, tokenizer="1" * 64, append_eod=True, **config):
    writer = IndexedWriter(path, np.uint16)
    writer.add_block(np.arange(200, dtype=np.uint16), np.full(10, 20))
    written = writer.finish()
    record = TokenizerRecord("GPT2BPETokenizer", tokenizer, 50257, 50256, config)
    write_side_car(path, SideCar(record, content_record(written), 10, 10, 200, append_eod, "a test"))
    return str(path)


def fails(kind, prefix, **options):
    with pytest.raises(kind) as caught:
        run_data(prefix, **options)
    return str(caught.value)


# ---- splits ----


@pytest.mark.parametrize("order", ["native", "megatron"])
def test_splits_share_no_document(tmp_path, order):
    path = write(tmp_path / "a", [20] * 20)
    data = run_data(
        path, samples=dict.fromkeys(("train", "validation", "test"), 40), splits_string="14,4,2", order=order
    )
    read = {
        split: {token // 1000 for row in tokens_of(stream, range(40)) for token in row}
        for split, stream in data.streams.items()
    }
    assert read == {"train": set(range(14)), "validation": set(range(14, 18)), "test": {18, 19}}


def test_separate_files(tmp_path):
    paths = [write(tmp_path / name, random_lengths(i), first=100 * i) for i, name in enumerate("abc")]
    config = DataConfig(train_data_path=[0.5, paths[0], 0.5, paths[1]], valid_data_path=paths[2])
    data = open_run_data(config, Request(seq_length=8, seed=1, samples={"train": 30, "validation": 5}))
    assert {t // 100_000 for row in tokens_of(data.train, range(30)) for t in row} == {0, 1}
    assert {t // 100_000 for row in tokens_of(data.validation, range(5)) for t in row} == {2}
    assert data.test is None
    assert set(data.state()) == {"train", "validation"}
    with pytest.raises(DataError, match=r"test_data_path: the run needs test data and none is named"):
        open_run_data(config, Request(seq_length=8, seed=1, samples={"train": 30, "test": 1}))


def test_only_what_is_asked_for_is_opened(tmp_path):
    config = DataConfig(
        train_data_path=write(tmp_path / "a", [50]), valid_data_path=str(tmp_path / "missing")
    )
    data = open_run_data(config, Request(seq_length=8, seed=1, samples={"train": 5, "validation": 0}))
    assert list(data.streams) == ["train"]


def test_a_plan_that_is_not_read_now_is_kept(tmp_path):
    path = write(tmp_path / "a", random_lengths(0))
    data = run_data(path, samples={"train": 5, "validation": 3}, splits_string="8,2,0")
    again = run_data(
        path, samples={"train": 5}, splits_string="8,2,0", request={"stored": data.state(), "consumed": 2}
    )
    assert again.state() == data.state()


def test_summary(tmp_path):
    path = write(tmp_path / "a", [40] * 10)
    (line,) = run_data(path, samples=98, splits_string="1,0,0").summary()
    assert "documents 0 to 10 of 10, 400 tokens, 49 samples, 2 epochs" in line
    *_, line = run_data(path, samples={"train": 9, "validation": 98}, splits_string="1,1,0").summary()
    assert line.startswith("validation")
    assert "epochs" not in line


def test_samples_that_a_run_asks_for():
    wanted = requested_samples(
        BatchRampUp.from_config([2, 2, 8], 4),
        max_steps=10,
        val_check_interval=3,
        limit_val_batches=5,
        limit_test_batches=2,
    )
    assert wanted == {"train": 2 * 4 + 4 * 6, "validation": (10 // 3 + 1) * 5 * 4, "test": 8}
    assert requested_samples(
        BatchRampUp.constant(4), max_steps=10, val_check_interval=0, limit_val_batches=5
    ) == {
        "train": 40,
        "validation": 0,
        "test": 0,
    }


# ---- a real file ----


@pytest.mark.parametrize("order", ["native", "megatron"])
def test_openwebtext(real_data, order):
    path = str(real_data("megatron-fixtures") / "meg-gpt2-openwebtext_text_document")
    data = run_data(
        path, samples={"train": 2000, "validation": 10}, seq_length=512, splits_string="949,50,1", order=order
    )
    plan = data.train.plan
    assert (plan.sources[0].items, plan.sources[0].tokens) == (1000, 1_361_845)
    assert plan.sources[0].last == 949
    rows = data.train.read(np.arange(2000))
    assert rows.shape == (2000, 513)
    assert rows.max() < 5000
    seen = set()
    for i in range(data.train.once if order == "native" else 2000):
        seen.update(piece.item for piece in data.train.provenance(i).pieces)
    assert seen <= set(range(949))
    assert len(seen) >= (940 if order == "native" else 850), "an epoch, but for its rest; 2000 samples of two"


# ---- errors ----


def test_a_missing_file(tmp_path):
    write(tmp_path / "corpus_text_document", [20])
    assert "corpus_text_document" in fails(DataError, str(tmp_path / "corpus_text_documnet"))


def test_less_than_one_sample(tmp_path):
    path = write(tmp_path / "a", [3, 4])
    said = fails(DataError, path)
    assert "the 2 documents of train hold 7 tokens; one sample needs 9" in said
    assert "model.encoder_seq_length=6 or less" in said
    assert run_data(path, order="megatron").train[0].shape == (9,), "Megatron repeats what there is"


def test_no_tokens_at_all(tmp_path):
    assert "hold 0 tokens" in fails(DataError, write(tmp_path / "a", [0, 0]), order="megatron")


def test_an_empty_split(tmp_path):
    path = write(tmp_path / "a", [20] * 10)
    said = fails(DataError, path, samples={"train": 1, "validation": 1}, splits_string="969,30,1")
    assert "splits_string 969,30,1 gives validation none of the 10 documents" in said
    assert "trainer.limit_val_batches=0" in said


def test_a_blend_goes_without_sources_that_have_no_validation(tmp_path):
    small, large = write(tmp_path / "small", [20] * 3), write(tmp_path / "large", [20] * 100, first=200)
    notices: list[str] = []
    data = run_data(
        [0.5, small, 0.5, large],
        samples={"train": 10, "validation": 5},
        splits_string="95,5,0",
        request={"notice": notices.append},
    )
    assert [source.path for source in data.validation.plan.sources] == [large]
    assert data.validation.plan.segments[0].members[0].weight == 1
    assert "left out of the validation data" in notices[0]
    assert "large" in fails(DataError, [0.5, small, 0.5, large], samples={"train": 10}, splits_string="0,1,0")


def test_another_tokenizer(tmp_path):
    good = write_with_side_car(tmp_path / "good")
    run_data(good, request={"vocabulary": MINE})
    bad = write_with_side_car(tmp_path / "bad", tokenizer="2" * 64, vocab_file="/v.json")
    said = fails(DataError, bad, request={"vocabulary": MINE})
    assert "made with another tokenizer: GPT2BPETokenizer with 50257 tokens (222222222222)" in said
    assert "model.tokenizer.vocab_file=/v.json" in said
    assert "delete bad.meta.json" in said
    (tmp_path / "bad.meta.json").unlink()
    run_data(bad, request={"vocabulary": MINE})


@pytest.mark.parametrize("key", ["eod_mask_loss", "reset_position_ids", "reset_attention_mask"])
def test_documents_without_an_end(tmp_path, key):
    path = write_with_side_car(tmp_path / "a", append_eod=False)
    run_data(path)
    assert "--append-eod" in fails(DataError, path, **{key: True})


def test_two_lengths(tmp_path):
    path = write(tmp_path / "a", [50])
    assert run_data(path, seq_length=8).train.plan.seq_length == 8
    with pytest.raises(ConfigError, match=r"data\.seq_length: 16 differs from model\.encoder_seq_length 8"):
        open_run_data(
            DataConfig(data_prefix=path, seq_length=16), Request(seq_length=8, seed=1, samples={"train": 1})
        )


def test_warm_up_reads_the_file(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr("megalith.data.sources.read_through", lambda path: read.append(path.name))
    run_data(write(tmp_path / "a", [50]))
    assert read == []
    run_data(str(tmp_path / "a"), skip_warmup=False)
    assert read == ["a.bin"]
