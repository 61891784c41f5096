"""`megalith evaluate wikitext|lambada|perplexity` from the command line: what they print, JSON, exit codes."""

import json
import os

import pytest

from megalith.cli.main import main
from tests.generate.tiny import save_tiny

TEXT = " \n = The cat = \n \n The cat 's mat , a dog ( sat ) on the cat . \n" * 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("run"), positions=64)


@pytest.fixture
def evaluate(run, capsys):
    """A function: task and arguments → (exit code, stdout, stderr)."""

    def call(task, *arguments):
        given = [task, "--checkpoint", run, "--precision", "32", *arguments]
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", *(str(argument) for argument in given)])
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        assert "bug" not in output.err
        return stop.value.code or 0, output.out, output.err

    return call


def test_wikitext(evaluate, tmp_path):
    text, numbers = tmp_path / "wiki.test.tokens", tmp_path / "numbers.json"
    text.write_text(TEXT, "utf-8")
    code, out, err = evaluate("wikitext", "--valid-data", text, "--json", numbers)
    assert (code, err) == (0, "")
    found = json.loads(numbers.read_text())
    lines = out.splitlines()
    rule, line = lines[-4], lines[-3]
    assert line.startswith(" validation results on WIKITEXT103 | avg loss: ")
    assert line.endswith(f"| token ratio: {found['token_ratio']} |")
    assert rule == lines[-2] == "-" * (len(line) + 1)
    assert lines[-1] == "done :-)"
    assert f"{found['adjusted_perplexity']:.2f} a word" in out
    assert (found["task"], found["detokenizer"], found["overlapping_eval"], found["step"]) == (
        "wikitext",
        "wiki",
        32,
        7,
    )
    again = evaluate("wikitext", "--data", text, "--micro-batch-size", 2)[1]
    assert again.splitlines()[0] == lines[0]


def test_lambada(evaluate, tmp_path):
    file, numbers = tmp_path / "lambada.jsonl", tmp_path / "numbers.json"
    passages = ["the cat sat on the mat", "a dog sat on the cat", "the cat " * 40 + "sat"]
    file.write_text("".join(json.dumps({"text": p}) + "\n" for p in passages), "utf-8")
    code, out, err = evaluate("lambada", "--data", file, "--strict-lambada", "--json", numbers)
    assert (code, err) == (0, "")
    found = json.loads(numbers.read_text())
    assert (found["task"], found["strict"], found["examples"], found["cut"]) == ("lambada", True, 3, 1)
    assert "the last word (strict)" in out
    assert "1: longer than the model reads" in out
    assert " validation results on LAMBADA | number correct: " in out
    assert "| total examples: 3.0000E+00 | avg accuracy: " in out
    assert "the last token (loose)" in evaluate("lambada", "--data", file)[1]


def test_perplexity_of_a_text(evaluate, tmp_path):
    text, numbers = tmp_path / "text.txt", tmp_path / "numbers.json"
    text.write_text(TEXT, "utf-8")
    code, out, _ = evaluate("perplexity", "--text-file", text, "--json", numbers)
    assert code == 0
    assert f"{json.loads(numbers.read_text())['perplexity']:.2f}" in out


@pytest.mark.parametrize(
    ("task", "arguments", "words"),
    [
        ("wikitext", ["--data", "absent.txt"], "--detokenizer"),
        ("wikitext", ["--data", "wiki.absent"], "cannot be read"),
        ("wikitext", ["--data", "wiki.absent", "--detokenizer", "wikki"], "'wikki' is not one"),
        ("lambada", ["--data", "absent.jsonl"], "cannot be read"),
        ("lambada", ["--data", "absent.jsonl", "--seq-length", 65], "65 is longer than the 64 positions"),
        ("perplexity", ["--data", "a", "--text-file", "b"], "keep one"),
        ("perplexity", ["--text-file", os.devnull], f"{os.devnull}: holds nothing to score"),
    ],
)
def test_mistakes_are_told(evaluate, task, arguments, words):
    code, out, err = evaluate(task, *arguments)
    assert (code, out) == (2, "")
    assert words in err


def test_numbers_that_cannot_be_written_are_printed(evaluate, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT, "utf-8")
    code, out, err = evaluate("perplexity", "--text-file", text, "--json", tmp_path / "no" / "where.json")
    assert code == 2
    assert "perplexity" in out
    assert "the numbers stand above" in err


@pytest.mark.parametrize("better", [True, False])
def test_a_check_that_fails_says_so(evaluate, tmp_path, monkeypatch, better):
    from megalith.evaluate import perplexity

    text = tmp_path / "text.txt"
    text.write_text(TEXT, "utf-8")
    names = ("untrained_perplexity", "unigram_perplexity", "bigram_perplexity")
    measured = dict.fromkeys(names, 1e9 if better else 1.0)
    monkeypatch.setattr(perplexity, "baselines", lambda *_: measured)
    code, _, err = evaluate("perplexity", "--text-file", text, "--check")
    assert code == (0 if better else 1)
    assert err == ("" if better else "✗ --check: step 7 is not below every baseline\n")
