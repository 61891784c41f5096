"""`megalith generate` on a T5 and a BERT: blanks filled and guessed, searches, files, and what does not fit told in one message."""

import io
import json

import pytest

from megalith.cli.main import main
from tests.generate.families import save_family


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for family in ("t5", "bert"):
        save_family(folder / family, family, precision="32")
    return folder


@pytest.fixture
def generate(runs, capsys):
    """A function: family, arguments → (exit code, stdout, stderr). A bug's message or a traceback fails the test."""

    def call(family, *arguments):
        given = ["--checkpoint", runs / family, "--precision", "32", *arguments]
        with pytest.raises(SystemExit) as stop:
            main(["generate", *(str(argument) for argument in given)])
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        assert "bug" not in output.err
        return stop.value.code or 0, output.out, " ".join(output.err.split())

    return call


def rows(text):
    return [json.loads(line) for line in text.splitlines()]


T5 = ("t5", "--tokens-to-generate", 7)


def test_a_t5_fills_blanks(generate):
    prompt = ("--prompt", "the <mask> sat on the <mask>.")
    code, out, err = generate(*T5, *prompt)
    assert (code, err) == (0, "")
    (row,) = rows(generate(*T5, *prompt, "--output-file", "-")[1])
    assert list(row) == ["prompt", "text", "decoded", "tokens", "finished"]
    assert out == row["text"] + "\n"
    assert "<mask>" not in out
    assert out.startswith("the ")
    assert generate(*T5, *prompt, "--recompute")[1] == out


def test_the_best_texts_of_a_search(generate):
    given = (*T5, "--prompt", "a dog ran", "--beams", 3, "--num-samples", 2)
    code, out, _ = generate(*given)
    found = rows(generate(*given, "--output-file", "-")[1])
    assert code == 0
    assert [row["score"] for row in found] == sorted((row["score"] for row in found), reverse=True)
    for number, row in enumerate(found, 1):
        assert f"--- {number} of 2, score {row['score']:.4f} ---\n{row['text']}\n" in out
    (best,) = rows(generate(*given[:-2], "--output-file", "-")[1])
    assert best == found[0]


def test_a_bert_guesses(generate, tmp_path):
    code, out, err = generate("bert", "--prompt", "the [MASK] sat on the <mask>.", "--top-k", 3)
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 1 + 1 + 2 * 3
    source = tmp_path / "in.txt"
    source.write_text("the [MASK] sat on the <mask>.\n[MASK] dog\n")
    first, second = rows(generate("bert", "--input-file", source, "--top-k", 3)[1])
    assert first["text"] == out.splitlines()[0]
    assert [len(guesses) for guesses in first["masks"] + second["masks"]] == [3, 3, 3]
    for guesses in first["masks"]:
        assert [each["probability"] for each in guesses] == sorted(
            (each["probability"] for each in guesses), reverse=True
        )
        assert f"{guesses[0]['probability']:.4f}" in out


def test_a_conversation(generate, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("the <mask>\nnothing\n"))
    code, out, err = generate("bert", "--interactive", "--top-k", 1)
    assert code == 0
    assert out == generate("bert", "--prompt", "the <mask>", "--top-k", 1)[1]
    assert "no blank for a BERT" in err


@pytest.mark.parametrize(
    ("family", "arguments", "words"),
    [
        ("bert", ["--prompt", "a [MASK]", "--temperature", 1, "--logprobs"], "--temperature, --logprobs: a BERT guesses"),
        ("bert", ["--prompt", "nothing"], "no blank for a BERT"),
        ("bert", ["--prompt", "[MASK] " * 30], "the encoder reads 24 at most"),
        ("bert", ["--num-samples", 2], "a BERT guesses words"),
        ("t5", ["--num-samples", 2], "a T5, which answers a prompt"),
        ("t5", ["--prompt", "<mask> " * 6], "the tokenizer has 5 sentinel tokens"),
        ("t5", ["--prompt", "a", "--bos"], "is a GPT's"),
        ("t5", ["--prompt", "a", "--beams", 2, "--top-p", 0.5], "a search draws no token"),
        ("t5", ["--prompt", "a", "--length-penalty", 2], "is a search's, and --beams is 1"),
        ("t5", ["--prompt", "a", "model.virtual_pipeline_model_parallel_size=2"], "a process reads with one pipeline stage"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_message(generate, family, arguments, words):
    code, out, err = generate(family, *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("✗") == 1
