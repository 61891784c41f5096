"""`megalith checkpoint inspect|verify` as a user runs them, and that they start without torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from megalith.cli.checkpoint import app
from megalith.errors import CheckpointError
from megalith.models.config import ModelConfig

from .foreign_files import GPT2_LIKE, hugging_face, megatron, random_model
from .helpers import checkpointer, tensors_of

CONFIG = """
name: megatron_gpt
trainer: {precision: bf16-mixed}
model: {num_layers: 12, hidden_size: 768, optim: {name: adamw, lr: 6e-4}}
"""


@pytest.fixture
def run(tmp_path):
    saver = checkpointer(tmp_path / "checkpoints")
    for step in (10, 20):
        state = {
            "consumed_samples": 80 * step,
            "consumed_tokens": 10240 * step,
            "data_plan": {
                "train": {
                    "order": "native",
                    "samples": 360,
                    "idx_sha256": "c0ffee",
                    "sources": [{"path": f"wiki{n}", "tokens": 7, "sha256": "c0ffee"} for n in range(10)],
                },
                "note": "x" * 500,
            },
        }
        saver.save(step, tensors_of(step), state, config_yaml=CONFIG, metrics={"val_loss": 3.25})
    return tmp_path


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_inspect_tells_what_is_there(run):
    result = invoke("inspect", run)
    assert result.exit_code == 0, result.output
    flat = " ".join(result.output.split())
    for text in (
        "step 20",
        "consumed samples 1,600",
        "consumed tokens 204,800",
        "val_loss 3.25",
        "model 6 tensors, 66 numbers",
        "BF16 × 1",
        "optim 2 tensors, 56 numbers, 224 B (F32 × 2)",
        "model.hidden_size 768",
        "trainer.precision bf16-mixed",
        "train: order native, samples 360",
        "from path wiki0, tokens 7",
        "from path wiki7, tokens 7",
        "and 2 more",
        "model.safetensors",
    ):
        assert text in flat
    assert "c0ffee" not in flat
    assert "wiki8" not in flat
    assert "x…" in flat, "long values of the plan are cut"


def test_inspect_json_is_complete(run):
    result = invoke("inspect", run / "checkpoints/step_0000010", "--json")
    summary = json.loads(result.output)
    assert (summary["step"], summary["consumed_samples"], summary["sequence"]) == (10, 800, 1)
    assert summary["config"]["model"]["optim"]["name"] == "adamw"
    assert summary["state"]["data_plan"]["train"]["samples"] == 360
    assert summary["metrics"]["val_loss"] == 3.25
    assert len(summary["files"]["model.safetensors"]["sha256"]) == 64
    assert summary["bytes"] == sum(f["bytes"] for f in summary["files"].values())


def test_inspect_refuses_small_files_that_changed_and_takes_a_config_that_is_no_yaml(run):
    folder = checkpointer(run / "checkpoints").save(30, tensors_of(30), {}, config_yaml="a: [")
    assert json.loads(invoke("inspect", folder, "--json").output)["config"] == "a: ["
    (folder / "state.json").write_text("x" * (folder / "state.json").stat().st_size)
    result = invoke("inspect", folder)
    assert isinstance(result.exception, CheckpointError)
    assert "state.json: its content changed" in str(result.exception)


def test_verify_says_whole_or_lists_every_problem(run):
    result = invoke("verify", run)
    assert result.exit_code == 0
    assert result.output.count(": whole\n") == 2
    folder = run / "checkpoints/step_0000010"
    (folder / "optim.safetensors").unlink()
    (folder / "stray").touch()
    (folder / "config.yaml").write_text("x" * len(CONFIG))
    result = invoke("verify", run)
    assert result.exit_code == 1
    assert f"{folder}: damaged" in result.output
    for line in (
        "optim.safetensors: missing",
        "stray: not in the manifest",
        "config.yaml: its content changed",
    ):
        assert f"  {line}" in result.output
    assert result.output.count(": whole\n") == 1
    assert invoke("verify", run / "checkpoints/step_0000020").exit_code == 0
    (folder / "manifest.json").unlink()
    result = invoke("verify", folder)
    assert result.exit_code == 1
    assert "no manifest.json" in result.output


def test_a_mistyped_path_is_a_user_error(run):
    for command in ("inspect", "verify"):
        assert isinstance(invoke(command, f"{run}x").exception, CheckpointError)


def test_neither_command_imports_torch(run):
    code = (
        "import sys\nfrom megalith.cli.checkpoint import app\n"
        "for command in ('inspect', 'verify'):\n"
        "    try: app([command, sys.argv[1]])\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules and 'lightning' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["huggingface", "megatron"])
def test_inspect_tells_what_another_program_saved(tmp_path, kind):
    model = random_model(ModelConfig(**GPT2_LIKE))
    if kind == "huggingface":
        hugging_face(tmp_path, model)
    else:
        megatron(tmp_path, model, version=1, sizes=(2, 2))
    text = invoke("inspect", tmp_path).output
    for said in (kind, "num_layers 4", "float64", "hidden_size 16"):
        assert said in text
    summary = json.loads(invoke("inspect", tmp_path, "--json").output)
    assert summary["kind"] == kind
    assert summary["architecture"]["num_attention_heads"] == 4
    if kind == "megatron":
        assert "iteration: 7" in text
        assert "checkpoint_version: 1" in text
        assert "activation: by bias_gelu_fusion=True (args)" in text
        table = summary["tensors"]["language_model.embedding.word_embeddings.weight"]
        assert table == {"dtype": "float64", "shapes": [[16, 16], [16, 16]], "bytes": 4096}
        assert summary["provenance"]["args"]["consumed_train_samples"] == 56


def test_inspect_of_a_file_that_does_not_say_takes_what_a_person_says(tmp_path):
    megatron(tmp_path / "run", random_model(ModelConfig(**GPT2_LIKE)), args={})
    result = invoke("inspect", tmp_path / "run")
    assert isinstance(result.exception, CheckpointError)
    assert "--config-file" in str(result.exception)
    (tmp_path / "sizes.json").write_text('{"num-attention-heads": 4}')
    told = invoke("inspect", tmp_path / "run", "--config-file", tmp_path / "sizes.json").output
    assert "num_attention_heads: by num_attention_heads (sizes.json)" in told
