"""Rows of BERT, T5 and BART through plans, blends and loaders: functions of the samples consumed, and of nothing else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from megalith.data import cache
from megalith.data.loader import Loader
from megalith.data.plan import DataPlan
from megalith.data.sampler import CyclicSampler
from megalith.data.schedule import BatchRampUp
from megalith.data.sentence_index import megatron_groups
from megalith.errors import ConfigError, DataError
from tests.data import corpus
from tests.data.sentences import BOS, random_documents, run_data, token_ids, write_sentences
from tests.data.test_masked import restored

KINDS = ["bert", "t5", "bart"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_sentences(tmp_path_factory.mktemp("sentences") / "a", random_documents(0))[0]


def rows(loader, schedule, count, consumed=0):
    batches = loader.training(schedule, consumed=consumed)
    found = list(itertools.islice(batches, count))
    batches.close()
    return [{name: tensor[i].tolist() for name, tensor in batch.items()} for batch in found
            for i in range(len(batch["tokens"]))]  # fmt: skip


@pytest.mark.parametrize("order", ["native", "megatron"])
@pytest.mark.parametrize("kind", [*KINDS, "t5_prefix_lm"])
def test_layouts_do_not_matter(path, tmp_path, kind, order):
    if kind == "t5_prefix_lm":
        path = corpus.write(tmp_path / "a", corpus.random_lengths(0))
    extra = {"seq_length_dec": 16} if kind.startswith("t5") else {}
    data, masks = run_data(kind, path, order=order, samples=48, **extra)
    plain = rows(Loader(data.train, masks), BatchRampUp.constant(4), 12)
    assert [row["sample"] for row in plain] == list(range(48))
    again, other = run_data(kind, path, order=order, samples=48, **extra)
    assert rows(Loader(again.train, other, workers=0), BatchRampUp.constant(12), 4) == plain
    shares = [
        rows(Loader(data.train, masks, data_rank=r, data_size=3, workers=3), BatchRampUp.constant(12), 4)
        for r in range(3)
    ]
    together = [row for step in range(4) for share in shares for row in share[4 * step : 4 * step + 4]]
    assert together == plain
    resumed, _ = run_data(kind, path, order=order, samples=48,
                          request={"stored": data.state(), "consumed": 20}, **extra)  # fmt: skip
    assert rows(Loader(resumed.train, masks), BatchRampUp.constant(7), 4, consumed=20) == plain[20:]


def test_names_and_kinds_of_arrays(path):
    def shown(kind, **changes):
        data, masks = run_data(kind, path, **changes)
        (batch,) = itertools.islice(Loader(data.train, masks).training(BatchRampUp.constant(3)), 1)
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())
        return {name: tuple(tensor.shape) for name, tensor in batch.items()}

    head = {"tokens": (3, 32), "types": (3, 32), "targets": (3, 32), "lengths": (3,), "sample": (3,)}
    assert shown("bert") == {**head, "order": (3,)}
    assert shown("bert", binary_head=False) == head
    spans = {"encoder_tokens": (3, 32), "encoder_lengths": (3,), "lengths": (3,), "sample": (3,)}
    assert shown("t5", seq_length_dec=20) == {**spans, "tokens": (3, 20), "targets": (3, 20)}
    assert shown("bart") == {**spans, "tokens": (3, 32), "targets": (3, 32)}


# ---- orders ----


def test_every_native_epoch_holds_every_group_once_in_another_order(path):
    data, _ = run_data("t5", path)
    once = data.train.once
    pieces = [[tuple(p) for p in data.train.provenance(i).pieces] for i in range(3 * once)]
    epochs = [pieces[k * once : (k + 1) * once] for k in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert sorted(p[0] for group in epochs[0] for p in group) == list(
        range(len(data.train.dataset(0).indexed))
    )


def test_masks_differ_from_epoch_to_epoch(path):
    data, masks = run_data("bart", path)
    once = data.train.once
    where = {tuple(data.train.provenance(i).pieces): i for i in range(once)}
    other = next(i for i in range(once, 2 * once) if len(data.train[i].tokens) > 20)
    first = where[tuple(data.train.provenance(other).pieces)]
    batch = masks.batch(data.train, np.array([first, other]))
    assert np.array_equal(*batch["targets"])
    assert not np.array_equal(*batch["encoder_tokens"])


def test_the_length_of_a_native_run_never_matters(path):
    short, masks = run_data("bert", path, samples=10)
    long, _ = run_data("bert", path, samples=10_000)
    numbers = np.arange(200)
    one, other = masks.batch(short.train, numbers), masks.batch(long.train, numbers)
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_megatrons_order_is_its_mapping(path):
    data, _ = run_data("bert", path, order="megatron", samples=70, seed=5)
    stream, source = data.train, data.train.plan.sources[0]
    indexed = stream.dataset(0).indexed
    shape = stream.plan.shape
    groups = megatron_groups(
        np.array(indexed.sizes), indexed.document_indices, shape, samples=70, seed=5
    ).groups
    assert (source.chapters, stream.once, shape.max_length) == ((70,), len(groups), 29)
    for i, (first, last, target) in enumerate(groups.tolist()):
        if i < 70:
            assert stream[i].target == target
            assert [p.item for p in stream.provenance(i).pieces] == list(range(first, last))
    with pytest.raises(DataError, match="sample 70 is not in the plan"):
        stream[70]


def test_a_longer_megatron_run_gets_another_chapter(path):
    data, masks = run_data("t5", path, order="megatron", samples=30, seq_length_dec=16)
    held = data.train.once
    more, _ = run_data("t5", path, order="megatron", samples=200, seq_length_dec=16,
                       request={"stored": data.state(), "consumed": 20})  # fmt: skip
    assert more.train.plan.sources[0].chapters == (30, 200 - held)
    assert more.train.once >= 200
    numbers = np.arange(30)
    before, after = masks.batch(data.train, numbers), masks.batch(more.train, numbers)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert len(masks.batch(more.train, np.arange(30, 200))["tokens"]) == 170


def test_cyclic(path):
    data, masks = run_data("bert", path, order="megatron", dataloader_type="cyclic", samples=25)
    assert data.train.plan.cycle == data.train.once >= 25
    loader = Loader(data.train, masks, CyclicSampler(data.train.plan.cycle, 2, 1))
    assert len(rows(loader, BatchRampUp.constant(4), 20)) == 80


def test_indexes_are_kept_on_disk(path, tmp_path, monkeypatch):
    monkeypatch.setattr(cache.IndexCache, "__init__", _small_cache)
    places = {"index_mapping_dir": str(tmp_path)}
    first, masks = run_data("bert", path, order="megatron", **places)
    entries = sorted(tmp_path.iterdir())
    assert [entry.name.split(".")[:2] for entry in entries] == [["a", "train"]]
    assert sorted(file.name for file in entries[0].iterdir()) == ["groups.npy", "key.json"]
    monkeypatch.setattr("megalith.data.groups.megatron_groups", None)
    again, _ = run_data("bert", path, order="megatron", **places)
    numbers = np.arange(50)
    one, other = masks.batch(first.train, numbers), masks.batch(again.train, numbers)
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("order", ["native", "megatron"])
@pytest.mark.parametrize(
    "change",
    [
        {"short_seq_prob": 0.5},
        {"binary_head": False},
        {"seq_length": 40},
        {"seed": 2},
        {"splits_string": "1,1,0"},
    ],
)
def test_another_shape_is_another_entry(path, tmp_path, monkeypatch, order, change):
    monkeypatch.setattr(cache.IndexCache, "__init__", _small_cache)
    for number, changes in enumerate([{}, change, {}]):
        run_data("bert", path, order=order, index_mapping_dir=str(tmp_path), **changes)
        assert len(list(tmp_path.iterdir())) == min(1 + number, 2)


def _small_cache(self, folders, notice=cache.no_notice):
    self.folders, self.notice, self.smallest, self._noticed = folders, notice, 0, set()


# ---- plans ----


def test_a_plan_keeps_its_shape(path):
    data, _ = run_data("bert", path)
    stored = data.train.plan.to_json()
    assert stored["shape"]["kind"] == "bert"
    assert DataPlan.from_json(stored) == data.train.plan
    del stored["shape"]
    assert DataPlan.from_json(stored).shape.kind == "gpt", "plans of older runs are GPT's"


@pytest.mark.parametrize(
    ("kind", "before", "after", "words"),
    [
        (
            "bert",
            {},
            {"binary_head": False},
            "model.bert_binary_head: cannot change .*\n.*set it back to True",
        ),
        ("bert", {}, {"short_seq_prob": 0.5}, "model.data.short_seq_prob.*\n.*set it back to 0.1"),
        ("bert", {}, {"seq_length": 48}, "model.encoder_seq_length.*\n.*set it back to 32"),
        ("t5", {"seq_length_dec": 16}, {"short_seq_prob": 0.5}, "model.data.short_seq_prob"),
    ],
)
def test_what_would_move_samples_is_refused(path, kind, before, after, words):
    data, _ = run_data(kind, path, **before)
    with pytest.raises(ConfigError, match=words):
        run_data(kind, path, request={"stored": data.state(), "consumed": 5}, **{**before, **after})


def test_another_kind_is_refused(path):
    data, _ = run_data("t5", path)
    with pytest.raises(ConfigError, match=r"model\.data\.dataset_type: cannot change"):
        run_data("bart", path, request={"stored": data.state(), "consumed": 5})


def test_masks_may_change_while_a_run_goes_on(path):
    data, _ = run_data("bert", path)
    more, masks = run_data("bert", path, masked_lm_prob=0.4, request={"stored": data.state(), "consumed": 5})
    assert more.train.plan == data.train.plan
    guessed = masks.batch(more.train, np.arange(40))["targets"] >= 0
    assert 0.25 < guessed.sum() / masks.batch(more.train, np.arange(40))["lengths"].sum() < 0.45


def test_a_blend(path, tmp_path):
    other, _ = write_sentences(tmp_path / "b", random_documents(1), seed=1)
    data, masks = run_data("bert", [0.25, path, 0.75, other])
    sources = [data.train.provenance(i).path.endswith("b") for i in range(40)]
    assert sum(sources) == 30
    assert len(masks.batch(data.train, np.arange(40))["tokens"]) == 40


def test_splits_lie_between_documents(path):
    data, _ = run_data(
        "bert", path, samples={"train": 20, "validation": 20, "test": 20}, splits_string="6,3,1"
    )
    borders = data.train.dataset(0).indexed.document_indices
    ranges = [(s.first, s.last) for stream in data.streams.values() for s in stream.plan.sources]
    assert [(borders[a], borders[b]) for a, b in [(0, 12), (12, 18), (18, 20)]] == ranges
    for stream, (first, last) in zip(data.streams.values(), ranges, strict=True):
        items = {p.item for i in range(stream.once) for p in stream.provenance(i).pieces}
        assert first <= min(items) <= max(items) < last


def test_rows_that_fill_up_do_not_count(path):
    data, masks = run_data("bert", path, samples={"train": 8, "validation": 8}, splits_string="5,5,0")
    loader = Loader(data.validation, masks)
    positions = loader.evaluation_positions(100, 8, drop_last=False)
    batches = list(loader.read(positions))
    filling = batches[-1]["sample"] < 0
    assert filling.any(), "this test wants a rest"
    assert (batches[-1]["targets"][filling] == -1).all()
    assert (batches[-1]["order"][filling] == -1).all()
    assert sum(int((batch["order"] >= 0).sum()) for batch in batches) == data.validation.once


# ---- prefix language model ----


@pytest.mark.parametrize(("order", "decoder"), [("native", 6), ("megatron", 7)])
def test_prefix_windows_are_cut_and_lose_nothing(tmp_path, order, decoder):
    path = corpus.write(tmp_path / "a", corpus.random_lengths(0))
    data, masks = run_data("t5_prefix_lm", path, seq_length=10, seq_length_dec=6, order=order)
    batch = masks.batch(data.train, np.arange(20))
    assert batch["encoder_tokens"].shape == (20, 10)
    assert batch["targets"].shape == batch["tokens"].shape == (20, decoder)
    assert (batch["tokens"][:, 0] == BOS).all()
    assert np.array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    whole = np.concatenate([batch["encoder_tokens"], batch["targets"]], axis=1)
    assert np.array_equal(whole, data.train.read(np.arange(20)))
    assert set(batch["encoder_lengths"].tolist()) | set(batch["lengths"].tolist()) == {10, decoder}


# ---- what users mix up ----


@pytest.fixture
def documents(tmp_path):
    return write_sentences(tmp_path / "x_text_document", [[30], [50], [20]])[0]


def test_documents_that_were_not_split(documents):
    with pytest.raises(DataError) as caught:
        run_data("bert", documents)
    for words in ("none of the 3 documents of train has 2 sentences", "each is one piece", "--split-sentences",
                  "model.bert_binary_head=false"):  # fmt: skip
        assert words in str(caught.value)
    data, masks = run_data("bert", documents, binary_head=False)
    assert (masks.batch(data.train, np.arange(3))["lengths"] <= 32).all()
    data, masks = run_data("t5", documents)
    assert "0.2 of the tokens do not fit into their samples and are left out, other ones" in data.summary()[1]
    megatron, _ = run_data("t5", documents, order="megatron")
    assert "0.2 of the tokens do not fit into their samples and are never read" in megatron.summary()[1]
    begins = {masks.batch(data.train, np.array([i]))["encoder_tokens"][0, :3].tobytes() for i in range(30)}
    assert len(begins) > 10, "a long document is read from anywhere"
    assert "--split-sentences when preprocessing loses less" in data.summary()[1]


def test_what_is_left_out_is_said(tmp_path):
    path, _ = write_sentences(tmp_path / "a", [[5, 6], [7], [600, 8], [9, 9]])
    native, masks = run_data("bert", path)
    assert "1 documents of fewer than 2 sentences left out" in native.summary()[1]
    assert "512" not in native.summary()[1]
    items = {p.item for i in range(native.train.once) for p in native.train.provenance(i).pieces}
    assert items == {0, 1, 3, 4, 5, 6}, "a long sentence is cut, not left out"
    assert masks.batch(native.train, np.arange(3))["lengths"].max() == 32
    megatron, _ = run_data("bert", path, order="megatron")
    assert "1 documents with a sentence of more than 512 tokens left out" in megatron.summary()[1]
    with pytest.raises(DataError, match=r"more than 512 tokens(.|\n)*order=native"):
        run_data("bert", write_sentences(tmp_path / "b", [[600, 8]])[0], order="megatron")


def test_a_prefix_model_wants_whole_documents(path):
    with pytest.raises(DataError, match=r"is cut into sentences(.|\n)*without --split-sentences"):
        run_data("t5_prefix_lm", path, seq_length_dec=16)


def test_an_id_outside_the_vocabulary(path):
    for kind in KINDS:
        data, masks = run_data(kind, path)
        with pytest.raises(DataError, match=r"a: holds token id \d+; the vocabulary ends at 499"):
            rows(Loader(data.train, masks, vocab_size=500), BatchRampUp.constant(8), 1)
        assert rows(Loader(data.train, masks, vocab_size=1000), BatchRampUp.constant(8), 1)


def test_texts_may_hold_the_padding_id(tmp_path):
    """Padding is told by lengths."""
    path, items = write_sentences(tmp_path / "a", [[9, 9, 9]] * 10)
    pad = int(items[0][0])
    data, masks = run_data("bert", path)
    masks = type(masks)(token_ids(pad=pad), 32)
    batch = masks.batch(data.train, np.arange(data.train.once))
    texts = [restored({name: array[i] for name, array in batch.items()}) for i in range(data.train.once)]
    assert sum(int((text == pad).sum()) for text in texts) == sum(int((item == pad).sum()) for item in items)
