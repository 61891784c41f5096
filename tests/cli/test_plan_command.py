"""`megalith plan` on the command line: exit codes, the file, and what is refused."""

from __future__ import annotations

import json

import pytest

from megalith.cli.main import main

NANO = ["plan", "model.preset=gpt-nano", "model.encoder_seq_length=64", "model.micro_batch_size=2"]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code


def test_a_plan_that_fits(capsys, tmp_path):
    out = tmp_path / "deep" / "plan.json"
    assert (
        run(*NANO, "--vocab-size", "512", "--device", "H100", "--step-time", "0.01", "--json", str(out)) == 0
    )
    shown = capsys.readouterr().out
    assert "Fits" in shown
    assert "model TFLOP/s" in shown
    found = json.loads(out.read_text("utf-8"))
    assert found["vocabulary"] == {"size": 512, "from": "model.vocab_size"}
    assert found["measured_step_seconds"] == 0.01


def test_a_plan_that_does_not_fit(capsys):
    assert run("plan", "model.preset=gpt3-13b", "model.micro_batch_size=1", "--device", "V100-16") == 1
    shown = capsys.readouterr().out
    assert "Does not fit" in shown
    assert "more devices, or larger ones" in shown


@pytest.mark.parametrize(
    ("family", "more", "said"),
    [
        ("bert", [], "1 layers"),
        ("t5", ["model.pipeline_model_parallel_size=2"], "8 samples of 32 + 16"),
        ("bart", ["model.tensor_model_parallel_size=2"], "1 + 1 layers"),
    ],
)
def test_other_families(capsys, family, more, said):
    sizes = ["model.num_layers=1", "model.hidden_size=32", "model.num_attention_heads=2"]
    sizes += ["model.ffn_hidden_size=64", "model.encoder_seq_length=32"]
    sizes += ["model.data.seq_length_dec=16"] if family == "t5" else []
    named = ["--config-name", f"megatron_{family}_config", "--vocab-size", "512", "--device", "H100"]
    assert run("plan", *named, *sizes, *more) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert said in shown
    assert "Fits" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "H1000"], "no device is called"),
        (["--step-time", "0"], "--step-time"),
        (["--efficiency", "1.5", "--step-time", "-1"], "--efficiency"),
        (["trainer.devices=3"], "not a multiple"),
        (["model.tensor_model_parallel_size=5"], "does not divide"),
        (["model.zero_stage=7"], "zero_stage"),
        (["model.expert_model_parallel_size=2"], "not built"),
    ],
)
def test_what_is_refused(capsys, arguments, said):
    assert run(*NANO, *arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert not captured.out
