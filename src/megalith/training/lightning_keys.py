"""Every argument of Lightning's Trainer, and of its ancestors back to 1.0, that is not a field of `TrainerConfig`.

One table: renamed, accepted without effect, or refused, each with the reason. Knows names alone; a test holds it against the
Trainer that is installed.
"""

from __future__ import annotations

from typing import Any

from megalith.config.schema import ForeignKey, ignored, refused, renamed, translated

_ENGINE = "the engine decides how processes work together"
_STEPS = "a run is as long as trainer.max_steps says"
_SUMMARY = "a run always says how large its model is"
_EXP_MANAGER = "exp_manager decides which loggers there are"


def _gpus(value: Any) -> dict[str, Any]:
    """≤ 1.7: a number of GPUs (0 and null: the CPU), a list of their numbers, or -1 for all."""
    if value in (None, 0, "0", []):
        return {"accelerator": "cpu"}
    return {"devices": value}


def _default_root(value: Any) -> dict[str, Any]:
    return {} if value is None else {"exp_manager.exp_dir": value}


def _resume(value: Any) -> dict[str, Any]:
    return {} if value is None else {"model.resume_from_checkpoint": value}


def _fast_bar(value: Any) -> dict[str, Any]:
    return {"enable_progress_bar": value != 0}


def _refused_hardware(name: str) -> ForeignKey:
    return refused(f"Megalith runs on CPUs and CUDA or ROCm GPUs, not on {name}", harmless=(0,))


LIGHTNING_KEYS: dict[str, ForeignKey] = {
    # arguments of today's Trainer
    "strategy": ignored(_ENGINE),
    "logger": ignored(_EXP_MANAGER),
    "callbacks": refused(
        "a configuration holds values, not objects; exp_manager makes the callbacks", harmless=([],)
    ),
    "max_epochs": ignored(_STEPS),
    "min_epochs": ignored(_STEPS),
    "min_steps": ignored(_STEPS),
    "limit_train_batches": refused(f"{_STEPS}; set that instead", harmless=(1.0,)),
    "limit_predict_batches": ignored("`megalith generate` predicts"),
    "overfit_batches": refused("use a small corpus with data.splits_string instead", harmless=(0, 0.0)),
    "check_val_every_n_epoch": ignored("trainer.val_check_interval counts steps"),
    "num_sanity_val_steps": ignored("the first validation is the one that val_check_interval asks for"),
    "enable_checkpointing": ignored(
        "exp_manager.create_checkpoint_callback decides whether checkpoints are written"
    ),
    "enable_model_summary": ignored(_SUMMARY),
    "inference_mode": ignored("validation never keeps gradients"),
    "use_distributed_sampler": ignored("the data plan decides which sample goes where"),
    "barebones": refused("it takes checkpoints, logs and validation away; switch those off one by one"),
    "plugins": refused(
        "a configuration holds values, not objects; precision and cluster are found out", harmless=([],)
    ),
    "sync_batchnorm": ignored("there is no batch norm"),
    "reload_dataloaders_every_n_epochs": ignored("data are read by their plan"),
    "default_root_dir": translated("is called exp_manager.exp_dir here", _default_root, weak=True),
    "enable_autolog_hparams": ignored("the configuration is always written to config.yaml and hparams.yaml"),
    "model_registry": refused("there is no model registry"),
    # NeMo 1.0–1.8 and Lightning 1.0–1.9
    "gpus": translated("is called trainer.devices here", _gpus),
    "num_processes": renamed("devices", "is called trainer.devices here"),
    "num_gpus": translated("is called trainer.devices here", _gpus),
    "nb_gpu_nodes": renamed("num_nodes", "is called trainer.num_nodes here"),
    "row_log_interval": renamed("log_every_n_steps", "is called trainer.log_every_n_steps here"),
    "checkpoint_callback": ignored(
        "exp_manager.create_checkpoint_callback decides whether checkpoints are written"
    ),
    "resume_from_checkpoint": translated("is called model.resume_from_checkpoint here", _resume, weak=True),
    "progress_bar_refresh_rate": translated(
        "is called trainer.enable_progress_bar here", _fast_bar, weak=True
    ),
    "process_position": ignored("there is one progress bar"),
    "weights_summary": ignored(_SUMMARY),
    "weights_save_path": translated("is called exp_manager.exp_dir here", _default_root, weak=True),
    "default_save_path": translated("is called exp_manager.exp_dir here", _default_root, weak=True),
    "replace_sampler_ddp": ignored("the data plan decides which sample goes where"),
    "distributed_backend": ignored(_ENGINE),
    "amp_backend": ignored("layers cast by themselves; trainer.precision says to what"),
    "amp_level": ignored("layers cast by themselves; trainer.precision says to what"),
    "use_amp": ignored("trainer.precision says in what is computed"),
    "auto_lr_find": refused("the learning rate is model.optim.lr"),
    "auto_scale_batch_size": refused("batch sizes are model.micro_batch_size and model.global_batch_size"),
    "auto_select_gpus": ignored("trainer.devices names the GPUs"),
    "flush_logs_every_n_steps": ignored("metrics.jsonl is complete after each row"),
    "log_gpu_memory": ignored("memory is logged where there is a GPU"),
    "log_save_interval": ignored("metrics.jsonl is complete after each row"),
    "move_metrics_to_cpu": ignored("metrics are plain numbers"),
    "multiple_trainloader_mode": ignored("there is one stream of batches"),
    "prepare_data_per_node": ignored("the data plan is made once"),
    "reload_dataloaders_every_epoch": ignored("data are read by their plan"),
    "stochastic_weight_avg": refused("weights are not averaged"),
    "terminate_on_nan": ignored(
        "non-finite steps are skipped, counted, and stop the run after model.max_skipped in a row"
    ),
    "print_nan_grads": ignored("non-finite steps are skipped, counted and logged"),
    "track_grad_norm": ignored("the gradient norm is always logged"),
    "truncated_bptt_steps": refused("there is no recurrence"),
    "automatic_optimization": ignored("the engine takes the optimizer's steps"),
    "early_stop_callback": refused("there is no early stopping"),
    "max_nb_epochs": ignored(_STEPS),
    "tpu_cores": _refused_hardware("TPUs"),
    "ipus": _refused_hardware("IPUs"),
    "hpus": _refused_hardware("HPUs"),
}
