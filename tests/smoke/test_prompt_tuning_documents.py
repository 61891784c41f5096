"""The two commands of NeMo's page on prompt tuning, pasted: task one, then task two from what the first one wrote.

A shell reads them, so that it eats what quotes it eats there. Only the script's name is another one; the length of the runs
is cut, and where there is no GPU, `trainer.accelerator` is.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from megalith.adapt.artefact import open_adapter
from megalith.cli.main import main
from tests.tasks.nano import make_corpus, pretrain, rows

FIRST = r"""
  EXPR_NAME='winogrande_prompt_tuning'
  RESTORE_PATH='megatron_gpt.nemo'
  GPUS=1
  MAX_STEPS=1000
  PROMPT_LENGTH=150

  echo "Prompt tuning starting"
  python megatron_gpt_prompt_tuning.py \
          --config-name=megatron_gpt_config \
          trainer.devices=$GPUS \
          trainer.accelerator='gpu' \
          trainer.max_steps=$MAX_STEPS \
          restore_from_path=$RESTORE_PATH \
          exp_manager.name=$EXPR_NAME \
          exp_manager.checkpoint_callback_params.save_nemo_on_train_end=True \
          +model.use_soft_prompts=True \
          +model.num_prompt_tokens=$PROMPT_LENGTH \
          +model.new_prompt_tags=['Winogrande'] \
          +model.new_prompt_init_text=['disambiguate pronoun noun names pick correct name fill blank'] \
          +model.new_prompt_init_methods=['text'] \
          model.data.data_prefix=None \
          +model.data.train_ds='winogrande_prompt_tuning_train.jsonl' \
          +model.data.valid_ds='winogrande_prompt_tuning_val.jsonl' \
          +model.data.batch_size=32 \
          model.optim.lr=2e-3 \
          model.optim.sched.min_lr=2e-6 \
          model.optim.sched.warmup_steps=320 \
          model.optim.sched.constant_steps=2240 \
          model.encoder_seq_length=2048
"""
SECOND = r"""
  EXPR_NAME='rte_prompt_tuning'
  RESTORE_PATH='winogrande_prompt_tuning.nemo'
  GPUS=1
  MAX_STEPS=780
  PROMPT_LENGTH=150
  VAL_CHECK_INTERVAL=50

  echo "Prompt tuning starting"
  python megatron_gpt_prompt_tuning.py \
          --config-name=megatron_gpt_config \
          trainer.devices=$GPUS \
          trainer.accelerator='gpu' \
          trainer.max_steps=$MAX_STEPS \
          trainer.val_check_interval=$VAL_CHECK_INTERVAL \
          restore_from_path=$RESTORE_PATH \
          exp_manager.name=$EXPR_NAME \
          exp_manager.checkpoint_callback_params.save_nemo_on_train_end=True \
          +model.use_soft_prompts=True \
          +model.num_prompt_tokens=$PROMPT_LENGTH \
          +model.existing_prompt_tags=['Winogrande'] \
          +model.new_prompt_tags=['RTE'] \
          +model.new_prompt_init_text=['entailment cause relationship imply label text'] \
          +model.new_prompt_init_methods=['text'] \
          model.data.data_prefix=None \
          +model.data.train_ds='RTE_prompt_tuning_train.jsonl' \
          +model.data.valid_ds='RTE_prompt_tuning_val.jsonl' \
          +model.data.batch_size=32 \
          model.optim.lr=2e-4 \
          model.optim.sched.min_lr=2e-6 \
          model.optim.sched.warmup_steps=78 \
          model.optim.sched.constant_steps=545 \
          model.encoder_seq_length=2048
"""
CUT = ["trainer.max_steps=2", "trainer.val_check_interval=2", "exp_manager.create_tensorboard_logger=false"]


def arguments(script: str) -> list[str]:
    """What a shell makes of the command, behind the script's name."""
    shell = "echo() { :; }; python() { shift; printf '%s\\0' \"$@\"; }\n" + script
    said = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True).stdout
    return said.removesuffix("\0").split("\0")


def tune(script: str) -> int:
    cut = CUT if torch.cuda.is_available() else [*CUT, "trainer.accelerator=cpu"]
    with pytest.raises(SystemExit) as ended:
        main(["prompt-tune", *arguments(script), *cut])
    return int(ended.value.code or 0)


def write(path: Path, tag: str, count: int) -> None:
    lines = [
        {"prompt_tag": tag, "text": f"w{i % 23:02d} w{i % 7:02d} answer:", "answer": f" w{i % 2:02d}"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_documented_commands_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    corpus = make_corpus(tmp_path / "corpus")
    small = ["model.encoder_seq_length=2048", "model.global_batch_size=1", "model.micro_batch_size=1"]
    assert pretrain(corpus, tmp_path / "base", *small, "trainer.limit_val_batches=0", steps=1)[0] == 0
    with pytest.raises(SystemExit) as ended:
        main(["checkpoint", "convert", "base", "megatron_gpt.nemo", "--to", "nemo", "--untrained"])
    assert not ended.value.code
    for name, tag in (("winogrande", "Winogrande"), ("RTE", "RTE")):
        write(tmp_path / f"{name}_prompt_tuning_train.jsonl", tag, 40)
        write(tmp_path / f"{name}_prompt_tuning_val.jsonl", tag, 6)

    assert tune(FIRST) == 0
    said = capsys.readouterr()
    assert "no decay phase" in said.err, "the first command's schedule"
    assert "model.optim.sched.constant_steps=0" in said.err
    assert "of 32 samples" in said.out, "model.data.batch_size"
    first = tmp_path / "nemo_experiments/winogrande_prompt_tuning"
    assert (first / "checkpoints/winogrande_prompt_tuning.nemo").is_file()
    assert open_adapter(first).tags[0].length == 150
    assert rows(first)[-1]["consumed_samples"] == 64

    assert tune(SECOND) == 0
    said = capsys.readouterr()
    assert "the one that the run winogrande_prompt_tuning wrote is" in said.out.replace("\n", " ")
    second = open_adapter(tmp_path / "nemo_experiments/rte_prompt_tuning")
    assert second.names == ("Winogrande", "RTE")
    before = open_adapter(first).tensors
    assert all(torch.equal(second.tensors[name], before[name]) for name in before)
    assert (tmp_path / "nemo_experiments/rte_prompt_tuning/checkpoints/rte_prompt_tuning.nemo").is_file()
