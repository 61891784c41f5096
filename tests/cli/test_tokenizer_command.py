"""`megalith tokenizer …` from the command line: what it prints, exit codes, no traceback for any mistake."""

import io
import json
import re
import sys

import pytest

from megalith.cli.main import main

TEXT = "the cat sat on the mat, the dog's dog\n"


@pytest.fixture
def megalith(capsys):
    """A function: arguments → (exit code, stdout, stderr). A bug's exit code (70) or a traceback fails the test."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        assert "bug" not in output.err
        return stop.value.code or 0, output.out, output.err

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer made by the command itself."""
    base = tmp_path_factory.mktemp("tokenizer")
    (base / "corpus.jsonl").write_text((json.dumps({"body": TEXT}) + "\n") * 20 + "{broken\n")
    (base / "corpus.txt").write_text(TEXT * 20)
    corpus, made = str(base / "corpus.txt"), str(base / "made")
    with pytest.raises(SystemExit) as stop:
        main(["tokenizer", "train", "--input", corpus, "--vocab-size", "270", "--output", made])
    assert not stop.value.code
    return base


def test_train(megalith, folder, tmp_path):
    code, out, err = megalith(
        "tokenizer", "train", "--input", folder / "corpus.jsonl", "--input", folder / "corpus.txt",
        "--json-key", "body", "--vocab-size", "290", "--output", tmp_path / "new", "--special-token", "<|endoftext|>",
        "--special-token", "<pad>", "--min-frequency", "3",
    )  # fmt: skip
    assert code == 0
    assert "21 documents" in out
    assert "1 lines without text under 'body' were left out" in err
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["megalith_tokenizer.json", "merges.txt", "tokenizer.json", "vocab.json"]
    vocabulary = json.loads((tmp_path / "new" / "vocab.json").read_text())
    assert (vocabulary["<|endoftext|>"], vocabulary["<pad>"]) == (0, 1)


def test_train_says_when_the_text_has_too_few_pairs(megalith, folder, tmp_path):
    code, _, err = megalith(
        "tokenizer",
        "train",
        "--input",
        folder / "corpus.txt",
        "--vocab-size",
        5000,
        "--output",
        tmp_path / "x",
    )
    assert code == 0
    assert "fewer than the 5,000 entries" in err


def test_encode_text_file_and_standard_input(megalith, folder, tmp_path, monkeypatch):
    made = folder / "made"
    (tmp_path / "text").write_text(TEXT)
    code, from_text, _ = megalith("tokenizer", "encode", "--tokenizer", made, "--text", TEXT, "--json")
    assert code == 0
    values = json.loads(from_text)
    assert "".join(values["tokens"]).replace("Ġ", " ").replace("Ċ", "\n") == TEXT
    assert values["bytes"] == len(TEXT)
    assert (
        megalith("tokenizer", "encode", "--tokenizer", made, "--file", tmp_path / "text", "--json")[1]
        == from_text
    )
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert megalith("tokenizer", "encode", "--tokenizer", made, "--json")[1] == from_text
    plain = megalith(
        "tokenizer",
        "encode",
        "--vocab",
        made / "vocab.json",
        "--merge-file",
        made / "merges.txt",
        "--text",
        TEXT,
    )
    assert " ".join(map(str, values["ids"])) in plain[1]


def test_encode_treats_special_tokens_as_text(megalith, folder):
    _, out, _ = megalith(
        "tokenizer", "encode", "--tokenizer", folder / "made", "--text", "<|endoftext|>", "--json"
    )
    assert 0 not in json.loads(out)["ids"]


def test_inspect(megalith, folder):
    code, out, _ = megalith("tokenizer", "inspect", folder / "made", "--json", "--longest", "3")
    values = json.loads(out)
    assert code == 0
    assert (values["type"], values["vocab_size"]) == ("GPT2BPETokenizer", 270)
    assert values["special_tokens"]["eod"] == ["<|endoftext|>", 0]
    assert len(values["longest"]) == 3
    plain = megalith("tokenizer", "inspect", folder / "made")[1]
    assert values["hash"] in plain
    assert "eod = <|endoftext|> (0)" in plain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "--text", "x"], "no tokenizer is named"),
        (["inspect"], "no tokenizer is named"),
        (["inspect", "{base}/nowhere"], "no such tokenizer"),
        (["inspect", "{base}/corpus.txt"], "not JSON"),
        (
            ["inspect", "--vocab-file", "{base}/made/merges.txt", "--merge-file", "{base}/made/vocab.json"],
            "swap",
        ),
        (["inspect", "--vocab-file", "{base}/made/vocab.json"], "needs merge_file"),
        (
            ["encode", "--tokenizer", "{base}/made", "--tokenizer-type", "GPT2", "--text", "x"],
            "did you mean GPT2BPE",
        ),
        (["encode", "--tokenizer", "{base}/made", "--tokenizer-type", "NullTokenizer"], "not built yet"),
        (
            ["train", "--input", "{base}/x.txt", "--output", "{base}/o", "--type", "bert"],
            "one of bpe, wordpiece",
        ),
        (
            ["train", "--input", "{base}/x.txt", "--output", "{base}/o", "--cased"],
            "only wordpiece has two cases",
        ),
        (["inspect", "--tokenizer-type", "BertWordPieceCase"], "needs vocab_file"),
        (["encode", "--tokenizer", "{base}/made", "--text", "x", "--file", "y"], "both --text and --file"),
        (["encode", "--tokenizer", "{base}/made", "--file", "{base}/nowhere"], "cannot be read"),
        (["encode", "--tokenizer", "{base}/made", "--file", "{base}"], "cannot be read"),
        (["encode", "--tokenizer", "{base}/made", "--file", "{base}/bytes"], "byte 3 is not UTF-8"),
        (["train", "--input", "{base}/nowhere.txt", "--output", "{base}/o"], "no such file"),
        (
            ["train", "--input", "{base}/corpus.jsonl", "--output", "{base}/o"],
            "no text was found under the key 'text'",
        ),
        (
            ["train", "--input", "{base}/corpus.txt", "--vocab-size", "10", "--output", "{base}/o"],
            "10 is too small",
        ),
        (["train", "--input", "{base}/empty.txt", "--output", "{base}/o"], "no text was found"),
        (["train", "--input", "{base}/corpus.txt", "--output", "{base}/corpus.txt"], "cannot be written"),
    ],
)
def test_mistakes_are_answered_with_exit_code_2(megalith, folder, arguments, message):
    (folder / "bytes").write_bytes(b"abc\xff")
    (folder / "empty.txt").write_text("")
    code, _, err = megalith("tokenizer", *(text.format(base=folder) for text in arguments))
    assert code == 2
    assert message in err


@pytest.mark.parametrize("command", ["train", "encode", "inspect"])
def test_help_has_an_example(megalith, command):
    code, out, _ = megalith("tokenizer", command, "--help")
    assert code == 0
    assert f"megalith tokenizer {command}" in " ".join(out.split())


@pytest.mark.parametrize("kind", ["wordpiece", "sentencepiece-unigram"])
def test_tokenizers_of_bert_and_t5(megalith, tmp_path, kind):
    (tmp_path / "c.txt").write_text("The cat sat on the mat.\nOver and over again, the dog ran.\n" * 40)
    made = tmp_path / "made"
    arguments = ("tokenizer", "train", "--input", tmp_path / "c.txt", "--output", made, "--type", kind)
    code, out, _ = megalith(*arguments, "--vocab-size", "90")
    assert code == 0
    assert str(made / {"wordpiece": "vocab.txt"}.get(kind, "tokenizer.model")) in out.replace("\n", "")
    shown = json.loads(megalith("tokenizer", "inspect", made, "--vocab-extra-ids", "10", "--json")[1])
    assert len(shown["sentinels"]) == 10
    assert shown["special_tokens"]["mask"][0] == {"wordpiece": "[MASK]"}.get(kind, "<MASK>")
    out = megalith("tokenizer", "inspect", made, "--vocab-extra-ids", "10")[1]
    assert re.search(r"sentinels +10: <extra_id_0> \(\d+\) to <extra_id_9>", out)
