"""TensorBoard and Weights & Biases, when they are asked for. Knows the exp_manager's keys; rows come from `metrics`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from megalith.errors import ConfigError, Problem

if TYPE_CHECKING:
    from megalith.training.config import ExpManagerConfig


def check_loggers(config: ExpManagerConfig) -> None:
    """Are the packages there? Errors: `ConfigError` when one is missing."""
    wanted = {"create_tensorboard_logger": "tensorboard", "create_wandb_logger": "wandb"}
    problems = [
        Problem(
            f"exp_manager.{key}",
            f"is on, and the package {package} is not installed",
            f"pip install {package}, or exp_manager.{key}=false",
        )
        for key, package in wanted.items()
        if getattr(config, key) and importlib.util.find_spec(package) is None
    ]
    if problems:
        raise ConfigError(problems)


def make_loggers(config: ExpManagerConfig, folder: Path, *, name: str, step: int) -> list[Logger]:
    """The loggers of a start at `step`; TensorBoard hides what an earlier start had logged after it.

    Errors: `ConfigError` when a package is missing.
    """
    check_loggers(config)
    loggers: list[Logger] = []
    if config.create_tensorboard_logger:
        options = {"purge_step": step + 1 if step else None, **(config.summary_writer_kwargs or {})}
        loggers.append(
            TensorBoardLogger(save_dir=folder, name="", version="", default_hp_metric=False, **options)
        )
    if config.create_wandb_logger:
        options = {"name": name, **(config.wandb_logger_kwargs or {})}
        loggers.append(WandbLogger(save_dir=folder, **options))
    return loggers


def log_configuration(loggers: list[Logger], values: dict[str, Any]) -> None:
    """Give every logger the whole configuration."""
    for logger in loggers:
        logger.log_hyperparams(values)
