"""The scripts of examples/: each composes for the number of processes it asks for, and tiny variants of them run."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from megalith.config.compose import compose
from megalith.errors import EXIT_STOPPED
from megalith.tasks.pretrain_config import PretrainGPTConfig
from megalith.topology.sizes import Sizes
from tests.tasks.nano import losses, make_corpus

from .shims import MEGALITH, RECORD, ROOT, SRUN, TORCHRUN, Scripts

SCRIPTS = sorted([*ROOT.glob("examples/**/*.sh"), *ROOT.glob("examples/**/*.sbatch")])
TINY = (
    "model.num_layers=2", "model.hidden_size=16", "model.num_attention_heads=2", "model.ffn_hidden_size=32",
    "model.encoder_seq_length=16", "model.max_position_embeddings=16", "trainer.accelerator=cpu", "trainer.precision=32",
    "trainer.log_every_n_steps=1", "trainer.val_check_interval=null", "model.data.num_workers=1",
    "exp_manager.create_tensorboard_logger=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def scripts(tmp_path):
    return Scripts(tmp_path)


def files(corpus: Path) -> dict[str, str]:
    return {
        "DATA": f"{corpus}/nano",
        "VOCAB": f"{corpus}/tok/vocab.json",
        "MERGES": f"{corpus}/tok/merges.txt",
    }


def world_of(script: Path, call: list[str]) -> int:
    """Processes that a script asks for: of torchrun's options, of #SBATCH lines, or one."""
    if script.suffix == ".sbatch":
        text = script.read_text()
        return int(re.findall(r"--nodes=(\d+)", text)[0]) * int(
            re.findall(r"--ntasks-per-node=(\d+)", text)[0]
        )
    if call[0] == "torchrun":
        return int(call[call.index("--nnodes") + 1]) * int(call[call.index("--nproc-per-node") + 1])
    return 1


def composed(scripts: Scripts, script: Path, *words: str) -> tuple[PretrainGPTConfig, int]:
    """The configuration that a script's command composes to, and the number of its processes."""
    scripts.stand_in(megalith=RECORD, torchrun=RECORD, srun=RECORD, scontrol=RECORD)
    process = scripts.begin(script, *words)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    (call,) = scripts.called()
    place = call.index("megalith") if call[0] != "megalith" else 0
    assert call[place + 1 : place + 4] == ["pretrain", "gpt", "--config"]
    found = compose(PretrainGPTConfig, config_file=Path(call[place + 4]), overrides=call[place + 5 :])
    assert words or not found.notices
    return found.config, world_of(script, call)


def test_there_are_scripts():
    assert {path.name for path in SCRIPTS} == {
        "pretrain.sh", "pretrain_distributed.sh", "pretrain_distributed_with_mp.sh",
        "two_nodes.sbatch", "gpt3_175b.sbatch",
    }  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_a_script_fits_the_processes_it_asks_for(scripts, script):
    config, world = composed(scripts, script)
    model = config.model
    numbers = model.numbers(model.architecture(50257).padded_vocab_size, batch=True)
    assert not model.layout(world).problems(numbers, world=world)
    model.batch_schedule.check(model.micro_batch_size, model.layout(world).data)
    if script.suffix == ".sbatch":
        assert config.trainer.num_nodes * 8 == world
        assert "--signal=USR1@" in script.read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_words_behind_a_script_win(scripts, script):
    config, _ = composed(scripts, script, "trainer.max_steps=7", "model.optim.lr=0.5")
    assert (config.trainer.max_steps, config.model.optim.lr) == (7, 0.5)


def test_the_345m_model_is_megatrons(scripts):
    config, world = composed(scripts, ROOT / "examples/gpt/pretrain.sh")
    model, sched = config.model, config.model.optim.sched
    assert (model.num_layers, model.hidden_size, model.num_attention_heads) == (24, 1024, 16)
    assert (model.encoder_seq_length, model.positions, world) == (1024, 1024, 1)
    assert (model.micro_batch_size, model.global_batch_size) == (4, 8)
    assert (model.optim.lr, sched.min_lr, sched.name) == (1.5e-4, 1e-5, "cosine")
    assert (config.trainer.max_steps, sched.decay_steps, sched.warmup_ratio) == (500000, 320000, 0.01)
    assert (model.optim.weight_decay, config.trainer.gradient_clip_val) == (0.01, 1.0)


def test_the_layouts_of_the_distributed_scripts(scripts, tmp_path_factory):
    found = {}
    for name in ("pretrain_distributed", "pretrain_distributed_with_mp"):
        fresh = Scripts(tmp_path_factory.mktemp(name))
        config, world = composed(fresh, ROOT / f"examples/gpt/{name}.sh")
        found[name] = config.model.layout(world)
    assert found["pretrain_distributed"] == Sizes(replicate=8)
    mp = found["pretrain_distributed_with_mp"]
    assert (mp.tensor, mp.pipeline, mp.replicate, mp.sequence_parallel) == (2, 2, 2, True)


def test_the_175b_job_is_megatrons(scripts):
    """The reference's script, option by option."""
    config, world = composed(scripts, ROOT / "examples/slurm/gpt3_175b.sbatch")
    model, optim, trainer = config.model, config.model.optim, config.trainer
    assert (world, model.layout(world).data) == (1024, 8)
    assert (model.tensor_model_parallel_size, model.pipeline_model_parallel_size) == (8, 16)
    assert (model.num_layers, model.hidden_size, model.num_attention_heads) == (96, 12288, 96)
    assert (model.encoder_seq_length, model.positions) == (2048, 2048)
    assert (model.micro_batch_size, model.global_batch_size) == (1, 1536)
    assert model.rampup_batch_size == [16, 16, 5859375]
    assert trainer.max_steps == model.batch_schedule.steps_within(146484375)
    assert (optim.lr, optim.sched.min_lr, optim.sched.name) == (6e-5, 6e-6, "cosine")
    assert (optim.sched.decay_samples, optim.sched.warmup_samples) == (126953125, 183105)
    assert (optim.weight_decay, optim.betas, trainer.gradient_clip_val) == (0.1, (0.9, 0.95), 1.0)
    assert model.init_method_std == 0.006
    assert (trainer.log_every_n_steps, trainer.val_check_interval, trainer.limit_val_batches) == (
        10,
        1000,
        40,
    )
    assert config.exp_manager.checkpoint_callback_params.every_n_train_steps == 1000
    assert (model.data.splits_string, trainer.precision) == ("98,2,0", "16-mixed")
    assert model.activations_checkpoint_granularity == "full"
    assert [str(each) for each in model.data.data_prefix][::2] == ["0.2", "0.3", "0.5"]


def test_a_slurm_job_saves_on_its_signal_and_queues_itself_again(scripts, corpus):
    """The script's own srun line, tasks and signal as SLURM gives them."""
    scripts.stand_in(megalith=MEGALITH, srun=SRUN, scontrol=RECORD)
    run = scripts.folder / "runs/gpt_345m"
    words = (*TINY, "model.micro_batch_size=1", "model.global_batch_size=4", "trainer.max_steps=100000")
    process = scripts.begin(ROOT / "examples/slurm/two_nodes.sbatch", *words, TASKS="2", **files(corpus))
    end = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()[0]
    for pid in scripts.pids.read_text().split():
        os.kill(int(pid), signal.SIGUSR1)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED, said
    assert "processes  2: tensor 2" in said
    assert scripts.called() == [["scontrol", "requeue", "4711"]]
    (saved,) = (run / "checkpoints").glob("step_*")
    assert int(saved.name[5:]) == max(losses(run))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "variables", "processes"),
    [
        ("pretrain.sh", {}, 1),
        ("pretrain_distributed.sh", {"GPUS": "2"}, 2),
        ("pretrain_distributed_with_mp.sh", {"GPUS": "4"}, 4),
    ],
)
def test_a_small_run_of_a_script(scripts, corpus, script, variables, processes):
    scripts.stand_in(megalith=MEGALITH, torchrun=TORCHRUN)
    place = {"MEETING": "localhost:0"} if processes > 1 else {}
    process = scripts.begin(
        ROOT / "examples/gpt" / script, *TINY, "trainer.max_steps=3", **variables, **place, **files(corpus)
    )
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 0, said
    assert len(losses(scripts.folder / "runs/gpt_345m")) == 3
    assert (f"processes  {processes}:" in said) == (processes > 1)
