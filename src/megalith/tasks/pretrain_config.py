"""The root configurations of `megalith pretrain`: name, trainer, exp_manager and model, in NeMo's words.

    PretrainConfig, one of each family
      ├ trainer      training.config.TrainerConfig
      ├ exp_manager  training.config.ExpManagerConfig
      └ model        tasks.pretrain_families

Knows which values cannot go together, across sections; every such rule reports all its problems at once. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from megalith.config.schema import ForeignKey, Section, error, ignored, renamed, setting, warning
from megalith.errors import ConfigError, Problem
from megalith.optim.schedule import Schedule, make_schedule
from megalith.tasks.pretrain_families import BartModelConfig, BertModelConfig, GPTModelConfig, T5ModelConfig
from megalith.tasks.pretrain_model import PretrainModelConfig
from megalith.training.config import ExpManagerConfig, TrainerConfig


class PretrainConfig(Section):
    """Everything about one pretraining run."""

    foreign_keys: ClassVar[Mapping[str, ForeignKey]] = {
        "hydra": ignored("there is no Hydra; exp_manager decides where files go"),
        "cluster_type": ignored("torchrun and SLURM are found out"),
        "restore_from_ckpt": renamed(
            "model.resume_from_checkpoint", "is called model.resume_from_checkpoint here"
        ),
    }

    name: str
    restore_from_path: str | None = setting(
        None, "NeMo's way to begin from an archive; the same as model.init_from."
    )
    trainer: TrainerConfig = setting(TrainerConfig, "Hardware, length, validation, logging.")
    exp_manager: ExpManagerConfig = setting(
        ExpManagerConfig, "Where the run lives, how it resumes, what it logs."
    )
    model: PretrainModelConfig

    @property
    def schedule(self) -> Schedule:
        """Learning rate and weight decay of the run. Errors: `ConfigError` for curves that cannot be."""
        model, steps = self.model, self.trainer.max_steps
        return make_schedule(
            model.optim,
            max_steps=steps,
            global_batch=model.global_batch_size,
            sequence_length=model.sample.tokens,
            total_samples=model.batch_schedule.consumed_at(steps),
            first_step=model.compat.first_step,
            width=model.hidden_size,
        )

    @property
    def init_from(self) -> str | None:
        """The checkpoint whose weights begin the run, under either name."""
        return self.model.init_from or self.restore_from_path

    def problems(self) -> Iterable[Problem]:
        yield from self._schedule_problems()
        if self.restore_from_path and (self.model.init_from or self.model.resume_from_checkpoint):
            yield error(
                "restore_from_path",
                "says where to begin, and so do model.init_from or model.resume_from_checkpoint",
                "keep one of them",
            )
        params, trainer = self.exp_manager.checkpoint_callback_params, self.trainer
        validates = trainer.val_check_interval and trainer.limit_val_batches
        if self.exp_manager.create_checkpoint_callback and not validates and params.monitor == "val_loss":
            yield warning(
                "exp_manager.checkpoint_callback_params.monitor",
                "is val_loss, but there is no validation: the newest checkpoints stay instead of the best",
                "exp_manager.checkpoint_callback_params.monitor=null says so",
            )

    def _schedule_problems(self) -> Iterator[Problem]:
        try:
            notes = self.schedule.warnings
        except ConfigError as wrong:
            yield from wrong.problems
            return
        warmup = max(self.trainer.max_steps // 20, 1)
        cure = (
            f"model.optim.sched.warmup_steps={warmup} model.optim.sched.constant_steps=0 decays over the rest"
        )
        for note in notes:
            yield warning("model.optim.sched", note, cure if "no decay" in note else "")


def _name(family: str) -> Any:
    return setting(f"megatron_{family}", "Name of the model.")


def _model(section: type[PretrainModelConfig]) -> Any:
    return setting(section, "The model, its batches, its data and its optimizer.")


class PretrainGPTConfig(PretrainConfig):
    """Everything about one pretraining run of a GPT."""

    packaged: ClassVar[str] = "megatron_gpt_config"

    name: str = _name("gpt")
    model: GPTModelConfig = _model(GPTModelConfig)


class PretrainBertConfig(PretrainConfig):
    """Everything about one pretraining run of a BERT."""

    packaged: ClassVar[str] = "megatron_bert_config"

    name: str = _name("bert")
    model: BertModelConfig = _model(BertModelConfig)


class PretrainT5Config(PretrainConfig):
    """Everything about one pretraining run of a T5."""

    packaged: ClassVar[str] = "megatron_t5_config"

    name: str = _name("t5")
    model: T5ModelConfig = _model(T5ModelConfig)


class PretrainBartConfig(PretrainConfig):
    """Everything about one pretraining run of a BART."""

    packaged: ClassVar[str] = "megatron_bart_config"

    name: str = _name("bart")
    model: BartModelConfig = _model(BartModelConfig)


ROOTS: Mapping[str, type[PretrainConfig]] = {
    "gpt": PretrainGPTConfig,
    "bert": PretrainBertConfig,
    "t5": PretrainT5Config,
    "bart": PretrainBartConfig,
}
"""The root configuration of each family."""
