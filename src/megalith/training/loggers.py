"""TensorBoard and Weights & Biases, when they are asked for. Knows the exp_manager's keys; rows come from `metrics`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from megalith.errors import ConfigError, Problem

if TYPE_CHECKING:
    from megalith.training.config import ExpManagerConfig


def make_loggers(config: ExpManagerConfig, folder: Path, *, name: str, step: int) -> list[Logger]:
    """The loggers of a start at `step`; TensorBoard hides what an earlier start had logged after it.

    Errors: `ConfigError` when a package is missing.
    """
    loggers: list[Logger] = []
    if config.create_tensorboard_logger:
        _require("tensorboard", "create_tensorboard_logger", "pip install tensorboard")
        options = {"purge_step": step + 1 if step else None, **(config.summary_writer_kwargs or {})}
        loggers.append(
            TensorBoardLogger(save_dir=folder, name="", version="", default_hp_metric=False, **options)
        )
    if config.create_wandb_logger:
        _require("wandb", "create_wandb_logger", "pip install wandb")
        options = {"name": name, **(config.wandb_logger_kwargs or {})}
        loggers.append(WandbLogger(save_dir=folder, **options))
    return loggers


def log_configuration(loggers: list[Logger], values: dict[str, Any]) -> None:
    """Give every logger the whole configuration."""
    for logger in loggers:
        logger.log_hyperparams(values)


def _require(package: str, key: str, fix: str) -> None:
    if importlib.util.find_spec(package) is None:
        what = f"is on, and the package {package} is not installed"
        raise ConfigError([Problem(f"exp_manager.{key}", what, f"{fix}, or exp_manager.{key}=false")])
