"""Every YAML file that comes with Megalith composes, says nothing twice, and holds only keys of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalith.config.compose import compose
from megalith.config.sources import PACKAGED
from megalith.tasks.pretrain_config import PretrainGPTConfig

ROOTS = {"megatron_gpt_config": PretrainGPTConfig, "gpt_quickstart": PretrainGPTConfig}
MANDATORY = ["model.data.data_prefix=corpus_text_document"]
FILES = sorted(PACKAGED.rglob("*.yaml"))


def test_there_are_files_and_each_has_a_root():
    assert {file.stem for file in FILES} == set(ROOTS)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_it_composes_without_a_notice(file: Path):
    composed = compose(ROOTS[file.stem], config_name=file.stem, overrides=MANDATORY)
    assert composed.notices == []


def test_the_gpt_configuration_has_nemos_values():
    config = compose(PretrainGPTConfig, overrides=MANDATORY).config
    model, trainer = config.model, config.trainer
    assert (model.micro_batch_size, model.global_batch_size) == (4, 8)
    assert (model.num_layers, model.hidden_size, model.ffn_hidden_size, model.num_attention_heads) == (
        12,
        768,
        3072,
        12,
    )
    assert (model.encoder_seq_length, model.max_position_embeddings, model.data.seq_length) == (512, 512, 512)
    assert (model.hidden_dropout, model.layernorm_epsilon, model.init_method_std) == (0.1, 1e-5, 0.02)
    assert (trainer.max_steps, trainer.val_check_interval, trainer.limit_val_batches) == (100000, 100, 50)
    assert (trainer.devices, trainer.accelerator, trainer.precision) == ("auto", "auto", "auto")
    sched = model.optim.sched
    assert (sched.name, sched.warmup_steps, sched.constant_steps, sched.min_lr) == (
        "CosineAnnealing",
        500,
        50000,
        2e-5,
    )
    assert (model.optim.lr, model.optim.weight_decay, model.optim.betas) == (2e-4, 0.01, (0.9, 0.98))
    params = config.exp_manager.checkpoint_callback_params
    assert (params.monitor, params.save_top_k, params.mode) == ("val_loss", 10, "min")
    assert config.exp_manager.resume_if_exists
