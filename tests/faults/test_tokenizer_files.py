"""Wrong, swapped, cut and missing tokenizer files: a DataError that names the file and the way out."""

import json

import pytest

from megalith.errors import DataError, MegalithError
from megalith.tokenizers.config import TokenizerConfig
from megalith.tokenizers.load import load_tokenizer
from megalith.tokenizers.train import TrainingOptions, train_bpe, write_trained


@pytest.fixture
def folder(tmp_path):
    write_trained(train_bpe(["the cat sat on the mat " * 5], TrainingOptions(280)), tmp_path)
    return tmp_path


def pair(folder, vocab="vocab.json", merges="merges.txt"):
    return TokenizerConfig(vocab_file=str(folder / vocab), merge_file=str(folder / merges))


def refused(config, *words):
    with pytest.raises(DataError) as caught:
        load_tokenizer(config)
    for word in words:
        assert word in str(caught.value)


def test_swapped_files(folder):
    refused(pair(folder, "merges.txt", "vocab.json"), "merges.txt", "swap vocab_file and merge_file")


def test_vocabulary_given_twice(folder):
    refused(pair(folder, merges="vocab.json"), "vocab.json", "swap")


def test_tokenizer_json_given_as_vocabulary(folder):
    refused(pair(folder, "tokenizer.json"), "a tokenizer.json, not a vocab.json", "`file`")


def test_vocabulary_given_as_tokenizer_json(folder):
    refused(TokenizerConfig(file=str(folder / "vocab.json")), "vocab.json", "give it as vocab_file")


def test_merges_given_as_tokenizer_json(folder):
    refused(TokenizerConfig(file=str(folder / "merges.txt")), "merges.txt", "not JSON")


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_json_cut_anywhere(folder, name):
    whole = (folder / name).read_bytes()
    for length in [1, *range(10, len(whole) - 1, len(whole) // 20), len(whole) - 1]:
        (folder / name).write_bytes(whole[:length])
        config = pair(folder) if name == "vocab.json" else TokenizerConfig(file=str(folder))
        refused(config, str(folder / name), "cut short")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "3", '{"a": "b"}', '{"a": 1.5}', '{"a": true}', '{"model": 3}']
)
@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_other_json(folder, name, content):
    (folder / name).write_text(content)
    refused(pair(folder) if name == "vocab.json" else TokenizerConfig(file=str(folder / name)), name)


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"type": "BPE"},
        {"type": "BPE", "vocab": {"a": 0}},
        {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]},
        {"type": "BPE", "vocab": [1, 2], "merges": []},
        {"type": "BPE", "vocab": {"a": "b"}, "merges": []},
        {"type": "Unknown", "vocab": {"a": 0}, "merges": []},
        {"type": "Unigram", "vocab": [["a"]]},
        {"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": 0.1},
    ],
)
def test_damaged_models(folder, model):
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises(MegalithError) as caught:
        load_tokenizer(folder / "tokenizer.json")
    assert "tokenizer.json" in str(caught.value)


def test_damaged_added_tokens(folder):
    definition = json.loads((folder / "tokenizer.json").read_text())
    for wrong in ([{"content": "x"}], [3], [{"id": "y", "content": "x"}], 3):
        definition["added_tokens"] = wrong
        (folder / "tokenizer.json").write_text(json.dumps(definition))
        refused(TokenizerConfig(file=str(folder / "tokenizer.json")), "tokenizer.json")


def test_damaged_notes(folder):
    for content in ("{", "[]", '{"format_version": 99}', '{"special_tokens": {"end": "x"}}'):
        (folder / "megalith_tokenizer.json").write_text(content)
        refused(TokenizerConfig(file=str(folder)))


@pytest.mark.parametrize("line", ["one", "one two three", " x", "x ", ""])
def test_a_bad_merge_is_named_by_its_line(folder, line):
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    lines[3] = line
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    refused(pair(folder), "line 4")


def test_files_of_two_tokenizers(folder):
    (folder / "merges.txt").write_text("#version: 0.2\nz z\nzz zz\n")
    refused(pair(folder), "merges.txt", "different tokenizers")


def test_a_vocabulary_with_one_id_twice(folder):
    vocabulary = json.loads((folder / "vocab.json").read_text())
    vocabulary["!"] = vocabulary["#"]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    refused(pair(folder), "share an id")


def test_windows_line_ends_are_fine(folder):
    expected = load_tokenizer(folder).hash()
    text = (folder / "merges.txt").read_text(encoding="utf-8")
    (folder / "merges.txt").write_bytes(text.replace("\n", "\r\n").encode())
    assert load_tokenizer(pair(folder)).hash() == expected


def test_missing_files_and_keys(folder, tmp_path_factory):
    refused(pair(folder, "none.json"), "none.json", "no such file")
    refused(pair(folder, merges="none.txt"), "none.txt", "no such file")
    refused(TokenizerConfig(vocab_file=str(folder / "vocab.json")), "needs merge_file")
    refused(TokenizerConfig(merge_file=str(folder / "merges.txt")), "needs vocab_file")
    refused(TokenizerConfig(), "needs vocab_file", "megalith tokenizer train")
    refused(TokenizerConfig(type="HFTokenizer"), "needs a tokenizer.json")
    refused(TokenizerConfig(file=str(folder / "nowhere")), "no such tokenizer")
    refused(TokenizerConfig(file=str(tmp_path_factory.mktemp("empty"))), "without tokenizer.json")
    refused(TokenizerConfig(library="huggingface", type=None), "no tokenizer named")
    refused(TokenizerConfig(file=str(folder), vocab_file="x"), "both")
    refused(pair(folder, vocab="."), "a folder")


def test_binary_instead_of_text(folder):
    (folder / "vocab.json").write_bytes(b"\x80\x81\x82")
    refused(pair(folder), "not a text file")
