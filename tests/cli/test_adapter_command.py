"""`megalith adapter`, and `megalith generate --prompts`: what is printed, what is written, and how mistakes are answered."""

from __future__ import annotations

import json

import pytest
import torch

from megalith.adapt.adapter import Adapter, Base
from megalith.adapt.artefact import open_adapter, save
from megalith.adapt.fingerprint import fingerprint_of
from megalith.adapt.lora import LoRA
from megalith.checkpoint.convert.source import open_source
from megalith.cli.main import main
from tests.adapt.test_artefact import prompts
from tests.generate.tiny import save_tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(run folder, folder of an adapter with the tags a and b for it, one of another model's)."""
    folder = tmp_path_factory.mktemp("made")
    run = save_tiny(folder / "run")
    save(prompts("a", "b", base=Base(fingerprint_of(run), str(run))), folder / "ab")
    save(prompts("c", base=Base("f0", "gpt.nemo")), folder / "c")
    return run, folder / "ab", folder / "c"


def call(capsys, *words) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    found = capsys.readouterr()
    return int(stop.value.code or 0), found.out, found.err


def generate(capsys, run, *words):
    return call(capsys, "generate", "--checkpoint", run, "--tokens-to-generate", 4, "--device", "cpu", *words)


ROWS = [
    {"prompt_tag": "a", "text": "the cat", "answer": "is not read"},
    {"text": "the cat"},
    {"prompt_tag": ["b"], "text": ["the cat"]},
    {"taskname": "b", "text": "a dog sat"},
    {"prompt_tag": "", "text": "a dog sat"},
]


def test_rows_of_all_tasks_in_the_order_of_the_file(made, tmp_path, capsys):
    run, adapter, _ = made
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    words = ("--prompts", adapter, "--input-file", tmp_path / "in.jsonl", "--batch-size", 16)
    code, out, err = generate(capsys, run, *words)
    assert (code, err) == (0, "")
    found = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt_tag"] for row in found] == ["a", None, "b", "b", None]
    assert [row["text"] for row in found] == ["the cat"] * 3 + ["a dog sat"] * 2
    assert len({tuple(row["tokens"]) for row in found[:3]}) == 3
    code, again, _ = generate(capsys, run, *words, "--output-file", tmp_path / "out.jsonl")
    assert (code, again, (tmp_path / "out.jsonl").read_text()) == (0, "", out)


def test_one_text_with_a_tag(made, capsys, tmp_path):
    run, adapter, _ = made
    words = ("--prompts", adapter, "--prompt", "the cat", "--prompt-tag", "b")
    code, shown, _ = generate(capsys, run, *words)
    assert code == 0
    assert generate(capsys, run, *words, "--output-file", tmp_path / "o")[0] == 0
    (line,) = map(json.loads, (tmp_path / "o").read_text().splitlines())
    assert line["prompt_tag"] == "b"
    assert shown == f"the cat{line['completion']}\n"
    assert len(line["token_logprobs"]) == len(line["tokens"]) == 4


@pytest.mark.parametrize(
    ("words", "rows", "said"),
    [
        (["--prompts", "AB"], [{"prompt_tag": "z", "text": "x"}, *ROWS], ["1 of 6 lines", "line 1: asks for the prompt 'z'; there are a, b"]),
        (["--prompts", "AB"], [{"words": "x"}], ["line 1: has neither a \"prompt_tag\" nor a \"text\""]),
        (["--prompts", "AB"], [{"prompt_tag": 0, "text": "x"}], ["line 1: asks for the prompt '0'"]),
        (["--prompts", "AB"], [{"prompt_tag": "a"}], ["line 1: has no text, which a needs"]),
        (["--prompts", "AB"], [{"prompt_tag": "a", "text": "a " * 90}], ["its prompt 2 virtual ones; the model reads 47 at most"]),
        ([], ROWS, ["3 of 5 lines", "line 1: asks for the prompt 'a', and no prompts were given (--prompts FOLDER)"]),
        (["--prompts", "C"], ROWS, ["made for another base model: gpt.nemo", "--force"]),
        (["--prompts", "AB", "--prompts", "AB"], ROWS, ["2 problems", "the tag 'a' is in"]),
        (["--prompts", "AB", "--prompts", "C"], ROWS, ["it is for another base model than"]),
        (["--prompts", "RUN"], ROWS, ["there is no adapter in it: it is the folder of a run", "start its command again"]),
    ],
)  # fmt: skip
def test_mistakes_write_nothing(made, tmp_path, capsys, words, rows, said):
    run, adapter, other = made
    places = {"AB": adapter, "C": other, "RUN": run}
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [places.get(word, word) for word in words]
    out = tmp_path / "out.jsonl"
    code, _, err = generate(capsys, run, *words, "--input-file", tmp_path / "in.jsonl", "--output-file", out)
    assert code == 2
    assert all(word in err for word in said), err
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", "x", "--prompt-tag", "a"], "--prompt-tag: names a prompt, and no prompts were given"),
        (
            ["--num-samples", "2", "--prompt-tag", "a", "--prompts", "x"],
            "goes with --prompt or --interactive",
        ),
        (["--use_soft_prompts", "--prompt", "x"], "--prompts takes a folder or a .nemo"),
        (["--model_file", "x"], "--checkpoint takes a .nemo"),
        (["--path_to_file", "x"], "--input-file takes it"),
        (["--tokens_to_generate", "3"], "did you mean --tokens-to-generate"),
        (["--batch_size", "3"], "did you mean --batch-size"),
        (["--prompt_tag", "3"], "did you mean --prompt-tag"),
    ],
)
def test_flags_of_another_spelling(made, capsys, words, said):
    code, _, err = generate(capsys, made[0], *words)
    assert code == 2
    assert said in err


def test_forced(made, capsys):
    run, _, other = made
    words = ("--prompts", other, "--prompt", "the cat", "--prompt-tag", "c", "--force")
    code, out, err = generate(capsys, run, *words)
    assert (code, out[:7]) == (0, "the cat")
    assert "it is used because you said so" in err


def test_show(made, capsys):
    code, out, _ = call(capsys, "adapter", "show", made[1])
    assert code == 0
    for word in (
        "soft-prompt",
        "gpt",
        "a (2 virtual tokens), b (3 virtual tokens)",
        "320 (float32)",
        str(made[0]),
    ):
        assert word in out


def test_export(made, capsys, tmp_path):
    run, adapter, other = made
    code, out, _ = call(
        capsys,
        "adapter",
        "export",
        adapter,
        "--checkpoint",
        run,
        "--to",
        "peft",
        "--output",
        tmp_path / "peft",
    )
    assert (code, out.split()) == (0, [str(tmp_path / "peft" / tag) for tag in "ab"])
    assert open_adapter(tmp_path / "peft" / "b").tags[0].length == 3
    words = ("--checkpoint", run, "--to", "native", "--output", tmp_path / "both")
    code, out, _ = call(capsys, "adapter", "export", tmp_path / "peft" / "b", tmp_path / "peft" / "a", *words)
    assert (code, open_adapter(tmp_path / "both").names) == (0, ("b", "a"))
    assert open_adapter(tmp_path / "both").base.fingerprint == fingerprint_of(run)
    for words, said in (
        (("--to", "peft", "--output", tmp_path / "peft"), "exists already"),
        (("--to", "onnx", "--output", tmp_path / "x"), "one of native, peft, nemo"),
        (("--to", "nemo", "--output", tmp_path / "x"), "called ….nemo"),
    ):
        code, _, err = call(capsys, "adapter", "export", adapter, "--checkpoint", run, *words)
        assert code == 2
        assert said in err
    code, _, err = call(
        capsys, "adapter", "export", other, "--checkpoint", run, "--to", "peft", "--output", tmp_path / "x"
    )
    assert (code, "another base model" in err) == (2, True)
    assert not (tmp_path / "x").exists()


def test_loras_of_peft_are_shown_beside_their_model(made, capsys, tmp_path):
    run, *_ = made
    config = open_source(run).config
    method = LoRA(rank=2, targets=("qkv",))
    tensors = {name: torch.ones(shape) for name, shape in method.shapes(config).items()}
    given = save(Adapter("lora", "gpt", tensors, settings=method.describe()), tmp_path / "lora")
    words = ("--checkpoint", run, "--to", "peft", "--output", tmp_path / "peft")
    assert call(capsys, "adapter", "export", given, *words)[0] == 0
    code, _, err = call(capsys, "adapter", "show", tmp_path / "peft")
    assert (code, "name the model, too: --checkpoint" in err) == (2, True)
    code, out, _ = call(capsys, "adapter", "show", tmp_path / "peft", "--checkpoint", run)
    assert (code, "rank 2" in out) == (0, True)
    _, out, _ = call(capsys, "adapter", "show", given)
    assert "targets [qkv]\n" in out, "as they are typed, and nothing that is empty"
