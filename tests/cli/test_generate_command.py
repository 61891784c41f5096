"""`megalith generate` from the command line: each way of asking, exit codes, no traceback."""

import io
import json

import pytest

from megalith.cli.main import main
from tests.generate.tiny import save_tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("run"), positions=64)


@pytest.fixture
def generate(run, capsys):
    """A function: arguments → (exit code, stdout, stderr). A bug's message or a traceback fails the test."""

    def call(*arguments, tokens=6):
        given = ["--checkpoint", run, "--tokens-to-generate", tokens, "--precision", "32", *arguments]
        with pytest.raises(SystemExit) as stop:
            main(["generate", *(str(argument) for argument in given)])
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        assert "bug" not in output.err
        return stop.value.code or 0, output.out, output.err

    return call


def rows(text):
    return [json.loads(line) for line in text.splitlines()]


def test_a_prompt_is_streamed_behind_itself(generate):
    code, out, err = generate("--prompt", "the cat")
    assert (code, err) == (0, "")
    assert out.startswith("the cat")
    assert out.endswith("\n")
    (row,) = rows(generate("--prompt", "the cat", "--output-file", "-")[1])
    assert out == "the cat" + row["text"] + "\n"
    assert len(row["tokens"]) == 6
    assert generate("--prompt", "the cat", "--recompute")[1] == out


def test_several_samples_of_a_prompt(generate):
    code, out, _ = generate("--prompt", "the", "--num-samples", 3)
    assert code == 0
    texts = [
        row["text"] for row in rows(generate("--prompt", "the", "--num-samples", 3, "--output-file", "-")[1])
    ]
    assert len(set(texts)) > 1
    assert "--- 2 of 3 ---\nthe" + texts[1] in out


def test_log_probabilities(generate):
    code, out, _ = generate("--prompt", "the", "--logprobs", tokens=2)
    assert code == 0
    assert "log-probability" in out
    (row,) = rows(generate("--prompt", "the", "--logprobs", "--output-file", "-", tokens=2)[1])
    for token, value in zip(row["tokens"], row["logprobs"], strict=True):
        assert str(token) in out
        assert f"{value:.4f}" in out


def test_a_file_in_a_file_out(generate, tmp_path):
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_bytes(b"the cat\r\na dog\n\nplease stop\nlast")
    code, out, err = generate("--sample-input-file", source, "--sample-output-file", target)
    assert (code, out, err) == (0, "", "")
    found = rows(target.read_text("utf-8"))
    assert [row["prompt"] for row in found] == ["the cat", "a dog", "", "please stop", "last"]
    assert {tuple(row) for row in found} == {("prompt", "text", "tokens", "finished")}
    for size in (1, 2):
        assert rows(generate("--input-file", source, "--batch-size", size)[1]) == found


def test_a_file_of_one_line(generate, tmp_path):
    source = tmp_path / "in.txt"
    source.write_text("the cat")
    assert [row["prompt"] for row in rows(generate("--input-file", source)[1])] == ["the cat"]


def test_bad_lines_are_named_and_nothing_is_written(generate, tmp_path):
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_bytes(b"the cat\n" + b"b" * 90 + b"\n")
    code, _, err = generate("--input-file", source, "--output-file", target)
    assert code == 2
    assert "line 2: the prompt has 90 tokens" in err
    assert not target.exists()


def test_unconditional_samples(generate, tmp_path):
    code, out, err = generate("--num-samples", 4)
    assert (code, err) == (0, "")
    found = rows(out)
    assert {tuple(row) for row in found} == {("text", "length", "finished")}
    assert len({row["text"] for row in found}) == 4
    target = tmp_path / "samples.jsonl"
    assert generate("--num-samples", 4, "--genfile", target, "--micro-batch-size", 1)[0] == 0
    assert rows(target.read_text("utf-8")) == found
    assert rows(generate("--num-samples", 4, "--seed", 5)[1]) != found
    code, _, err = generate("--num-samples", 4, "--greedy")
    assert code == 2
    assert "4 times the same text" in err


def test_a_conversation_through_a_pipe(generate, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n\nstop\n"))
    code, out, err = generate("--interactive")
    assert (code, err) == (0, "")
    alone = [generate("--prompt", prompt)[1] for prompt in ("the cat", "stop")]
    assert out == "".join(alone)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to continue"),
        (["--num-samples", 0, "--genfile", "x"], "nothing to continue"),
        (["--prompt", "a", "--input-file", "b"], "keep one"),
        (["--prompt", "a", "--interactive"], "keep one"),
        (["--interactive", "--num-samples", 2], "goes alone, or with --prompt"),
        (["--prompt", "a", "--genfile", "x"], "use --output-file"),
        (["--num-samples", 2, "--output-file", "x"], "goes with --prompt or --input-file"),
        (["--prompt", "a", "--top-p", 7], "not a probability"),
        (["--input-file", "absent.txt"], "cannot be read"),
        (["--prompt", "b" * 70], "70 tokens"),
        (["--prompt", "a", "--tokenizer", "absent.json"], "no such tokenizer"),
    ],
)
def test_mistakes_are_told(generate, arguments, words):
    code, out, err = generate(*arguments)
    assert code == 2
    assert words in err
    assert out == ""


def test_names_of_the_reference(generate):
    code, out, _ = generate("--prompt", "the", "--out-seq-length", 2, "--top_k", 5, "--top_p", 0.9)
    assert code == 0
    assert out.startswith("the")


def test_a_text_that_fills_the_position_table_ends_with_a_notice(generate, run, tmp_path):
    code, out, err = generate("--prompt", "the cat", tokens=200)
    assert code == 0
    assert "the text ends early: prompt and text fill all 64 positions" in " ".join(err.split())
    code, out, err = generate("--prompt", "the cat", "--output-file", "-", tokens=200)
    (row,) = rows(out)
    assert (code, row["finished"]) == (0, "positions")
    source = tmp_path / "prompts.txt"
    source.write_text("the cat sat on the mat\nthe")
    code, out, err = generate("--input-file", source, tokens=60)
    assert [row["finished"] for row in rows(out)] == ["positions", "length"]
    assert "1 of 2 texts end early" in " ".join(err.split())
    assert generate("--prompt", "the", tokens=60)[2] == ""


def test_a_prompt_longer_than_the_position_table_is_one_message(generate):
    code, out, err = generate("--prompt", "the cat sat on the mat " * 30)
    assert (code, out) == (2, "")
    assert "the model reads 64 at most" in " ".join(err.split())


def test_rotary_positions_go_on_beyond_the_trained_length_with_a_notice(generate, tmp_path):
    rotary = save_tiny(tmp_path, positions=16, position_embedding_type="rope")
    code, out, err = generate("--checkpoint", rotary, "--prompt", "the", "--output-file", "-", tokens=30)
    (row,) = rows(out)
    assert (code, row["finished"], len(row["tokens"])) == (0, "length", 30)
    assert "the text is longer than the 16 tokens that the model was trained on" in " ".join(err.split())
    assert generate("--checkpoint", rotary, "--prompt", "the", tokens=8)[2] == ""
