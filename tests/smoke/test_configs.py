"""Every YAML file that comes with Megalith composes, says nothing twice, and holds only keys of its own and NeMo's values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megalith.config.compose import compose
from megalith.config.sources import PACKAGED
from megalith.config.tree import get
from megalith.models.config import effective
from megalith.tasks.pretrain_config import ROOTS, PretrainGPTConfig
from megalith.tasks.tuning_config import PACKAGED as TUNED_BY
from megalith.tasks.tuning_config import TUNE_ROOTS, TWO_SIDES

TUNING = {TWO_SIDES: "soft-prompt", **{name: method for method, name in TUNED_BY.items()}}
"""File of tuning → what it tunes."""
FILES = sorted(path for path in PACKAGED.rglob("*.yaml") if path.stem not in TUNING)
ROOT_OF = {root.packaged: root for root in ROOTS.values()} | {"gpt_quickstart": PretrainGPTConfig}
MANDATORY = ["model.data.data_prefix=corpus_text_document"]


def test_there_are_files_and_each_has_a_root():
    assert {file.stem for file in FILES} == set(ROOT_OF)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_it_composes_without_a_notice(file: Path):
    composed = compose(ROOT_OF[file.stem], config_name=file.stem, overrides=MANDATORY)
    assert composed.notices == []


@pytest.mark.parametrize("name", TUNING)
def test_a_file_of_tuning_composes_without_a_notice(name: str):
    given = ["restore_from_path=gpt.nemo", "model.data.train_ds=t.jsonl", "model.data.valid_ds=v.jsonl"]
    tags = [] if TUNING[name] in ("lora", "full") else ["model.new_prompt_tags=[a]"]
    method = [f"++model.tuning_method={TUNING[name]}"]
    composed = compose(TUNE_ROOTS["gpt"], config_name=name, overrides=[*given, *tags, *method])
    assert composed.notices == []


def test_prompt_tuning_begins_with_nemos_values():
    given = ["restore_from_path=gpt.nemo", "model.data.train_ds=t.jsonl", "model.data.valid_ds=v.jsonl"]
    composed = compose(TUNE_ROOTS["gpt"], overrides=[*given, "model.new_prompt_tags=[a]"])
    assert composed.file.stem == "megatron_prompt_tuning_gpt"
    expected = {
        "trainer.max_steps": 3000,
        "trainer.log_every_n_steps": 10,
        "trainer.val_check_interval": 250,
        "trainer.limit_val_batches": 50,
        "trainer.limit_test_batches": 500,
        "trainer.gradient_clip_val": None,
        "exp_manager.name": "PromptTuning",
        "exp_manager.resume_if_exists": True,
        "exp_manager.resume_ignore_no_checkpoint": True,
        "exp_manager.checkpoint_callback_params.monitor": "val_loss",
        "exp_manager.checkpoint_callback_params.save_top_k": 3,
        "exp_manager.checkpoint_callback_params.mode": "min",
        "exp_manager.checkpoint_callback_params.save_nemo_on_train_end": True,
        "model.use_soft_prompts": True,
        "model.num_prompt_tokens": 150,
        "model.existing_prompt_tags": [],
        "model.new_prompt_init_methods": ["text"],
        "model.new_prompt_init_text": ["some initialization text goes here"],
        "model.calc_loss_on_answer_only": False,
        "model.micro_batch_size": 4,
        "model.global_batch_size": 8,
        "model.data.min_seq_length": 1,
        "model.data.add_eos": True,
        "model.data.num_workers": 0,
        "model.optim.name": "fused_adam",
        "model.optim.lr": 1e-5,
        "model.optim.weight_decay": 0.01,
        "model.optim.betas": [0.9, 0.98],
        "model.optim.sched.name": "CosineAnnealing",
        "model.optim.sched.warmup_steps": 50,
        "model.optim.sched.constant_steps": 10,
        "model.optim.sched.min_lr": 1e-6,
    }
    assert {key: get(composed.resolved, tuple(key.split(".")), "absent") for key in expected} == expected


# NeMo 1.8's values, family by family, where Megalith does not decide otherwise: precision and devices by the machine, no
# dropout of attention probabilities (it takes a slower core), threads that read ahead for everyone.
ALL: dict[str, Any] = {
    "restore_from_path": None,
    "trainer.num_nodes": 1,
    "trainer.max_steps": 100000,
    "trainer.log_every_n_steps": 10,
    "trainer.val_check_interval": 100,
    "trainer.limit_val_batches": 50,
    "trainer.limit_test_batches": 500,
    "trainer.accumulate_grad_batches": 1,
    "trainer.gradient_clip_val": 1.0,
    "exp_manager.explicit_log_dir": None,
    "exp_manager.exp_dir": None,
    "exp_manager.create_wandb_logger": False,
    "exp_manager.wandb_logger_kwargs": {"project": None, "name": None},
    "exp_manager.resume_if_exists": True,
    "exp_manager.resume_ignore_no_checkpoint": True,
    "exp_manager.create_checkpoint_callback": True,
    "exp_manager.checkpoint_callback_params.monitor": "val_loss",
    "exp_manager.checkpoint_callback_params.save_top_k": 10,
    "exp_manager.checkpoint_callback_params.mode": "min",
    "model.micro_batch_size": 4,
    "model.global_batch_size": 8,
    "model.tensor_model_parallel_size": 1,
    "model.pipeline_model_parallel_size": 1,
    "model.resume_from_checkpoint": None,
    "model.encoder_seq_length": 512,
    "model.max_position_embeddings": 512,
    "model.num_layers": 12,
    "model.hidden_size": 768,
    "model.ffn_hidden_size": 3072,
    "model.num_attention_heads": 12,
    "model.init_method_std": 0.02,
    "model.hidden_dropout": 0.1,
    "model.kv_channels": None,
    "model.layernorm_epsilon": 1e-5,
    "model.activation": "gelu_tanh",
    "model.make_vocab_size_divisible_by": 128,
    "model.initial_loss_scale": 2.0**32,
    "model.loss_scale_growth_interval": 1000,
    "model.hysteresis": 2,
    "model.seed": 1234,
    "model.activations_checkpoint_method": None,
    "model.tokenizer.library": "megatron",
    "model.tokenizer.model": None,
    "model.tokenizer.vocab_file": None,
    "model.tokenizer.merge_file": None,
    "model.data.index_mapping_dir": None,
    "model.data.data_impl": "mmap",
    "model.data.seq_length": 512,
    "model.data.skip_warmup": True,
    "model.data.dataloader_type": "single",
    "model.data.reset_position_ids": False,
    "model.data.reset_attention_mask": False,
    "model.data.eod_mask_loss": False,
    "model.optim.name": "fused_adam",
    "model.optim.weight_decay": 0.01,
}
COSINE: dict[str, Any] = {
    "model.data.splits_string": "900,50,50",
    "model.optim.lr": 2e-4,
    "model.optim.betas": [0.9, 0.98],
    "model.optim.sched.name": "CosineAnnealing",
    "model.optim.sched.warmup_steps": 500,
    "model.optim.sched.constant_steps": 50000,
    "model.optim.sched.min_lr": 2e-5,
}
WARMUP: dict[str, Any] = {
    "model.pipeline_model_parallel_split_rank": None,  # 0, which is not a rank that a decoder can begin at
    "model.tokenizer.type": "BertWordPieceCase",
    "model.data.splits_string": "949,45,5",
    "model.data.masked_lm_prob": 0.15,
    "model.data.short_seq_prob": 0.0,
    "model.data.max_ngram_size": 10,
    "model.data.mean_ngram_size": None,
    "model.data.geometric_dist": True,
    "model.data.permutation": False,
    "model.data.whole_word_masking": True,
    "model.data.favor_longer_ngrams": False,
    "model.optim.lr": 1e-4,
    "model.optim.betas": [0.9, 0.999],
    "model.optim.eps": 1e-8,
    "model.optim.sched.name": "WarmupAnnealing",
    "model.optim.sched.min_lr": 1e-5,
    "model.optim.sched.last_epoch": -1,
    "model.optim.sched.warmup_ratio": 0.01,
}
NEMO: dict[str, dict[str, Any]] = {
    "gpt": {**COSINE, "model.tokenizer.type": "GPT2BPETokenizer"},
    "bert": {
        **COSINE,
        "model.tokenizer.type": "BertWordPieceLowerCase",
        "model.bert_binary_head": True,
        "model.data.masked_lm_prob": 0.15,
        "model.data.short_seq_prob": 0.1,
    },
    "t5": {
        **WARMUP,
        "model.tokenizer.num_sentinel_tokens": 100,
        "model.data.seq_length_dec": 128,
        "model.data.dataset_type": "t5",
    },
    "bart": {
        **WARMUP,
        "model.tokenizer.num_sentinel_tokens": 0,
        "model.data.dataset_type": "bart",
        "model.data.delete_mask_prob": 0.3,
    },
}


@pytest.mark.parametrize("family", ROOTS)
def test_a_family_begins_with_nemos_values(family: str):
    composed = compose(ROOTS[family], overrides=MANDATORY)
    name = f"megatron_{family}"
    expected = {
        **ALL,
        **NEMO[family],
        "name": name,
        "exp_manager.name": name,
        "exp_manager.checkpoint_callback_params.filename": name
        + "--{val_loss:.2f}-{step}-{consumed_samples}",
    }
    assert {key: get(composed.resolved, tuple(key.split(".")), "absent") for key in expected} == expected
    trainer = composed.config.trainer
    assert (trainer.devices, trainer.accelerator, trainer.precision) == ("auto", "auto", "auto")


@pytest.mark.parametrize("family", ROOTS)
def test_a_family_has_its_tokenizer_and_masks_without_any_file(family: str, tmp_path: Path):
    """What a file leaves out is the family's all the same."""
    file = tmp_path / "mine.yaml"
    file.write_text("model: {data: {data_prefix: x}}", "utf-8")
    ours = compose(ROOTS[family], config_file=file).config.model
    packaged = compose(ROOTS[family], overrides=MANDATORY).config.model
    assert ours.tokenizer.type == packaged.tokenizer.type
    assert (ours.tokenizer.num_sentinel_tokens or 0) == (packaged.tokenizer.num_sentinel_tokens or 0)
    assert ours.shape == packaged.shape
    assert ours.sample == packaged.sample
    assert effective(ours.architecture(100)) == effective(packaged.architecture(100))


def test_one_text_stands_for_a_list_of_it():
    given = ["restore_from_path=gpt.nemo", "model.data.train_ds=t.jsonl", "model.data.valid_ds=v.jsonl"]
    one = ["model.new_prompt_tags=b", "model.existing_prompt_tags=a", "model.new_prompt_init_methods=random"]
    typed = [*given, *one, "model.lora.targets=all-linear"]
    model = compose(TUNE_ROOTS["gpt"], config_name="megatron_prompt_tuning_gpt", overrides=typed).config.model
    assert model.new_prompt_tags == ["b"]
    assert model.existing_tags == ["a"]
    assert model.new_prompt_init_methods == ["random"]
    assert model.lora.targets == ["all-linear"]
