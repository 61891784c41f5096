"""`generate` and `evaluate` as a user starts them on several processes: output of one of them, one message, one exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megalith.cli.main import main
from megalith.topology.spawn import free_port
from tests.generate.tiny import save_tiny

ROOT = Path(__file__).parents[2]
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in LAUNCHERS},
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(ROOT / "src"),
    "PYTHONWARNINGS": "ignore",
}
TENSOR, PIPELINE = "model.tensor_model_parallel_size", "model.pipeline_model_parallel_size"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("run"), positions=64)


@pytest.fixture(scope="module")
def commands(run, tmp_path_factory):
    """The commands of this file, all running at the same time. → name → a function that waits: (code, stdout, stderr)"""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "prompts.txt").write_text("the cat\na dog\nsat\n")
    (folder / "text.txt").write_text("the cat sat on the mat " * 20)
    read = ["--checkpoint", str(run), "--precision", "32"]
    torchrun = [
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={free_port()}",
        "-m",
        "megalith",
    ]
    written = {
        "file": ["megalith", "generate", *read, "--input-file", "-", "--temperature", "1", f"{PIPELINE}=2"],
        "perplexity": [
            *torchrun, "evaluate", "perplexity", *read, "--text-file", "text.txt", "--batch-size", "1",
            "--seq-length", "8", "--json", "found.json",
        ],
        "heads": ["megalith", "generate", *read, "--prompt", "the", f"{TENSOR}=3"],
    }  # fmt: skip
    running = {
        name: subprocess.Popen(
            [sys.executable, "-m", *words], env=ENVIRONMENT, cwd=folder, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for name, words in written.items()
    }  # fmt: skip

    def wait(name):
        given = (folder / "prompts.txt").read_text() if name == "file" else None
        out, err = running[name].communicate(given, timeout=240)
        return running[name].returncode, out, err

    yield folder, wait
    for process in running.values():
        process.kill()


def alone(capsys, *arguments):
    """The same in this process."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert not stop.value.code
    return capsys.readouterr().out


def test_a_shared_model_makes_the_same_texts(run, commands, capsys):
    folder, wait = commands
    code, out, err = wait("file")
    assert code == 0, err
    assert err.splitlines() == [
        "! 3 of 3 texts end early: prompt and text fill all 64 positions that the model has"
    ]
    expected = alone(
        capsys, "generate", "--checkpoint", run, "--precision", "32", "--temperature", 1,
        "--input-file", folder / "prompts.txt",
    )  # fmt: skip
    assert out == expected
    assert len(out.splitlines()) == 3


def test_torchrun_and_a_report_of_one_process(run, commands, capsys):
    folder, wait = commands
    code, out, err = wait("perplexity")
    assert code == 0, err
    assert out.count("nats a token") == 1
    alone(
        capsys, "evaluate", "perplexity", "--checkpoint", run, "--precision", "32", "--batch-size", 1,
        "--text-file", folder / "text.txt", "--seq-length", 8, "--json", folder / "alone.json",
    )  # fmt: skip
    found, expected = (json.loads((folder / name).read_text()) for name in ("found.json", "alone.json"))
    assert found["tokens"] == expected["tokens"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_a_model_that_cannot_be_shared_is_one_message(commands):
    _, wait = commands
    code, out, err = wait("heads")
    assert (code, out) == (2, "")
    assert err.count("does not divide heads 4") == 1
    assert "tensor ∈ {1, 2, 4}" in err
    assert "rank" not in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["generate", "--prompt", "the", "trainer.devices=2"], f"trainer.devices=1, or {TENSOR}=2"),
        (["generate", "--interactive", "trainer.devices=4", f"{TENSOR}=2"], f"trainer.devices=2, or {TENSOR}=4"),
        (["generate", "--prompt", "the", f"{PIPELINE}=2", "trainer.devices=4"], f"trainer.devices=2, or {TENSOR}=2"),
        (["generate", "--prompt", "the", "model.virtual_pipeline_model_parallel_size=2"], "with one pipeline stage"),
        (["generate", "--prompt", "the", "--greedy", "--top-p", "0.5"], "--greedy, --top-p"),
        (["generate", "--prompt", "the", "--top-p", "1.5"], "--top-p: 1.5 is not a probability"),
        (["generate", "--prompt", "the", "--device", "cpu", "trainer.accelerator=gpu"], "--device, trainer.accelerator"),
        (["evaluate", "lambada", "--data", "x", "trainer.device=2"], "did you mean trainer.devices"),
        (["evaluate", "perplexity", "trainer.devices=3", f"{TENSOR}=2"], "trainer.devices ∈ {2, 4, 6, …}"),
        (["evaluate", "wikitext", "--data", "x", "trainer.devices=64", "trainer.accelerator=gpu"], "64 GPUs asked for"),
    ],
)  # fmt: skip
def test_what_cannot_be_started_is_told_before_anything_is(run, capsys, command, words):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--checkpoint", str(run)])
    told = capsys.readouterr()
    assert stop.value.code == 2
    assert words in " ".join(told.err.split())
    assert told.out == ""


def test_one_process_by_keys(run, capsys):
    """Keys that ask for what options do give what options give."""
    text = alone(
        capsys, "generate", "--checkpoint", run, "--prompt", "the", "--precision", "32", "--device", "cpu"
    )
    keys = (
        "trainer.accelerator=cpu",
        "trainer.precision=32",
        "trainer.devices=1",
        "model.sequence_parallel=true",
    )
    assert alone(capsys, "generate", "--checkpoint", run, "--prompt", "the", *keys) == text
