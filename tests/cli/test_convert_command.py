"""`megalith checkpoint convert` as a user runs it: what it says, its exit codes, and `verify` of what it wrote."""

from __future__ import annotations

import json

import pytest

from megalith.checkpoint.convert import to_megatron
from megalith.checkpoint.formats.megatron_tables import legacy
from megalith.cli.main import main
from megalith.models.config import ModelConfig
from tests.checkpoint.foreign_files import GPT2_LIKE, hugging_face, random_model


@pytest.fixture
def source(tmp_path):
    return hugging_face(tmp_path / "hf", random_model(ModelConfig(**GPT2_LIKE)))


@pytest.fixture
def run(capsys):
    """A command line → its exit code and what it printed."""

    def command(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            raise SystemExit(main(["checkpoint", *map(str, words)]))
        said = capsys.readouterr()
        return int(caught.value.code or 0), said.out, said.err

    return command


def test_converts_and_says_so(tmp_path, source, run):
    out = tmp_path / "out"
    code, said, _ = run(
        "convert", source, out, "--to", "megatron", "--target-tensor-parallel-size", 2,
        "--pipeline-model-parallel-size", 2, "--virtual-pipeline-model-parallel-size", 2, "--dtype", "bf16",
    )  # fmt: skip
    assert code == 0
    assert "logits     differ by 0 at most" in said
    assert "rounding   changes logits by" in said
    assert "English    not scored: there is no tokenizer" in said
    assert len(list(out.rglob("*.pt"))) == 4
    assert run("verify", out)[:2] == (0, f"{out}: whole\n")
    file = next(out.rglob("*.pt"))
    file.write_bytes(file.read_bytes()[:-1])
    code, said, _ = run("verify", out)
    assert code == 1
    assert "the certificate says" in said
    code, _, said = run("convert", out, tmp_path / "again", "--to", "native")
    assert code == 2
    assert not (tmp_path / "again").exists()


def test_a_conversion_that_fails_ends_with_1(tmp_path, source, run, monkeypatch):
    monkeypatch.setattr(to_megatron, "legacy", lambda version, family: legacy(0, family))
    code, said, error = run("convert", source, tmp_path / "out", "--to", "megatron")
    assert (code, said) == (1, "")
    assert "does not compute what the source does" in error
    assert f"{tmp_path / 'out'} was not written" in " ".join(error.split("\n"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "onnx"], "'onnx' is no format"),
        (["--to", "native", "--tensor-model-parallel-size", "2"], "means nothing with --to native"),
        (["--to", "megatron", "--tensor-model-parallel-size", "8"], "do not divide among 8"),
        (["--to", "native", "--optimizer"], "is not read"),
        (["--to", "native", "--tokenizer", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_end_with_2(tmp_path, source, run, words, message):
    code, _, error = run("convert", source, tmp_path / "out", *words)
    assert code == 2
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_damaged_certificate(tmp_path, source, run):
    out = tmp_path / "out"
    run("convert", source, out, "--to", "huggingface")
    said = json.loads((out / "conversion.json").read_text())
    assert said["read_back_by"].startswith("transformers ") or said["read_back_by"] == "self-consistent only"
    said["target"]["files"] = {"../hf/config.json": {"bytes": 1, "sha256": ""}}
    (out / "conversion.json").write_text(json.dumps(said))
    code, _, error = run("verify", out)
    assert code == 2
    assert "not the certificate of a conversion" in error
