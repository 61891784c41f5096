"""The root configurations of tuning: `megalith tune soft-prompt|p-tuning|lora` and `megalith finetune gpt`, in NeMo's words.

    TuneConfig, one of each family        what a run of pretraining has, and
      ├ restore_from_path                 the model that is tuned, or the output of an earlier tuning
      └ model   prompts, templates, lora  beside batches, layout and optimizer; the architecture comes with the model
          └ data   train_ds, valid_ds, test_ds

Knows which values cannot go together; every such rule reports all its problems at once. Knows no checkpoint. Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from megalith.config.schema import ForeignKey, Section, error, ignored, refused, renamed, setting
from megalith.data.config import DataConfig
from megalith.data.masks import Masks
from megalith.data.shape import Shape
from megalith.data.tuning_tasks import template_problems
from megalith.errors import Problem
from megalith.tasks.model_keys import ENCODER_DECODER_KEYS, MODEL_KEYS
from megalith.tasks.pretrain_config import PretrainConfig
from megalith.tasks.pretrain_families import BartModelConfig, GPTModelConfig, T5ModelConfig
from megalith.tasks.pretrain_model import CompatConfig, PretrainModelConfig
from megalith.tokenizers.base import Tokenizer
from megalith.training.config import CheckpointCallbackParams, ExpManagerConfig

MethodName = Literal["soft-prompt", "p-tuning", "lora", "full"]
PACKAGED: Mapping[MethodName, str] = {
    "soft-prompt": "megatron_prompt_tuning_gpt",
    "p-tuning": "megatron_gpt_prompt_learning_config",
    "lora": "megatron_gpt_peft_tuning_config",
    "full": "megatron_gpt_sft",
}
"""The packaged configuration of each way of tuning, by NeMo's names."""
TWO_SIDES = "megatron_prompt_tuning_t5"
"""That of soft prompts for an encoder-decoder."""
WITH_PROMPTS = ("soft-prompt", "p-tuning")
_TOKEN_FILES = "tuning reads rows of text, not token files"
_OWN = {"num_workers"}


def _listed(value: Any) -> Any:
    """One text stands for a list of it."""
    return [value] if isinstance(value, str) else value


class TuneDataConfig(Section):
    """Files of rows → samples."""

    foreign_keys: ClassVar[Mapping[str, ForeignKey]] = {
        **{
            name: ignored(_TOKEN_FILES, silent=True)
            for name in (*DataConfig.model_fields, *DataConfig.foreign_keys)
            if name not in _OWN
        },
        "seq_length_dec": ignored(_TOKEN_FILES, silent=True),
        "batch_size": renamed("model.global_batch_size", "is called model.global_batch_size here"),
        "validation_ds": renamed("valid_ds", "is called model.data.valid_ds here"),
        "shuffle": ignored("samples are always shuffled, anew in each round"),
        "pin_memory": ignored("batches are in page-locked memory where there is a GPU"),
    }

    train_ds: str | list[str] = setting(
        meaning="Rows to learn from: .jsonl or .json, one object a line with prompt_tag, text and answer; or several files.",
        examples=["winogrande_train.jsonl"],
    )
    valid_ds: str | list[str] | None = setting(None, "Rows that val_loss is measured on, all of them.")
    test_ds: str | list[str] | None = setting(None, "Rows for trainer.test_at_end.")
    max_seq_length: int | None = setting(
        None,
        "Longest sample, virtual tokens and all (of T5 and BART: either side); null: model.encoder_seq_length.",
        unit="tokens",
        ge=2,
    )
    min_seq_length: int = setting(1, "Shortest sample, without virtual tokens.", unit="tokens", ge=1)
    add_bos: bool | None = setting(
        None, "Put the begin-of-sequence token before the text; null: as the model's texts begin."
    )
    add_eos: bool = setting(
        True, "Put the end-of-sequence token behind the answer: the model learns to stop."
    )
    truncate_field: str | None = setting(
        None,
        "Field whose end is cut off where a sample is too long; null: such samples are left out, and counted.",
        examples=["text"],
    )
    num_workers: int = setting(0, "Threads that make batches ahead; 0: when they are needed.", ge=0, le=256)

    def files(self, split: str) -> tuple[str, ...]:
        """Of train, valid or test."""
        value = getattr(self, f"{split}_ds")
        return tuple([value] if isinstance(value, str) else value or ())

    def problems(self) -> Iterable[Problem]:
        if not self.files("train"):
            yield error("train_ds", "names no file", "model.data.train_ds=FILE.jsonl")
        if self.max_seq_length is not None and self.min_seq_length > self.max_seq_length:
            what = f"{self.min_seq_length} is above max_seq_length {self.max_seq_length}"
            yield error("min_seq_length", what, f"at most {self.max_seq_length}")


class TaskTemplate(Section):
    """How a task's rows are put together (NeMo 1.9's task_templates)."""

    taskname: str = setting(meaning="Name of the task, as rows say it in their field taskname.")
    prompt_template: str = setting(
        meaning="Text with {field}s of the row and <|VIRTUAL_PROMPT_0|> … where virtual tokens stand."
    )
    total_virtual_tokens: int = setting(meaning="Virtual tokens of the task.", ge=1)
    virtual_token_splits: list[int] | None = setting(None, "How many at each mark; null: all at one.")
    truncate_field: str | None = setting(None, "Field whose end is cut off where a sample is too long.")
    answer_only_loss: bool = setting(True, "Only the answer counts in the loss.")
    answer_field: str | None = setting(None, "The field that is the answer; null: the last of the template.")

    @property
    def splits(self) -> list[int]:
        """`virtual_token_splits`."""
        return self.virtual_token_splits or [self.total_virtual_tokens]

    def wrong(self) -> Iterator[tuple[str, str, str]]:
        """(key, what, fix) of each problem."""
        yield from template_problems(
            self.prompt_template,
            self.splits,
            self.total_virtual_tokens,
            self.answer_field,
            self.truncate_field,
        )


class PTuningConfig(Section):
    """The network that makes virtual tokens."""

    dropout: float = setting(0.0, "Of the virtual tokens, in training.", ge=0, lt=1)
    num_layers: int = setting(2, "Layers of the LSTM.", ge=1)
    encoder_type: Literal["lstm", "mlp"] = setting(
        "lstm", "A bidirectional LSTM and a small MLP, or the MLP alone."
    )

    foreign_keys: ClassVar[Mapping[str, ForeignKey]] = {
        "encoder_hidden": ignored("the network is as wide as the model"),
        "init_std": ignored("the network begins as its layers do"),
    }


class LoRAConfig(Section):
    """The low-rank matrices beside a model's products."""

    foreign_keys: ClassVar[Mapping[str, ForeignKey]] = {
        "adapter_dim": renamed("rank", "is called rank here"),
        "r": renamed("rank", "is called rank here"),
        "lora_alpha": renamed("alpha", "is called alpha here"),
        "adapter_dropout": renamed("dropout", "is called dropout here"),
        "lora_dropout": renamed("dropout", "is called dropout here"),
        "target_modules": renamed("targets", "is called targets here"),
        "column_init_method": ignored("A begins random, B at zero"),
        "row_init_method": ignored("A begins random, B at zero"),
    }

    rank: int = setting(8, "Columns of the low-rank product.", ge=1)
    alpha: float = setting(16.0, "What it adds is scaled by alpha / rank.", gt=0)
    dropout: float = setting(0.0, "Of what the product reads, in training.", ge=0, lt=1)
    targets: list[str] = setting(
        lambda: ["all-linear"],
        "Products that get one: all-linear; names (qkv, attention.out, q_proj); axes (embed->mlp); or patterns of names.",
        examples=[["qkv", "attention.out"]],
    )

    _one_target = field_validator("targets", mode="before")(_listed)


class TuneCompatConfig(CompatConfig):
    """The same, and one of tuning."""

    frozen_dropout: bool = setting(
        False,
        "The model that stays as it is computes without dropout; true: with it, as in NeMo, which leaves it in training mode.",
    )


class TuneKeys(PretrainModelConfig):
    """What the section `model` of every family has besides for tuning."""

    tuning_method: MethodName = setting("soft-prompt", "What is tuned; the command says.")
    use_soft_prompts: bool = setting(True, "NeMo's switch; prompts are tuned because the command says so.")
    num_prompt_tokens: int = setting(100, "Virtual tokens of each new prompt, P.", unit="tokens", ge=1)
    new_prompt_tags: list[str] = setting(
        list, "Tasks that get a prompt now, as rows name them in prompt_tag.", examples=[["Winogrande"]]
    )
    existing_prompt_tags: list[str | tuple[str, int]] = setting(
        list,
        "Tags that restore_from_path has already, as names or [name, number] pairs; they stay as they are. Empty: whichever it has.",
    )
    new_prompt_init_methods: list[Literal["text", "random"]] | None = setting(
        None, "One for each new tag; null: text where there is a text."
    )
    new_prompt_init_text: list[str] | None = setting(
        None,
        "One for each new tag: the embeddings of its tokens, clipped or repeated, are what the prompt begins as.",
    )
    calc_loss_on_answer_only: bool = setting(False, "Only the answer counts in the loss, not the text.")
    task_templates: list[TaskTemplate] | None = setting(
        None,
        "How rows of a task are put together; a task without one has rows of prompt_tag, text and answer.",
    )
    p_tuning: PTuningConfig = setting(PTuningConfig, "tune p-tuning: the network that makes virtual tokens.")
    lora: LoRAConfig = setting(LoRAConfig, "tune lora: the low-rank matrices.")
    data: TuneDataConfig = setting(TuneDataConfig, "Files of rows, and how samples are made of them.")
    compat: TuneCompatConfig = setting(
        TuneCompatConfig, "Switches for continuing other toolkits' runs exactly."
    )

    _one_task = field_validator(
        "new_prompt_tags", "existing_prompt_tags", "new_prompt_init_methods", "new_prompt_init_text",
        mode="before",
    )(_listed)  # fmt: skip

    @property
    def with_prompts(self) -> bool:
        """Are virtual tokens tuned?"""
        return self.tuning_method in WITH_PROMPTS

    @property
    def new_tags(self) -> list[str]:
        """The tags that get a prompt now: those named, or those of all templates that do not exist."""
        named = [t.taskname for t in self.task_templates or () if t.taskname not in self.existing_tags]
        return self.new_prompt_tags or named

    @property
    def existing_tags(self) -> list[str]:
        """Their names, in the order of their numbers where they have some."""
        pairs = [
            (tag, i) if isinstance(tag, str) else tag for i, tag in enumerate(self.existing_prompt_tags, 1)
        ]
        return [tag for tag, _ in sorted(pairs, key=lambda pair: pair[1])]

    @property
    def init_texts(self) -> dict[str, str | None]:
        """What each new prompt begins from: a text, or None for random numbers."""
        texts: list[str | None] = list(self.new_prompt_init_text or ())
        texts += [None] * (len(self.new_tags) - len(texts))
        methods = self.new_prompt_init_methods or ["text" if text else "random" for text in texts]
        return {
            tag: text if method == "text" else None
            for tag, text, method in zip(self.new_tags, texts[: len(self.new_tags)], methods, strict=True)
        }

    @property
    def longest(self) -> int:
        """Tokens that a sample may have."""
        return min(self.data.max_seq_length or self.encoder_seq_length, self.positions)

    def _length_problems(self) -> Iterator[Problem]:
        asked, positions = self.data.max_seq_length, self.positions
        if asked is not None and asked > positions:
            what = f"{asked} is beyond the model's {positions} positions, which virtual tokens take part of"
            yield error("data.max_seq_length", what, f"at most {positions}")
        if self.with_prompts:
            yield from self._room_problems()

    def _room_problems(self) -> Iterator[Problem]:
        lengths = dict.fromkeys(self.new_tags, self.num_prompt_tokens)
        lengths |= {t.taskname: t.total_virtual_tokens for t in self.task_templates or ()}
        for tag, length in lengths.items():
            if length >= self.longest:
                what = f"the {length} virtual tokens of {tag} leave no room for text: a sample has {self.longest} tokens"
                yield error(
                    "num_prompt_tokens",
                    what,
                    f"fewer than {self.longest}; or a larger model.data.max_seq_length",
                )

    def problems(self) -> Iterable[Problem]:
        yield from super().problems()
        if not self.with_prompts:
            if self.new_prompt_tags or self.existing_prompt_tags or self.task_templates:
                what = f"{'LoRA' if self.tuning_method == 'lora' else 'full tuning'} has no prompts"
                yield error(
                    "new_prompt_tags", what, "megalith tune soft-prompt; or leave prompts and templates out"
                )
            return
        if not self.use_soft_prompts:
            yield error(
                "use_soft_prompts", "is false, and prompts are what is tuned", "model.use_soft_prompts=true"
            )
        yield from self._tag_problems()
        yield from self._init_problems()
        yield from self._template_problems()

    def _tag_problems(self) -> Iterator[Problem]:
        if not self.new_tags:
            yield error("new_prompt_tags", "names no task to tune", "model.new_prompt_tags=[NAME]")
        for key, tags in (
            ("new_prompt_tags", self.new_prompt_tags),
            ("existing_prompt_tags", self.existing_tags),
        ):
            for tag in tags:
                if not tag.strip():
                    yield error(key, "holds an empty name", "name the task as its rows do in prompt_tag")
                elif "," in tag:
                    first, second = (part.strip() for part in tag.split(",", 1))
                    what = f'"{tag}" is one tag with a comma in it: quotes made one name of two'
                    yield error(key, what, f"model.{key}=[{first},{second}]")
            for tag, count in Counter(tags).items():
                if count > 1:
                    yield error(key, f"{tag} stands in it {count} times", "each task once")
        for tag in self.new_prompt_tags:
            if tag in self.existing_tags:
                what = (
                    f"{tag} is also in existing_prompt_tags: a prompt is tuned once, then it stays as it is"
                )
                yield error("new_prompt_tags", what, "another name for the new prompt")

    def _init_problems(self) -> Iterator[Problem]:
        count, methods, texts = len(self.new_tags), self.new_prompt_init_methods, self.new_prompt_init_text
        tags = f"{count} new tag{'' if count == 1 else 's'}"
        if methods is not None and len(methods) != count:
            yield error(
                "new_prompt_init_methods", f"{len(methods)} for {tags}", "one for each: text or random"
            )
            return
        wanting = methods is None or "text" in methods
        if wanting and texts is not None and len(texts) != count:
            what = f"{len(texts)} for {tags}: {texts}"
            fix = (
                "one for each tag; where a text holds a comma, keep its quotes from the shell: "
                "\"model.new_prompt_init_text=['first, second']\""
            )
            yield error("new_prompt_init_text", what, fix)
            return
        for i, method in enumerate(methods or ()):
            if method == "text" and not (texts and texts[i].strip()):
                what = f"is empty for {self.new_tags[i]}, whose method is text"
                yield error("new_prompt_init_text", what, "a text; or model.new_prompt_init_methods=[random]")

    def _template_problems(self) -> Iterator[Problem]:
        templates = self.task_templates or []
        for template in templates:
            for key, what, fix in template.wrong():
                yield error("task_templates", f"{template.taskname}: {key}: {what}", fix)
        for name, count in Counter(t.taskname for t in templates).items():
            if count > 1:
                yield error("task_templates", f"{name} stands in it {count} times", "each task once")
        tags, named = set(self.new_tags), {t.taskname for t in templates}
        if templates and (missing := sorted(tags - named)):
            what = (
                f"none for {', '.join(missing)}, and other tasks have one: all rows of a run are read alike"
            )
            yield error("task_templates", what, "a template for each task, or for none")


class TuneGPTModelConfig(TuneKeys, GPTModelConfig):
    """A GPT that is tuned."""

    foreign_keys: ClassVar[Mapping[str, ForeignKey]] = {}

    data: TuneDataConfig = setting(TuneDataConfig, "Files of rows, and how samples are made of them.")


class _TwoSides(TuneKeys):
    """What T5 and BART say otherwise when they are tuned."""

    @property
    def decoder_length(self) -> int:
        """An answer may be as long as a text."""
        return self.encoder_seq_length

    @property
    def shape(self) -> Shape:
        """There are no token files."""
        return Shape()

    def masks(self, tokenizer: Tokenizer) -> Masks:
        """There are no token files."""
        raise NotImplementedError


class TuneT5ModelConfig(_TwoSides, T5ModelConfig):
    """A T5 that is tuned."""

    data: TuneDataConfig = setting(TuneDataConfig, "Files of rows, and how samples are made of them.")


class TuneBartModelConfig(_TwoSides, BartModelConfig):
    """A BART that is tuned."""

    data: TuneDataConfig = setting(TuneDataConfig, "Files of rows, and how samples are made of them.")


_STYLES: Mapping[str, ForeignKey] = {
    "virtual_prompt_style": ignored("the command says what is tuned"),
    "new_tasks": renamed("new_prompt_tags", "is called model.new_prompt_tags here"),
    "existing_tasks": renamed("existing_prompt_tags", "is called model.existing_prompt_tags here"),
    "language_model_path": refused("is called restore_from_path here, beside model"),
    "lm_finetune": ignored("megalith finetune gpt tunes the whole model"),
    "pseudo_token_base": ignored("virtual tokens are ids behind the vocabulary"),
    "nemo_path": ignored("the run's folder holds what was tuned"),
}
TuneGPTModelConfig.foreign_keys = {**MODEL_KEYS, **_STYLES}
for _section in (TuneT5ModelConfig, TuneBartModelConfig):
    _section.foreign_keys = {**ENCODER_DECODER_KEYS, **_STYLES}


class TuneCheckpointParams(CheckpointCallbackParams):
    """When checkpoints are written, and whether a `.nemo` is at the end."""

    save_nemo_on_train_end: bool = setting(
        False, "At the end, write the model with its prompts as NAME.nemo beside the checkpoints."
    )


class TuneExpManagerConfig(ExpManagerConfig):
    """Where a run lives, how it resumes, what it logs."""

    checkpoint_callback_params: TuneCheckpointParams = setting(
        TuneCheckpointParams, "When checkpoints are written, which stay, and how they are called."
    )


class TuneConfig(PretrainConfig):
    """Everything about one tuning run."""

    packaged: ClassVar[str] = "megatron_prompt_tuning_gpt"

    name: str = setting("megatron_gpt", "Name of the model.")
    restore_from_path: str = setting(
        meaning="The model that is tuned, in any format; or what an earlier tuning wrote, whose tags then stay."
    )
    exp_manager: TuneExpManagerConfig = setting(
        TuneExpManagerConfig, "Where the run lives, how it resumes, what it logs."
    )
    model: TuneKeys

    @property
    def init_from(self) -> str:
        """The model that is tuned."""
        return self.restore_from_path

    def problems(self) -> Iterable[Problem]:
        yield from super().problems()
        validates = self.trainer.limit_val_batches and self.trainer.val_check_interval
        if validates and not self.model.data.files("valid"):
            fix = "model.data.valid_ds=FILE.jsonl; or trainer.limit_val_batches=0, which validates nothing"
            yield error("model.data.valid_ds", "names no file to validate on", fix)
        if self.trainer.test_at_end and not self.model.data.files("test"):
            fix = "model.data.test_ds=FILE.jsonl; or trainer.test_at_end=false"
            yield error("model.data.test_ds", "names no file to test on", fix)
        if self.model.rampup_batch_size:
            yield error(
                "model.rampup_batch_size", "tuning has batches of one size", "~model.rampup_batch_size"
            )


def _model(section: type[TuneKeys]) -> Any:
    return setting(section, "What is tuned, batches, layout, data and optimizer.")


class TuneGPTConfig(TuneConfig):
    """Everything about one tuning run of a GPT."""

    model: TuneGPTModelConfig = _model(TuneGPTModelConfig)


class TuneT5Config(TuneConfig):
    """Everything about one tuning run of a T5."""

    packaged: ClassVar[str] = "megatron_prompt_tuning_t5"
    model: TuneT5ModelConfig = _model(TuneT5ModelConfig)


class TuneBartConfig(TuneConfig):
    """Everything about one tuning run of a BART."""

    model: TuneBartModelConfig = _model(TuneBartModelConfig)


TUNE_ROOTS: Mapping[str, type[TuneConfig]] = {
    "gpt": TuneGPTConfig,
    "t5": TuneT5Config,
    "bart": TuneBartConfig,
}
"""The root configuration of each family that can be tuned."""
