"""The sections `trainer` and `exp_manager`: Lightning's and NeMo's keys, typed.

Every argument of Lightning's Trainer is a field here or stands in `lightning_keys`. Knows no Trainer: `precision`, `devices`,
`num_nodes`, `accumulate_grad_batches` and `gradient_clip_val` never reach it, the engine reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from megalith.config.schema import (
    ForeignKey,
    Section,
    error,
    ignored,
    refused,
    renamed,
    setting,
    warning,
)
from megalith.errors import Problem
from megalith.training.lightning_keys import LIGHTNING_KEYS

PrecisionName = Literal["auto", "32", "bf16-mixed", "16-mixed", "64"]
PRECISION_ALIASES = {
    "16": "16-mixed",
    "fp16": "16-mixed",
    "bf16": "bf16-mixed",
    "fp32": "32",
    "32-true": "32",
    "float32": "32",
    "64-true": "64",
    "float64": "64",
}
"""What NeMo's and Lightning's files also say."""
_NO_HALF_MASTERS = (
    "keeps weights and moments in half precision, where small updates are lost; use bf16-mixed or 16-mixed"
)
_PIECES = ("days", "hours", "minutes", "seconds", "weeks")


def duration_seconds(value: str | Mapping[str, float] | None) -> float | None:
    """Seconds of a duration: DD:HH:MM:SS, or {hours: 3, minutes: 30}. Errors: ValueError that shows the form."""
    if value is None:
        return None
    if isinstance(value, str):
        found = re.fullmatch(r"(\d+):(\d{1,2}):(\d{1,2}):(\d{1,2})", value.strip())
        if not found:
            raise ValueError(
                f'expected a duration DD:HH:MM:SS, got "{value}"\nfix: three and a half hours are 00:03:30:00'
            )
        days, hours, minutes, seconds = (int(part) for part in found.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    unknown = sorted(set(value) - set(_PIECES))
    if unknown:
        raise ValueError(f"a duration has no {', '.join(unknown)}; it has {', '.join(_PIECES)}")
    scale = {"weeks": 604800.0, "days": 86400.0, "hours": 3600.0, "minutes": 60.0, "seconds": 1.0}
    return sum(scale[name] * amount for name, amount in value.items())


class TrainerConfig(Section):
    """Hardware, length of the run, validation, logging: NeMo's and Lightning's names."""

    foreign_keys: ClassVar[Mapping[str, ForeignKey]] = LIGHTNING_KEYS

    accelerator: Literal["auto", "cpu", "gpu", "cuda"] = setting(
        "auto", "Where to compute: auto takes a GPU when there is one; gpu and cuda mean the same."
    )
    devices: int | str | list[int] = setting(
        "auto", "How many devices on this machine, or a list of GPU numbers. auto and -1: what is there."
    )
    num_nodes: int = setting(1, "Machines; torchrun or srun starts the processes where it is above 1.", ge=1)
    process_timeout: int = setting(
        1800, "A process that waits so long for another gives up, and all of them end.", unit="seconds", ge=1
    )
    precision: PrecisionName = setting(
        "auto",
        "What matrices are multiplied in. Masters, gradients and the residual stream stay fp32. auto: bf16-mixed where "
        "the hardware multiplies it natively, else 32. 64 is for tests.",
        examples=["bf16-mixed", "16-mixed", "32"],
    )
    max_steps: int = setting(100000, "Length of the run: optimizer steps.", unit="steps", ge=1)
    max_time: str | dict[str, float] | None = setting(
        None,
        "The run saves and stops after this long, DD:HH:MM:SS; started again, it goes on with the clock at zero.",
        examples=["00:03:30:00"],
    )
    log_every_n_steps: int = setting(
        10, "A row of metrics is written every so many steps.", unit="steps", ge=1
    )
    val_check_interval: int | None = setting(
        100, "Steps between two validations; null: none.", unit="steps", ge=1
    )
    limit_val_batches: int = setting(
        50, "Global batches of one validation, always from sample 0; 0: none.", unit="global batches", ge=0
    )
    limit_test_batches: int = setting(
        500, "Global batches that the test split is asked for.", unit="global batches", ge=0
    )
    test_at_end: bool = setting(
        False, "After the last step, measure the loss on limit_test_batches of the test split."
    )
    accumulate_grad_batches: int = setting(
        1,
        "Must be 1: global_batch_size ÷ (micro_batch_size × data-parallel size) micro-batches are accumulated.",
        ge=1,
    )
    gradient_clip_val: float | None = setting(
        1.0, "Gradients are scaled down to this global L2 norm; null or 0: not clipped.", ge=0
    )
    gradient_clip_algorithm: Literal["norm"] | None = setting(None, "Clipping is by the global norm.")
    enable_progress_bar: bool = setting(True, "Show a progress bar.")
    fast_dev_run: bool | int = setting(
        False, "A trial: that many steps (true: 1) and validation batches, without checkpoints and logs."
    )
    deterministic: bool | Literal["warn"] = setting(
        False,
        "Deterministic kernels only (warn: say which are not). On the CPU runs repeat bit by bit anyway.",
    )
    benchmark: bool | None = setting(None, "Let cuDNN try its kernels; transformers hardly use them.")
    detect_anomaly: bool = setting(False, "Name the operation whose gradient is NaN; slow.")
    tune_allocator: bool | Literal["auto"] = setting(
        "auto",
        "Keep freed memory for the next step instead of giving it back to the system: faster steps, more memory. "
        "auto: on a CPU.",
    )
    peak_tflops: float | None = setting(
        None, "Peak of one device for the utilisation (MFU) in the logs; null: from data sheets, where it is known.",
        unit="TFLOP/s", gt=0,
    )  # fmt: skip
    profiler: Literal["simple", "advanced", "pytorch"] | None = setting(
        None,
        "Measure where time goes: a table in fit-profile.txt of the run's folder; pytorch writes a trace too.",
    )

    @field_validator("accelerator", mode="before")
    @classmethod
    def _accelerator(cls, value: Any) -> Any:
        """NeMo ≤ 1.7 wrote the kind of parallelism here."""
        return "auto" if value in ("ddp", "ddp_spawn", "ddp2", "dp", None) else value

    @field_validator("devices", mode="before")
    @classmethod
    def _devices(cls, value: Any) -> Any:
        if isinstance(value, str) and re.fullmatch(r"-?\d+", value.strip()):
            value = int(value)
        if isinstance(value, str) and re.fullmatch(r"\d+(,\d*)+", value.strip()):
            value = [int(part) for part in value.split(",") if part]
        if value in (-1, "-1"):
            return "auto"
        if value in (0, "0", []) or (isinstance(value, int) and value < 0):
            raise ValueError(
                f"{value} devices cannot train\nfix: trainer.devices=1, or trainer.accelerator=cpu"
            )
        if isinstance(value, str) and value != "auto":
            raise ValueError(
                f'expected a number, a list of GPU numbers or auto, got "{value}"\nfix: trainer.devices=1'
            )
        return value

    @field_validator("precision", mode="before")
    @classmethod
    def _precision(cls, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | str):
            return value
        if value in ("16-true", "bf16-true"):
            raise ValueError(f"{value} {_NO_HALF_MASTERS}")
        if value in ("transformer-engine", "transformer-engine-float16"):
            raise ValueError("8-bit floats are not built; use bf16-mixed")
        return PRECISION_ALIASES.get(str(value), str(value))

    @field_validator("max_time")
    @classmethod
    def _max_time(cls, value: Any) -> Any:
        duration_seconds(value)
        return value

    @field_validator("max_steps", mode="before")
    @classmethod
    def _max_steps(cls, value: Any) -> Any:
        if value in (-1, None):
            raise ValueError(
                "a run needs a length, and it is counted in steps\nfix: trainer.max_steps=100000"
            )
        return value

    @field_validator("limit_val_batches", "limit_test_batches", "val_check_interval", mode="before")
    @classmethod
    def _whole_batches(cls, value: Any) -> Any:
        """Lightning's fractions: 1.0 is not 1. The data plan needs to know how many batches there will be."""
        if isinstance(value, float):
            raise ValueError(f"is a whole number; {value} would be a share of the data\nfix: a number, as 50")
        return value

    @property
    def max_seconds(self) -> float | None:
        """`max_time` in seconds."""
        return duration_seconds(self.max_time)

    @property
    def num_devices(self) -> int | None:
        """How many devices were asked for; None: auto."""
        if isinstance(self.devices, list):
            return len(self.devices)
        return self.devices if isinstance(self.devices, int) else None

    def problems(self) -> Iterable[Problem]:
        if self.accumulate_grad_batches != 1:
            yield error(
                "accumulate_grad_batches",
                f"is {self.accumulate_grad_batches}, but micro-batches are accumulated within a step",
                "leave it at 1; raise model.global_batch_size",
            )
        if self.accelerator == "cpu" and isinstance(self.devices, list):
            yield error("devices", "a list of GPU numbers, but accelerator is cpu", "trainer.devices=1")
        if self.val_check_interval and self.val_check_interval > self.max_steps and self.limit_val_batches:
            yield warning(
                "val_check_interval",
                f"{self.val_check_interval} is beyond max_steps {self.max_steps}: no validation",
            )


_NEMO_FILES = "`.nemo` archives are not written yet; checkpoints are folders of safetensors"
_EPOCHS = "checkpoints are written by steps or time: every_n_train_steps, train_time_interval"


class CheckpointCallbackParams(Section):
    """When checkpoints are written, which stay, and how they are called."""

    foreign_keys: ClassVar[Mapping[str, ForeignKey]] = {
        "always_save_nemo": ignored(_NEMO_FILES),
        "save_nemo_on_train_end": ignored(_NEMO_FILES),
        "save_best_model": ignored(_NEMO_FILES),
        "postfix": ignored(_NEMO_FILES),
        "model_parallel_size": ignored("checkpoints load at any layout"),
        "every_n_val_epochs": ignored(_EPOCHS),
        "every_n_epochs": ignored(_EPOCHS),
        "period": ignored(_EPOCHS),
        "save_on_train_epoch_end": ignored(_EPOCHS),
        "filepath": refused("it was split: dirpath is the folder, filename the template"),
        "prefix": ignored("filename is the whole template"),
        "auto_insert_metric_name": ignored("fields become metric=value, as NeMo's do", silent=True),
        "enable_version_counter": ignored("a checkpoint's folder is named by its step", silent=True),
        "async_save": renamed("asynchronous", "is called asynchronous here"),
    }

    dirpath: str | None = setting(None, "Folder of the checkpoints; null: `checkpoints` in the log folder.")
    filename: str | None = setting(
        None,
        "Template of the links to checkpoints: {metric:format} becomes metric=value. null: <name>--{monitor:.4f}-{step}.",
        examples=["megatron_gpt--{val_loss:.2f}-{step}-{consumed_samples}"],
    )
    every_n_train_steps: int | None = setting(
        None, "Save every so many steps. With neither this nor train_time_interval: after each validation.",
        unit="steps", ge=0,
    )  # fmt: skip
    train_time_interval: str | dict[str, float] | float | None = setting(
        None, "Save when so long has passed since the last save: DD:HH:MM:SS, {minutes: 30}, or minutes as a number.",
        unit="minutes", examples=["00:00:30:00", 30],
    )  # fmt: skip
    save_top_k: int = setting(3, "How many of the best checkpoints stay; -1: all, 0: only the last.", ge=-1)
    save_last: bool = setting(True, "Keep a link NAME-last to the newest checkpoint.")
    monitor: str | None = setting("val_loss", "The metric that says which are best; null: the newest are.")
    mode: Literal["min", "max"] = setting("min", "Is a small or a large `monitor` good?")
    keep_every_n_steps: int | None = setting(
        None, "Checkpoints at multiples of this stay for ever.", unit="steps", ge=1
    )
    drop_optimizer: bool = setting(
        False, "Remove the optimizer's state (two thirds of the bytes) of all checkpoints but the newest."
    )
    save_weights_only: bool = setting(
        False, "Must be false: a checkpoint without optimizer cannot be resumed from."
    )
    asynchronous: bool = setting(
        False, "Write checkpoints while training goes on; costs one copy of the state in memory."
    )
    verbose: bool = setting(True, "Say where each checkpoint went.")

    @field_validator("train_time_interval")
    @classmethod
    def _interval(cls, value: Any) -> Any:
        if not isinstance(value, int | float):
            duration_seconds(value)
        elif value <= 0:
            raise ValueError(f"{value:g} minutes is not a duration above 0")
        return value

    @property
    def interval_seconds(self) -> float | None:
        """`train_time_interval` in seconds."""
        if isinstance(self.train_time_interval, int | float):
            return 60.0 * self.train_time_interval
        return duration_seconds(self.train_time_interval)

    def problems(self) -> Iterable[Problem]:
        if self.save_weights_only:
            yield error(
                "save_weights_only",
                "is true, but a run could not go on from such checkpoints",
                "drop_optimizer=true",
            )


class ExpManagerConfig(Section):
    """Where a run lives, how it resumes, what it logs."""

    foreign_keys: ClassVar[Mapping[str, ForeignKey]] = {
        "create_preemption_callback": ignored("SIGTERM, SIGINT and SIGUSR1 always save and stop the run"),
        "create_early_stopping_callback": refused("early stopping is not built"),
        "early_stopping_callback_params": ignored("there is no early stopping"),
        "ema": ignored("weights are not averaged"),
        "create_mlflow_logger": refused("loggers are metrics.jsonl, TensorBoard and W&B"),
        "create_dllogger_logger": refused("loggers are metrics.jsonl, TensorBoard and W&B"),
        "create_clearml_logger": refused("loggers are metrics.jsonl, TensorBoard and W&B"),
        "create_neptune_logger": refused("loggers are metrics.jsonl, TensorBoard and W&B"),
        "mlflow_logger_kwargs": ignored("loggers are metrics.jsonl, TensorBoard and W&B"),
        "dllogger_logger_kwargs": ignored("loggers are metrics.jsonl, TensorBoard and W&B"),
        "clearml_logger_kwargs": ignored("loggers are metrics.jsonl, TensorBoard and W&B"),
        "neptune_logger_kwargs": ignored("loggers are metrics.jsonl, TensorBoard and W&B"),
        "model_parallel_size": ignored("checkpoints load at any layout"),
        "log_local_rank_0_only": ignored("every process has its log"),
        "log_global_rank_0_only": ignored("every process has its log"),
        "disable_validation_on_resume": ignored("a resumed run validates when it is due"),
        "seconds_to_sleep": ignored("processes wait for each other without sleeping"),
        "max_time_per_run": renamed("trainer.max_time", "is called trainer.max_time here"),
        "resume_from_checkpoint": renamed(
            "model.resume_from_checkpoint", "is called model.resume_from_checkpoint here"
        ),
        "log_step_timing": ignored("step times are always logged"),
        "step_timing_kwargs": ignored("step times are means over the steps since the last row"),
        "resume_past_end": ignored("a run that is complete says so and ends"),
        "log_tflops_per_sec_per_gpu": ignored("TFLOP/s are always logged"),
    }
    null_means: ClassVar[Mapping[str, Any] | None] = {
        "create_checkpoint_callback": False,
        "create_tensorboard_logger": False,
    }

    explicit_log_dir: str | None = setting(
        None, "Exactly this folder; exp_dir and version are then left out of account."
    )
    exp_dir: str | None = setting(None, "Folder of all experiments; null: nemo_experiments here.")
    name: str | None = setting(None, "Name of the run; null: default.")
    version: str | None = setting(
        None, "Sub-folder of one start; null: the date (or a number), none when resume_if_exists."
    )
    use_datetime_version: bool = setting(True, "Versions are dates; false: version_0, version_1, ….")
    resume_if_exists: bool = setting(
        False, "Go on from the newest whole checkpoint of this run, if there is one."
    )
    resume_ignore_no_checkpoint: bool = setting(
        False, "With resume_if_exists: begin when there is no checkpoint, instead of stopping."
    )
    create_tensorboard_logger: bool = setting(True, "Write TensorBoard events.")
    summary_writer_kwargs: dict[str, Any] | None = setting(None, "Arguments of TensorBoard's writer.")
    create_wandb_logger: bool = setting(False, "Log to Weights & Biases too (pip install wandb).")
    wandb_logger_kwargs: dict[str, Any] | None = setting(
        None, "Arguments of its logger; name and project at least."
    )
    create_checkpoint_callback: bool = setting(True, "Write checkpoints.")
    checkpoint_callback_params: CheckpointCallbackParams = setting(
        CheckpointCallbackParams, "When checkpoints are written, which stay, and how they are called."
    )
    files_to_copy: list[str] | None = setting(None, "Files that are copied into the run's folder.")

    def problems(self) -> Iterable[Problem]:
        if self.explicit_log_dir and (self.exp_dir or self.version):
            yield warning("explicit_log_dir", "is given, so exp_dir and version are left out of account")
        if "log_dir" in (self.summary_writer_kwargs or {}):
            yield error(
                "summary_writer_kwargs", "log_dir is the run's folder", "exp_manager.explicit_log_dir sets it"
            )
        given = {k for k, v in (self.wandb_logger_kwargs or {}).items() if v}
        missing = sorted({"name", "project"} - given)
        if self.create_wandb_logger and missing:
            yield error(
                "wandb_logger_kwargs", f"create_wandb_logger needs {' and '.join(missing)}",
                f"exp_manager.wandb_logger_kwargs.{missing[0]}=…",
            )  # fmt: skip
        if self.resume_ignore_no_checkpoint and not self.resume_if_exists:
            yield warning("resume_ignore_no_checkpoint", "has no effect without resume_if_exists")
