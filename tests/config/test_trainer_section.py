"""The sections trainer and exp_manager, and the table of every key that Lightning and NeMo ever had there."""

from __future__ import annotations

import inspect

import pytest
from pydantic import ValidationError

from megalith.config.compose import Composed, compose
from megalith.config.schema import Section, setting
from megalith.errors import ConfigError
from megalith.tasks.model_keys import ENCODER_DECODER_KEYS, MODEL_KEYS
from megalith.tasks.pretrain_families import GPTModelConfig, T5ModelConfig
from megalith.topology.precision import ALIASES
from megalith.training.config import (
    PRECISION_ALIASES,
    CheckpointCallbackParams,
    ExpManagerConfig,
    TrainerConfig,
    duration_seconds,
)
from megalith.training.lightning_keys import LIGHTNING_KEYS


class _Model(Section):
    resume_from_checkpoint: str | None = setting(None, "x")


class _Root(Section):
    trainer: TrainerConfig = setting(TrainerConfig, "x")
    exp_manager: ExpManagerConfig = setting(ExpManagerConfig, "x")
    model: _Model = setting(_Model, "x")


@pytest.fixture
def run(tmp_path):
    def go(*overrides: str) -> Composed[_Root]:
        file = tmp_path / "a.yaml"
        file.write_text("", encoding="utf-8")
        return compose(_Root, config_file=file, overrides=overrides)

    return go


@pytest.fixture
def refused(run):
    def go(*overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            run(*overrides)
        return str(caught.value)

    return go


def test_every_argument_of_lightnings_trainer_is_accounted_for():
    from lightning.pytorch import Trainer

    arguments = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    fields, table = set(TrainerConfig.model_fields), set(LIGHTNING_KEYS)
    assert arguments - fields - table == set()
    assert not fields & table


OLD = [
    "amp_backend",
    "amp_level",
    "auto_lr_find",
    "auto_scale_batch_size",
    "auto_select_gpus",
    "checkpoint_callback",
    "distributed_backend",
    "flush_logs_every_n_steps",
    "gpus",
    "ipus",
    "log_gpu_memory",
    "move_metrics_to_cpu",
    "multiple_trainloader_mode",
    "num_processes",
    "prepare_data_per_node",
    "process_position",
    "progress_bar_refresh_rate",
    "reload_dataloaders_every_epoch",
    "replace_sampler_ddp",
    "resume_from_checkpoint",
    "stochastic_weight_avg",
    "sync_batchnorm",
    "terminate_on_nan",
    "tpu_cores",
    "track_grad_norm",
    "truncated_bptt_steps",
    "weights_save_path",
    "weights_summary",
    "max_time",
    "hpus",
    "automatic_optimization",
]


@pytest.mark.parametrize("name", OLD)
def test_older_arguments_are_accounted_for(name):
    assert name in LIGHTNING_KEYS or name in TrainerConfig.model_fields


@pytest.mark.parametrize(
    ("table", "section"),
    [
        (LIGHTNING_KEYS, TrainerConfig),
        (MODEL_KEYS, GPTModelConfig),
        (ENCODER_DECODER_KEYS, T5ModelConfig),
        (ExpManagerConfig.foreign_keys, ExpManagerConfig),
        (CheckpointCallbackParams.foreign_keys, CheckpointCallbackParams),
    ],
)
def test_no_foreign_key_hides_a_field_and_each_has_a_reason(table, section):
    assert not set(table) & set(section.model_fields)
    for name, key in table.items():
        assert len(key.note) > 10, name
        if key.to and "." not in key.to:
            assert key.to in section.model_fields, name


def test_precision_aliases_are_those_of_the_engine():
    assert PRECISION_ALIASES == ALIASES


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("16", "16-mixed"), ("32", "32"), ("64", "64"), ("bf16", "bf16-mixed"), ("'16'", "16-mixed"), ("bf16-mixed", "bf16-mixed"),
        ("16-mixed", "16-mixed"), ("32-true", "32"), ("64-true", "64"), ("auto", "auto"), ("fp16", "16-mixed"),
    ],
)  # fmt: skip
def test_precisions(run, typed, meant):
    assert run(f"trainer.precision={typed}").config.trainer.precision == meant


@pytest.mark.parametrize(
    "typed", ["bf16-true", "16-true", "transformer-engine", "8", "true", "null", "bf-16", "16.0"]
)
def test_precisions_that_there_are_not(refused, typed):
    assert "trainer.precision" in refused(f"trainer.precision={typed}")


@pytest.mark.parametrize(
    ("typed", "meant", "count"),
    [
        ("auto", "auto", None),
        ("-1", "auto", None),
        ("1", 1, 1),
        ("'1'", 1, 1),
        ("[3]", [3], 1),
        ("'3,'", [3], 1),
        ("2", 2, 2),
        ("'0,1'", [0, 1], 2),
    ],
)
def test_devices(run, typed, meant, count):
    trainer = run(f"trainer.devices={typed}").config.trainer
    assert trainer.devices == meant
    assert trainer.num_devices == count


@pytest.mark.parametrize("typed", ["0", "-3", "[]", "all"])
def test_devices_that_cannot_be(refused, typed):
    assert "trainer.devices" in refused(f"trainer.devices={typed}")


def test_no_gpus_means_the_cpu(run):
    for typed in ("0", "null", "[]"):
        assert run(f"trainer.gpus={typed}").config.trainer.accelerator == "cpu"
    assert run("trainer.gpus=[2]").config.trainer.devices == [2]
    assert run("trainer.accelerator=ddp").config.trainer.accelerator == "auto"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("00:00:00:01", 1.0),
        ("01:02:03:04", 93784.0),
        ({"hours": 1, "minutes": 30}, 5400.0),
        (None, None),
    ],
)
def test_durations(value, seconds):
    assert duration_seconds(value) == seconds


@pytest.mark.parametrize("typed", ["3h", "1:2:3", "{years: 1}", "01:02:03:04:05"])
def test_durations_that_are_none(refused, typed):
    assert "trainer.max_time" in refused(f"trainer.max_time={typed}")


def test_times_of_saving(run, refused):
    params = "exp_manager.checkpoint_callback_params.train_time_interval"
    assert run(f"{params}=30").config.exp_manager.checkpoint_callback_params.interval_seconds == 1800
    assert run(f"{params}=00:00:30:00").config.exp_manager.checkpoint_callback_params.interval_seconds == 1800
    assert (
        run(f"{params}={{minutes: 30}}").config.exp_manager.checkpoint_callback_params.interval_seconds
        == 1800
    )
    assert params in refused(f"{params}=0")
    assert params in refused(f"{params}=soon")


@pytest.mark.parametrize("key", ["limit_val_batches", "limit_test_batches", "val_check_interval"])
@pytest.mark.parametrize("value", ["1.0", "0.25"])
def test_shares_of_the_data_are_not_numbers_of_batches(refused, key, value):
    assert "would be a share of the data" in refused(f"trainer.{key}={value}")


def test_a_run_needs_a_length(refused):
    assert "counted in steps" in refused("trainer.max_steps=-1")
    assert "counted in steps" in refused("trainer.max_steps=null")


def test_the_engine_accumulates(refused):
    assert "micro-batches are accumulated within a step" in refused("trainer.accumulate_grad_batches=4")


def test_what_asks_for_nothing_is_let_pass(run):
    run(
        "trainer.overfit_batches=0.0",
        "trainer.limit_train_batches=1.0",
        "trainer.callbacks=null",
        "trainer.tpu_cores=0",
    )


def test_what_would_be_something_else_is_refused(refused):
    said = refused(
        "trainer.overfit_batches=3",
        "trainer.limit_train_batches=10",
        "trainer.plugins=[x]",
        "trainer.auto_lr_find=true",
    )
    assert said.count("refused") == 4


def test_old_places_of_other_keys(run):
    result = run(
        "trainer.default_root_dir=/x",
        "trainer.resume_from_checkpoint=/c",
        "trainer.progress_bar_refresh_rate=0",
    )
    assert result.config.exp_manager.exp_dir == "/x"
    assert result.config.model.resume_from_checkpoint == "/c"
    assert result.config.trainer.enable_progress_bar is False
    assert len(result.notices) == 3


def test_no_exp_manager_means_no_files(run):
    result = run("exp_manager=null").config.exp_manager
    assert not result.create_checkpoint_callback
    assert not result.create_tensorboard_logger


def test_combinations_of_exp_manager(refused, run):
    said = refused(
        "exp_manager.create_wandb_logger=true",
        "exp_manager.wandb_logger_kwargs={name: x}",
        "exp_manager.summary_writer_kwargs={log_dir: x}",
        "exp_manager.checkpoint_callback_params.save_weights_only=true",
    )
    assert "needs project" in said
    assert "log_dir is the run's folder" in said
    assert "could not go on" in said
    notices = run(
        "exp_manager.explicit_log_dir=/x",
        "exp_manager.exp_dir=/y",
        "exp_manager.resume_ignore_no_checkpoint=true",
    ).notices
    assert len(notices) == 2


def test_versions_may_be_numbers(run):
    assert run("exp_manager.version=3").config.exp_manager.version == "3"


def test_no_validation_within_the_run_is_a_notice(run):
    assert "no validation" in run("trainer.max_steps=10", "trainer.val_check_interval=20").notices[0]


def test_sections_can_be_made_in_python_too():
    assert TrainerConfig(precision=16, devices="-1").precision == "16-mixed"
    with pytest.raises(ValidationError):
        TrainerConfig(max_stepz=3)
