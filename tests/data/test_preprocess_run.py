"""From files to published pairs: the bytes, for every way of running and every kind of input."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import zstandard

from megalith.data.indexed.format import dtype_code
from megalith.data.indexed.mmap import open_indexed
from megalith.data.indexed.sidecar import read_side_car
from megalith.data.indexed.verify import verify
from megalith.data.preprocess import check, publish, worker
from megalith.data.preprocess import run as run_module
from megalith.data.preprocess.batches import Limits
from megalith.data.preprocess.options import Options, parse_bytes
from megalith.data.preprocess.pipeline import TooManyRejected
from megalith.data.preprocess.publish import LoggedArray, count_duplicates
from megalith.data.preprocess.report import histogram
from megalith.data.preprocess.wire import SharedMemory
from megalith.errors import DataError, UnsupportedError
from tests.data.preprocessing import (
    BAD_LINES,
    expected_files,
    json_lines,
    make_texts,
    make_tokenizer,
    output,
    rejects,
    run,
)

TEXTS = make_texts(400)


@pytest.fixture(scope="module")
def folder_with_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return folder, make_tokenizer(folder / "tok")


@pytest.fixture
def folder(tmp_path, folder_with_tokenizer):
    os.symlink(folder_with_tokenizer[0] / "tok", tmp_path / "tok")
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer(folder_with_tokenizer):
    return folder_with_tokenizer[1]


@pytest.fixture
def corpus(folder):
    path = folder / "corpus.jsonl"
    path.write_bytes(json_lines(TEXTS, title="skipped"))
    return path


@pytest.mark.parametrize("append_eod", [False, True])
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("block_bytes", [1 << 10, 1 << 13, 1 << 22])
def test_the_bytes_are_megatrons_for_every_way_of_running(
    folder, tokenizer, corpus, append_eod, workers, block_bytes
):
    summary = run(folder, [corpus], append_eod=append_eod, workers=workers, block_bytes=block_bytes)
    assert output(folder) == expected_files(tokenizer, TEXTS, append_eod=append_eod)
    (key,) = summary.keys
    assert (key.documents, key.empty) == (sum(map(bool, TEXTS)), TEXTS.count(""))
    assert not (folder / "out.parts").exists()
    assert not (folder / "out.rejected.jsonl").exists()


def test_side_car_and_summary(folder, tokenizer, corpus):
    summary = run(folder, [corpus], append_eod=True)
    prefix = folder / "out_text_document"
    side_car = read_side_car(prefix)
    full = [text for text in TEXTS if text]
    assert verify(prefix).problems == []
    assert side_car.tokenizer.hash == tokenizer.hash()
    assert (side_car.tokenizer.vocab_size, side_car.tokenizer.eod) == (tokenizer.vocab_size, tokenizer.eod)
    assert (side_car.append_eod, side_car.sources) == (True, [str(corpus)])
    lengths = [len(tokenizer.encode(text)) + 1 for text in full]
    assert (side_car.documents, side_car.tokens) == (len(full), sum(lengths))
    details = side_car.details
    assert details["duplicate_documents"] == len(full) - len(set(full))
    assert details["empty_documents"] == TEXTS.count("")
    assert details["longest_document"] == max(lengths)
    counts = {
        low: sum(int(low) <= length < 2 * int(low) for length in lengths)
        for low in details["length_histogram"]
    }
    assert details["length_histogram"] == counts
    assert sum(counts.values()) == len(full)
    assert (summary.lines, summary.rejected, summary.text_bytes) == (len(TEXTS), 0, corpus.stat().st_size)


def test_the_side_car_does_not_depend_on_how_it_was_run(folder, corpus):
    run(folder, [corpus], workers=1)
    first = (folder / "out_text_document.meta.json").read_bytes()
    run(folder, [corpus], workers=2, block_bytes=1 << 12)
    assert (folder / "out_text_document.meta.json").read_bytes() == first


def test_files_of_every_kind_in_the_order_given(folder, tokenizer):
    parts = [make_texts(60, seed) for seed in range(4)]
    (folder / "in").mkdir()
    (folder / "in/b.jsonl").write_bytes(json_lines(parts[0]))
    (folder / "in/a.json.gz").write_bytes(gzip.compress(json_lines(parts[1])))
    (folder / "in/.hidden.jsonl").write_bytes(b"not looked at")
    (folder / "in/readme.md").write_bytes(b"not looked at")
    two_frames = [zstandard.compress(part) for part in (json_lines(parts[2][:30]), json_lines(parts[2][30:]))]
    (folder / "z.jsonl.zst").write_bytes(b"".join(two_frames))
    (folder / "wiki_00").write_bytes(json_lines(parts[3]).rstrip(b"\n"))
    run(folder, [folder / "wiki_*", folder / "in", folder / "z.jsonl.zst"], workers=2)
    assert output(folder) == expected_files(tokenizer, parts[3] + parts[1] + parts[0] + parts[2])


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress, zstandard.compress])
@pytest.mark.parametrize("unit", ["file", "line", "paragraph"])
def test_text_files(folder, tokenizer, pack, unit):
    texts = [text for text in make_texts(50) if text.strip()]
    data = b"\xef\xbb\xbf" + "\n\n".join(texts).encode() + b"\n"
    name = {b"\x1f\x8b": "x.txt.gz", b"\x28\xb5": "x.txt.zst"}.get(pack(data)[:2], "x.txt")
    (folder / name).write_bytes(pack(data))
    (folder / "y.txt").write_bytes(b"second file")
    run(folder, [folder / name, folder / "y.txt"], workers=2, txt_documents=unit, append_eod=True)
    text = data[3:].decode()
    documents = {
        "file": [text],
        "line": [line for line in text.split("\n") if line.strip()],
        "paragraph": [part.strip("\n") for part in text.split("\n\n") if part.strip()],
    }[unit]
    assert output(folder) == expected_files(tokenizer, [*documents, "second file"], append_eod=True)


def test_several_keys_get_out_of_step_as_in_megatron(folder, tokenizer):
    titles = make_texts(len(TEXTS), 5, words=8)
    lines = [json.dumps({"text": text, "title": title}) for text, title in zip(TEXTS, titles, strict=True)]
    (folder / "c.jsonl").write_text("\n".join(lines) + "\n")
    summary = run(folder, [folder / "c.jsonl"], keys=("title", "text"), workers=2, append_eod=True)
    assert output(folder, "text") == expected_files(tokenizer, TEXTS, append_eod=True)
    assert output(folder, "title") == expected_files(tokenizer, titles, append_eod=True)
    assert [(key.key, key.empty) for key in summary.keys] == [
        ("title", titles.count("")),
        ("text", TEXTS.count("")),
    ]


def test_old_layout(folder, tokenizer, corpus):
    run(folder, [corpus], implementation="cached")
    dataset = open_indexed(folder / "out_text_document")
    assert output(folder)[1].startswith(b"TNTIDX")
    assert dtype_code(dataset.dtype) == 4
    assert output(folder)[0] == expected_files(tokenizer, TEXTS, dtype="<i4")[0]
    assert dataset.get(3).tolist() == tokenizer.encode([text for text in TEXTS if text][3])


def test_special_tokens_in_text_are_text(folder, tokenizer):
    (folder / "c.jsonl").write_text('{"text": "a<|endoftext|>b"}\n')
    run(folder, [folder / "c.jsonl"], append_eod=True)
    tokens = np.frombuffer(output(folder)[0], np.uint16)
    assert tokens.tolist().count(tokenizer.eod) == 1


def test_the_reference_takes_over_when_the_fast_tokenizer_disagrees(folder, tokenizer, corpus, monkeypatch):
    monkeypatch.setattr(check, "difference", lambda *args: "fast tokenizer off: wrong ids")
    notices = []
    run_module.preprocess(
        Options((str(corpus),), folder / "out", tokenizer=_files(folder), block_bytes=1 << 12, workers=2),
        notify=notices.append,
    )
    assert notices == ["fast tokenizer off: wrong ids"]
    assert output(folder) == expected_files(tokenizer, TEXTS)


def test_the_reference_takes_over_when_the_fast_tokenizer_refuses(folder, tokenizer, corpus, monkeypatch):
    monkeypatch.setattr(
        run_module, "unchecked_encoder", lambda tokenizer: (None, "fast tokenizer off: cannot")
    )
    run(folder, [corpus], workers=2)
    assert output(folder) == expected_files(tokenizer, TEXTS)


# Bad lines


def mixed(folder, share: int):
    """A corpus where every `share`-th line is bad; its good texts and the numbers (from 1) of its bad lines."""
    rng = random.Random(3)
    lines, good, bad = [], [], []
    for number, text in enumerate(TEXTS, start=1):
        if number % share == 0:
            lines.append(rng.choice(BAD_LINES)[0])
            bad.append(number)
        else:
            lines.append(json.dumps({"text": text}).encode())
            good.append(text)
    path = folder / "mixed.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n\n")
    return path, good, bad


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("compressed", [False, True])
def test_bad_lines_are_put_aside(folder, tokenizer, workers, compressed):
    path, good, bad = mixed(folder, 20)
    if compressed:
        path = path.with_suffix(".jsonl.gz")
        path.write_bytes(gzip.compress((folder / "mixed.jsonl").read_bytes()))
    summary = run(folder, [path, path], workers=workers, max_rejected=0.06, block_bytes=1 << 11)
    assert output(folder) == expected_files(tokenizer, good * 2)
    found = rejects(folder)
    assert [(row["file"], row["line"]) for row in found] == [(str(path), line) for line in bad * 2]
    assert all(row["reason"] and row["excerpt"] for row in found)
    assert (summary.rejected, summary.blank, summary.lines) == (2 * len(bad), 2, 2 * len(TEXTS) + 2)


def test_too_many_bad_lines_publish_nothing_and_lose_nothing(folder, tokenizer, monkeypatch):
    path, good, bad = mixed(folder, 20)
    (folder / "out.rejected.jsonl").write_text("of an earlier run\n")
    with pytest.raises(TooManyRejected, match="nothing was published") as caught:
        run(folder, [path])
    assert caught.value.exit_code == 1
    assert f"{len(bad)} of {len(TEXTS)} lines (5 %)" in str(caught.value)
    assert not list(folder.glob("out_text*"))
    assert [row["line"] for row in rejects(folder)] == bad
    monkeypatch.setattr(run_module.Worker, "_run", None)  # nothing is tokenized twice
    summary = run(folder, [path], max_rejected=0.05)
    assert summary.resumed_parts == summary.parts > 0
    assert output(folder) == expected_files(tokenizer, good)


def test_a_hopeless_input_is_given_up_early(folder):
    (folder / "c.jsonl").write_text('{"content": "wrong key"}\n' * 40_000)
    with pytest.raises(TooManyRejected, match="no key 'text'"):
        run(folder, [folder / "c.jsonl"], max_rejected=0.5)
    assert 10_000 < len(rejects(folder)) < 20_000


def test_no_document_at_all(folder):
    (folder / "c.jsonl").write_text('\n{"text": ""}\n')
    with pytest.raises(DataError, match="no document with text in 2 lines"):
        run(folder, [folder / "c.jsonl"])
    assert sorted(path.name for path in folder.iterdir()) == ["c.jsonl", "tok"]


# Long records


@pytest.fixture
def small_limits(monkeypatch):
    """Everything above a few KiB is long."""
    limits = Limits(record=1 << 12, piece=1 << 12, uncut=1 << 13, reading=1000, string=500, skeleton=1 << 13)
    monkeypatch.setattr(run_module, "FAST", limits)
    monkeypatch.setattr(run_module, "REFERENCE", limits)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_long_lines(folder, tokenizer, small_limits, monkeypatch, suffix, fast):
    if not fast:
        monkeypatch.setattr(run_module, "unchecked_encoder", lambda tokenizer: (None, "off"))
    texts = make_texts(30, 1) + make_texts(6, 2, words=60_000) + make_texts(30, 3)
    data = json_lines(texts, more=["x" * 3000, {"deep": "y" * 700}])
    path = folder / f"c{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    run(folder, [path], workers=2, append_eod=True)
    assert output(folder) == expected_files(tokenizer, texts, append_eod=True)


@pytest.mark.parametrize("unit", ["file", "line", "paragraph"])
@pytest.mark.parametrize("suffix", [".txt", ".txt.zst"])
def test_long_texts(folder, tokenizer, small_limits, unit, suffix):
    text = "\n".join(make_texts(4, 2, words=60_000))
    joined = {"file": text, "line": text.replace("\n", " ") + "\r\nshort", "paragraph": text}[unit]
    path = folder / f"c{suffix}"
    path.write_bytes(zstandard.compress(joined.encode()) if suffix.endswith("zst") else joined.encode())
    run(folder, [path], workers=2, txt_documents=unit)
    documents = {
        "file": [joined],
        "line": joined.split("\r\n"),
        "paragraph": [part.strip("\n") for part in joined.split("\n\n") if part.strip()],
    }[unit]
    assert output(folder) == expected_files(tokenizer, documents)


def test_bad_long_lines_are_rejected_and_leave_no_trace(folder, tokenizer, small_limits):
    body = ("cat sat " * 3000).encode()
    bad = {
        b'{"text": "' + body + b'\xff"}': "invalid UTF-8",
        b'{"text": "' + body + b"\\ud800" + body + b'"}': "lone surrogate",
        b'{"text": "' + body + b'\\x"}': "invalid escape",
        b'{"text": "' + body: "without its end",
        b'{"text": "' + body + b'"': "the line ends early",
        b'{"title": "' + body + b'"}': "no key 'text'",
        b'{"text": "fine", "title": "' + body + b'\x01"}': "malformed JSON",
        b'{"text": "' + b"x" * 20_000 + b'"}': "without a place",
        b'{"text": "a", "x": [' + b"1, " * 10_000 + b"1]}": "besides its long strings",
    }
    lines = [line for pair in zip(bad, [b'{"text": "good"}'] * len(bad), strict=True) for line in pair]
    (folder / "c.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    run(folder, [folder / "c.jsonl"], workers=2, max_rejected=1.0)
    assert output(folder) == expected_files(tokenizer, ["good"] * len(bad))
    found = rejects(folder)
    assert [row["line"] for row in found] == list(range(1, 2 * len(bad), 2))
    for row, reason in zip(found, bad.values(), strict=True):
        assert reason in row["reason"]
        assert len(row["excerpt"]) < 200


@pytest.mark.parametrize(("limit", "kept"), [(30_000, True), (3_000, False)])
def test_more_tokens_than_the_format_can_hold(folder, tokenizer, small_limits, monkeypatch, limit, kept):
    monkeypatch.setattr(worker, "_MOST_TOKENS", limit)
    text = "the cat sat on " * 4000
    (folder / "c.jsonl").write_bytes(json_lines(["before", text, "after"]))
    assert (len(tokenizer.encode(text)) <= limit) == kept
    run(folder, [folder / "c.jsonl"], max_rejected=1.0)
    assert output(folder) == expected_files(
        tokenizer, ["before", text, "after"] if kept else ["before", "after"]
    )
    assert [row["reason"].partition(" ")[2] for row in rejects(folder)] == (
        [] if kept else [f"tokens in one document; the format holds {limit:,} at most"]
    )


def test_documents_larger_than_a_slot(folder, tokenizer, corpus, monkeypatch):
    monkeypatch.setattr(run_module, "SharedMemory", _tiny_slots)
    run(folder, [corpus], workers=2, append_eod=True)
    assert output(folder) == expected_files(tokenizer, TEXTS, append_eod=True)
    summary = run(folder, [corpus], workers=1, append_eod=True)
    assert summary.keys[0].duplicates == len([t for t in TEXTS if t]) - len({t for t in TEXTS if t})


def _tiny_slots(workers, dtype, slot_tokens, inputs, input_bytes):
    shared = SharedMemory(workers, dtype, 64, inputs, input_bytes)
    shared.slot_documents = 3
    return shared


def _files(folder):
    return run_module.TokenizerFiles(file=str(folder / "tok"))


# Users' mistakes


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("missing.jsonl", None, "no such file"),
        ("x.parquet", b"PAR1", "Parquet files are not read"),
        ("x.jsonl.gz", b"plain", "is no gzip file"),
        ("x.jsonl", gzip.compress(b"{}", mtime=0), "not named .gz"),
        ("*.nothing", None, "no file matches"),
    ],
)
def test_wrong_inputs(folder, name, data, message):
    if data is not None:
        (folder / name).write_bytes(data)
    with pytest.raises((DataError, UnsupportedError), match=message):
        run(folder, [folder / name])
    assert not (folder / "out.parts").exists()


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"keys": ()}, "--json-keys"),
        ({"keys": ("a/b",)}, "--json-keys"),
        ({"workers": 0}, "--workers"),
        ({"max_rejected": 2.0}, "--max-rejected"),
        ({"max_memory": 1 << 20}, "--max-memory"),
        ({"implementation": "fast"}, "--dataset-impl"),
        ({"txt_documents": "page"}, "--txt-documents"),
        ({"inputs": ()}, "--input"),
        ({"output_prefix": Path("/")}, "--output-prefix"),
        ({"output_prefix": Path.cwd()}, "--output-prefix"),
    ],
)
def test_wrong_options(folder, changes, where):
    with pytest.raises(DataError) as caught:
        run(folder, changes.pop("inputs", ["x"]), **changes)
    assert caught.value.problem.where == where
    assert caught.value.problem.fix


def test_a_pipe_is_no_input(folder):
    os.mkfifo(folder / "p.jsonl")
    with pytest.raises(DataError, match="a pipe or device"):
        run(folder, [folder / "p.jsonl"])


def test_keys_and_text_do_not_go_together(folder):
    (folder / "a.txt").write_text("text")
    with pytest.raises(DataError, match="plain text has no keys"):
        run(folder, [folder / "a.txt"], keys=("a", "b"))


@pytest.mark.parametrize(
    ("text", "size"), [("1G", 1 << 30), ("1.5 GiB", 3 << 29), ("512m", 1 << 29), ("77", 77)]
)
def test_sizes(text, size):
    assert parse_bytes(text, "--x") == size
    with pytest.raises(DataError, match="no size"):
        parse_bytes(text + "!", "--x")


def test_memory_limits_the_workers(folder, corpus):
    notices = []
    run_module.preprocess(
        Options((str(corpus),), folder / "out", tokenizer=_files(folder), workers=64), notify=notices.append
    )
    assert "64 workers do not fit in 1 GiB" in notices[0]


# Numbers


@pytest.mark.parametrize("at_once", [1 << 20, 100, 7])
@pytest.mark.parametrize("different", [1, 2, 300, 100_000])
def test_duplicates_are_counted_in_bounded_memory(tmp_path, monkeypatch, at_once, different):
    monkeypatch.setattr(publish, "_CHUNK_ITEMS", 64)
    rng = np.random.default_rng(0)
    values = rng.integers(0, 1 << 64, different, np.uint64)[rng.integers(0, different, 1000)]
    (tmp_path / "h").write_bytes(values.tobytes())
    expected = len(values) - len(np.unique(values))
    assert count_duplicates(LoggedArray(tmp_path / "h", "<u8", len(values)), tmp_path, at_once) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["h"]


def test_histogram_bars():
    lines = histogram((0, 0, 4, 0, 8))
    assert [line.split() for line in lines[1:]] == [
        ["4", "–", "7", "4", "█" * 20],
        ["8", "–", "15", "0"],
        ["16", "–", "31", "8", "█" * 40],
    ]


def test_real_corpora(folder, real_data):
    source = real_data("corpus-wikipedia-vital")
    vocab = real_data("gpt2-vocab")
    files = run_module.TokenizerFiles(
        vocab_file=str(vocab / "vocab.json"), merge_file=str(vocab / "merges.txt")
    )
    summary = run(folder, [source], tokenizer=files, workers=2, append_eod=True, block_bytes=1 << 20)
    dataset = open_indexed(folder / "out_text_document")
    tokenizer = run_module.load_tokenizer(files)
    with gzip.open(sorted(source.glob("*.gz"))[0]) as file:
        first = json.loads(file.readline())["text"]
    assert dataset.get(0).tolist() == [*tokenizer.encode(first), tokenizer.eod]
    assert dataset.dtype == np.uint16
    assert summary.rejected == 0
    assert len(dataset) == summary.keys[0].documents
