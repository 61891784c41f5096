"""`--split-sentences`: one item a sentence, the bytes of Megatron's builder, for every way of running."""

from __future__ import annotations

import gzip
import os
import struct
from dataclasses import replace
from itertools import pairwise

import pytest

from megalith.data.indexed.mmap import open_indexed
from megalith.data.indexed.sidecar import read_side_car
from megalith.data.indexed.verify import verify
from megalith.data.merge import merge
from megalith.data.preprocess import run as run_module
from megalith.data.preprocess.batches import Limits
from megalith.data.preprocess.journal import Store
from megalith.data.preprocess.run import preprocess
from megalith.data.preprocess.wire import SharedMemory
from megalith.data.sentences import Sentences
from megalith.errors import DataError
from megalith.tokenizers.load import load_tokenizer
from megalith.tokenizers.names import TokenizerFiles
from tests.tokenizers.bert import pieces, write_model, write_vocabulary

from .preprocessing import (
    expected_files,
    json_lines,
    make_prose,
    make_tokenizer,
    options,
    output,
    rejects,
    run,
)

TEXTS = make_prose(300)
ENGLISH = Sentences("en")
KEPT = Sentences("en", keep_spaces=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return folder, make_tokenizer(folder)


@pytest.fixture
def folder(tmp_path, made):
    os.symlink(made[0], tmp_path / "tok")
    return tmp_path


@pytest.fixture
def corpus(folder):
    (folder / "c.jsonl").write_bytes(json_lines(TEXTS))
    return folder / "c.jsonl"


def sentences_of(folder, key="text"):
    return output(folder, key, "sentence")


@pytest.mark.parametrize("append_eod", [False, True])
@pytest.mark.parametrize("sentences", [ENGLISH, KEPT])
@pytest.mark.parametrize(("workers", "block_bytes"), [(1, 1 << 10), (2, 1 << 13), (3, 1 << 22)])
def test_the_bytes_for_every_way_of_running(
    folder, made, corpus, append_eod, sentences, workers, block_bytes
):
    run(
        folder,
        [corpus],
        append_eod=append_eod,
        sentences=sentences,
        workers=workers,
        block_bytes=block_bytes,
    )
    wanted = expected_files(made[1], TEXTS, append_eod=append_eod, sentences=sentences)
    assert sentences_of(folder) == wanted
    assert not (folder / "out_text_document.bin").exists()


def test_known_sentences_are_known_bytes(folder, made):
    """Two documents of two and one sentences, an empty one between; the index spelt out from the format's table."""
    (folder / "c.jsonl").write_bytes(json_lines(["The cat. On a mat!\n\n", " \n", "“END?”"]))
    run(folder, [folder / "c.jsonl"], sentences=ENGLISH, append_eod=True)
    tokenizer = made[1]
    items = [tokenizer.encode(text) for text in ("The cat.", "On a mat!", "“END?”")]
    items[1].append(tokenizer.eod)
    items[2].append(tokenizer.eod)
    a, b, c = map(len, items)
    assert sentences_of(folder)[0] == struct.pack(f"<{a + b + c}H", *items[0], *items[1], *items[2])
    assert sentences_of(folder)[1] == (
        struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 3, 3)
        + struct.pack("<3i", a, b, c)
        + struct.pack("<3q", 0, 2 * a, 2 * (a + b))
        + struct.pack("<3q", 0, 2, 3)
    )


def test_old_layout(folder, made, corpus):
    run(folder, [corpus], sentences=ENGLISH, implementation="cached")
    dataset = open_indexed(folder / "out_text_sentence")
    reference = expected_files(made[1], TEXTS, dtype="<i4", sentences=ENGLISH)
    assert sentences_of(folder)[0] == reference[0]
    documents, items = dataset.num_documents, len(dataset)
    assert reference[1][18:34] == struct.pack("<QQ", items, documents + 1)
    assert dataset.document_indices.astype("<i8").tobytes() == reference[1][34 + 12 * items :]


def test_side_car_summary_verify_and_merge(folder, made, corpus):
    summary = run(folder, [corpus], sentences=ENGLISH, append_eod=True, workers=2)
    prefix = folder / "out_text_sentence"
    split = [ENGLISH.split(text.encode()) for text in TEXTS]
    car = read_side_car(prefix)
    assert (car.documents, car.items) == (sum(map(bool, split)), sum(map(len, split)))
    assert (summary.keys[0].items, summary.keys[0].empty) == (car.items, sum(not row for row in split))
    assert car.details["longest_sentence"] == int(open_indexed(prefix).sizes.max())
    assert sum(car.details["length_histogram"].values()) == car.items
    assert verify(prefix).problems == []
    merge([prefix, prefix], folder / "twice")
    assert verify(folder / "twice").problems == []
    both = [(folder / f"twice.{end}").read_bytes() for end in ("bin", "idx")]
    assert both == list(expected_files(made[1], TEXTS * 2, append_eod=True, sentences=ENGLISH))


def _tiny_slots(workers, dtype, slot_tokens, inputs, input_bytes):
    shared = SharedMemory(workers, dtype, 64, inputs, input_bytes)
    shared.slot_documents = 3
    return shared


@pytest.mark.parametrize("append_eod", [False, True])
def test_documents_larger_than_a_slot(folder, made, corpus, monkeypatch, append_eod):
    monkeypatch.setattr(run_module, "SharedMemory", _tiny_slots)
    run(folder, [corpus], workers=2, sentences=ENGLISH, append_eod=append_eod)
    assert sentences_of(folder) == expected_files(made[1], TEXTS, sentences=ENGLISH, append_eod=append_eod)


@pytest.fixture
def small_limits(monkeypatch):
    limits = Limits(record=1 << 12, piece=1 << 12, uncut=1 << 13, reading=1000, string=500, skeleton=1 << 13)
    monkeypatch.setattr(run_module, "FAST", limits)


@pytest.mark.parametrize("sentences", [ENGLISH, KEPT])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_long_lines(folder, made, small_limits, suffix, sentences):
    texts = [
        *make_prose(20, 1),
        *("\n\n".join(make_prose(90, seed)) for seed in range(4)),
        *make_prose(20, 3),
    ]
    data = json_lines(texts)
    (folder / f"c{suffix}").write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    run(folder, [folder / f"c{suffix}"], workers=2, append_eod=True, sentences=sentences)
    assert sentences_of(folder) == expected_files(made[1], texts, append_eod=True, sentences=sentences)


def test_a_long_text_without_a_paragraph_is_rejected(folder, made, small_limits):
    (folder / "c.jsonl").write_bytes(json_lines(["Good. One.", "The cat sat. " * 2000, "Last."]))
    run(folder, [folder / "c.jsonl"], sentences=ENGLISH, max_rejected=1.0)
    assert sentences_of(folder) == expected_files(made[1], ["Good. One.", "Last."], sentences=ENGLISH)
    assert [row["reason"] for row in rejects(folder)] == ["8 KiB of text without a blank line to cut it at"]


@pytest.mark.parametrize("unit", ["file", "line", "paragraph"])
def test_text_files(folder, made, unit):
    text = "\n\n".join(part for part in make_prose(30, 2) if part.strip())
    (folder / "x.txt").write_bytes(text.encode())
    run(folder, [folder / "x.txt"], sentences=ENGLISH, txt_documents=unit)
    documents = {"file": [text], "line": text.split("\n")}.get(unit)
    if documents is None:
        lines = text.split("\n")
        borders = [-1, *(n for n, line in enumerate(lines) if not line.strip()), len(lines)]
        documents = ["\n".join(lines[a + 1 : b]) for a, b in pairwise(borders)]
    assert sentences_of(folder) == expected_files(made[1], documents, sentences=ENGLISH)


def bert_files(folder):
    return TokenizerFiles(
        type="BertWordPieceLowerCase", vocab_file=str(write_vocabulary(folder / "vocab.txt"))
    )


def sentence_piece_files(folder):
    return TokenizerFiles(
        type="SentencePieceTokenizer", file=str(write_model(folder / "x.model")), num_sentinel_tokens=4
    )


@pytest.mark.parametrize("sentences", [None, ENGLISH, KEPT])
@pytest.mark.parametrize("files", [bert_files, sentence_piece_files])
def test_tokenizers_of_bert_and_t5(folder, corpus, files, sentences):
    named = files(folder)
    tokenizer = load_tokenizer(named)
    append_eod = tokenizer.eod is not None
    notices = []
    made = options(folder, [corpus], tokenizer=named, sentences=sentences, append_eod=append_eod, workers=2)
    preprocess(made, notify=notices.append)
    wanted = expected_files(tokenizer, TEXTS, append_eod=append_eod, sentences=sentences)
    assert output(folder, unit=made.unit) == wanted
    assert notices == (
        []
        if sentences or append_eod
        else ["BERT and T5 are trained on sentences: --split-sentences finds them"]
    )
    car = read_side_car(made.prefix("text"))
    again = load_tokenizer(TokenizerFiles(**car.tokenizer.config))
    assert (again.hash(), again.vocab_size) == (car.tokenizer.hash, car.tokenizer.vocab_size)


def test_bert_has_no_end_of_document(folder, corpus):
    with pytest.raises(DataError, match="no end-of-document token") as caught:
        run(folder, [corpus], tokenizer=bert_files(folder), append_eod=True, sentences=ENGLISH)
    assert caught.value.problem.where == "--append-eod"
    assert "leave the flag out" in caught.value.problem.fix


@pytest.mark.parametrize("change", ["type", "file"])
def test_another_tokenizer_does_not_go_on_with_these_parts(folder, corpus, monkeypatch, change):
    files = bert_files(folder)
    monkeypatch.setattr(Store, "begin_publishing", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(folder, [corpus], tokenizer=files)
    other = replace(files, type="BertWordPieceCase")
    if change == "file":
        other = replace(files, vocab_file=str(write_vocabulary(folder / "v2.txt", [*pieces(), "new"])))
    with pytest.raises(DataError, match="parts of another run; different here: tokenizer"):
        run(folder, [corpus], tokenizer=other)
