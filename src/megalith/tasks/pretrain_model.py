"""The section `model` of any pretraining run: architecture, batches, layout, where to begin, and the sections of other packages.

    PretrainModelConfig     the fields of models.config.ModelConfig, batch and parallel sizes, and
      ├ data  tokenizer  optim      of their own packages
      └ compat                      switches for continuing other toolkits' runs

A family (`families`) adds the fields of its architecture, its data section, and what a sample of it is. Knows which values
cannot go together; every such rule reports all its problems at once. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, ClassVar, Literal

from pydantic import field_validator, model_validator

from megalith.config.schema import ForeignKey, Section, error, setting, warning
from megalith.data.config import DataConfig
from megalith.data.masks import Masks
from megalith.data.schedule import BatchRampUp
from megalith.data.shape import Shape
from megalith.engine.flops import Sample
from megalith.errors import ConfigError, Problem
from megalith.models import presets
from megalith.models.config import ModelConfig
from megalith.optim.config import OptimConfig
from megalith.tasks.model_keys import MODEL_KEYS
from megalith.tokenizers.base import Tokenizer
from megalith.tokenizers.config import TokenizerConfig
from megalith.topology.sizes import Divisible, PipelineSchedule, Sizes

FAMILIES = ("gpt", "bert", "t5", "bart")
_NOT_OF_A_PRESET = {
    "vocab_size",
    "make_vocab_size_divisible_by",
    "attention_core",
    "hidden_dropout",
    "attention_dropout",
    "init_method_std",
    "use_scaled_init_method",
}
"""Fields that a preset leaves alone unless it names them: how a shape is trained, and on which vocabulary."""


def preset_setting(family: str) -> Any:
    """The field `preset` of a family."""
    return setting(
        None,
        "A published shape; keys typed beside it change it. It sets architecture, max_position_embeddings and "
        "encoder_seq_length, and wins over files that come before it.",
        examples=presets.names(family),
    )


class CompatConfig(Section):
    """Switches for continuing runs of Megatron-LM and NeMo exactly. Importers set them; the defaults are the right thing."""

    first_step: Literal["one", "zero"] = setting(
        "one",
        "Megatron's curves: the first update has the rate of step one; zero: as Megatron, which begins with rate 0.",
    )
    loss_average: Literal["tokens", "micro_batches"] = setting(
        "tokens",
        "A step's loss is the mean over its tokens; micro_batches: Megatron's mean of the means of micro-batches, which "
        "depends on the layout.",
    )
    padded_logits: Literal["cut", "trained"] = setting(
        "cut",
        "Rows that pad the vocabulary are cut off before the loss; trained: as Megatron, whose softmax runs over them.",
    )
    eod_sense: Literal["input", "target"] = setting(
        "input",
        "Which target model.data.eod_mask_loss drops: the one predicted from the end-of-document token (Megatron's), or "
        "that token itself.",
    )


class PretrainModelConfig(ModelConfig):
    """The model, its batches, its layout, and the sections data, tokenizer, optim and compat."""

    family: ClassVar[str]
    """A name of `models.family`."""
    architecture_class: ClassVar[type[ModelConfig]] = ModelConfig
    """Whose fields are stored with the weights."""

    foreign_keys: ClassVar[Mapping[str, ForeignKey]] = MODEL_KEYS

    preset: str | None = setting(None, "A published shape of the family.")
    vocab_size: int | None = setting(
        None,
        "True vocabulary; null: the tokenizer's. Larger leaves room for more tokens.",
        unit="tokens",
        gt=0,
    )
    encoder_seq_length: int = setting(512, "Tokens of one training sample.", unit="tokens", ge=1, le=2**26)
    max_position_embeddings: int | None = setting(
        None,
        "Rows of the learned position table; other position types: the length trained on. null: encoder_seq_length.",
        unit="tokens", gt=0,
    )  # fmt: skip

    micro_batch_size: int = setting(
        4, "Samples that one process computes at a time: memory, never results.", unit="samples", ge=1
    )
    global_batch_size: int = setting(
        8,
        "Samples of one optimizer step, over all processes and micro-batches.",
        unit="samples",
        ge=1,
        le=2**24,
    )
    rampup_batch_size: list[int] | None = setting(
        None,
        "[first size, increment, samples]: the batch grows to global_batch_size over so many samples.",
        examples=[[16, 16, 5859375]],
    )
    tensor_model_parallel_size: int = setting(1, "Processes that share each matrix.", ge=1)
    pipeline_model_parallel_size: int = setting(1, "Groups of processes that share the layers.", ge=1)
    virtual_pipeline_model_parallel_size: int | None = setting(
        None, "Interleaved stages of each pipeline rank; null: one.", ge=1
    )
    context_parallel_size: int = setting(
        1,
        "Processes that share each sequence, two chunks each: encoder_seq_length must be a multiple of twice as many.",
        ge=1,
    )
    expert_model_parallel_size: int = setting(1, "Processes that share the experts of a layer.", ge=1)
    sequence_parallel: bool = setting(
        False, "Tensor ranks share the sequence between matrices; saves memory, changes nothing else."
    )
    pipeline_schedule: Literal["auto", "1f1b", "interleaved", "zero_bubble"] = setting(
        "auto", "Order of the pipeline's work. auto: interleaved where a rank has several stages, else 1f1b."
    )
    pipeline_layers: list[int] | None = setting(
        None,
        "Number of layers of each pipeline stage, first to last; null: as even as they can be.",
        examples=[[7, 8, 8, 7]],
    )
    zero_stage: Literal[0, 1, 2, 3] = setting(
        0, "What data-parallel ranks share: nothing, optimizer state, gradients too, weights too."
    )
    zero_shard_size: int | None = setting(
        None,
        "With zero_stage, so many data-parallel ranks share, and such groups are replicas; null: all share.",
        ge=1,
    )
    overlap_grad_reduce: bool = setting(
        True,
        "Reduce a layer's gradients while the backward of earlier ones runs; false: all when it has ended.",
    )
    zero_cpu_offload: bool = setting(
        False, "Keep weights, gradients and optimizer state in the host's memory; needs zero_stage 1, 2 or 3."
    )
    activations_checkpoint_granularity: Literal["full", "selective"] | None = setting(
        None,
        "Compute activations again instead of keeping them: of whole layers, or of attention scores only.",
    )
    activations_checkpoint_method: Literal["uniform", "block"] | None = setting(
        None, "full: all layers in groups (uniform), or the first ones only (block)."
    )
    activations_checkpoint_num_layers: int | None = setting(
        None, "uniform: layers of a group; block: layers that are recomputed.", ge=1
    )
    compile: bool | Literal["auto"] = setting(
        "auto",
        "Compile each block. auto: when a compiler is there and the run is long enough to earn it back.",
    )

    seed: int = setting(1234, "Initial weights, dropout and data order are functions of it.", ge=1)
    init_from: str | None = setting(
        None,
        "A checkpoint whose weights begin the run, at step 0 with a fresh optimizer. A later start goes on instead.",
    )
    resume_from_checkpoint: str | None = setting(
        None, "A checkpoint that the run goes on from: weights, optimizer, step, place in the data."
    )
    max_skipped: int = setting(
        100, "Non-finite steps in a row after which the run stops.", unit="steps", ge=1
    )
    loss_scale: float | None = setting(None, "16-mixed: a constant loss scale; null: dynamic.", gt=0)
    initial_loss_scale: float = setting(4294967296.0, "16-mixed: the dynamic loss scale begins here.", gt=0)
    loss_scale_growth_interval: int = setting(
        1000, "16-mixed: clean steps after which the loss scale doubles.", unit="steps", ge=1
    )
    hysteresis: int = setting(2, "16-mixed: bad steps before the loss scale is halved.", unit="steps", ge=1)
    min_loss_scale: float = setting(1.0, "16-mixed: the loss scale never falls below this.", gt=0)

    data: DataConfig = setting(DataConfig, "Token files, splits, order, masks.")
    tokenizer: TokenizerConfig = setting(TokenizerConfig, "Which tokenizer made the files.")
    optim: OptimConfig = setting(OptimConfig, "Optimizer and learning-rate schedule.")
    compat: CompatConfig = setting(CompatConfig, "Switches for continuing other toolkits' runs exactly.")

    @field_validator("preset", mode="before")
    @classmethod
    def _known_preset(cls, value: Any) -> Any:
        if value is None or _preset_name(value, cls.family):
            return None if value is None else _preset_name(value, cls.family)
        for family in FAMILIES:
            if name := _preset_name(value, family):
                raise ValueError(
                    f"{name} is no {cls.family}\nfix: megalith pretrain {family} model.preset={name}"
                )
        known = presets.names(cls.family)
        near = get_close_matches(str(value).lower(), known, n=3, cutoff=0.4)
        raise ValueError(f'there is no preset "{value}"\nfix: one of {", ".join(near or known)}')

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _zero(cls, value: Any) -> Any:
        return int(value) if isinstance(value, str) and value in "0123" and value else value

    @model_validator(mode="after")
    def _possible(self) -> PretrainModelConfig:
        """The parent's check would report a single line; `problems` has each on its own."""
        return self

    @classmethod
    def implied(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The fields of a preset."""
        name = _preset_name(values.get("preset"), cls.family)
        if name is None:
            return {}
        shape = presets.get(name)
        named = shape.model_dump(exclude={"vocab_size"}, exclude_unset=True)
        whole = shape.model_dump(exclude=_NOT_OF_A_PRESET)
        return {**whole, **named, "encoder_seq_length": shape.max_position_embeddings}

    def architecture(self, vocab_size: int) -> ModelConfig:
        """What is stored with the weights, for a tokenizer of `vocab_size` tokens."""
        if self.vocab_size is not None and self.vocab_size < vocab_size:
            what = f"{self.vocab_size} is smaller than the tokenizer's {vocab_size}"
            raise ConfigError([Problem("model.vocab_size", what, "~model.vocab_size takes the tokenizer's")])
        values = {name: getattr(self, name) for name in self.architecture_class.model_fields}
        values["vocab_size"] = self.vocab_size or vocab_size
        values["max_position_embeddings"] = self.positions
        return self.architecture_class(**values)

    @property
    def shape(self) -> Shape:
        """What a sample is made of."""
        return Shape()

    @property
    def sample(self) -> Sample:
        """How much a sample holds."""
        return Sample(self.encoder_seq_length)

    def masks(self, tokenizer: Tokenizer) -> Masks:
        """What becomes of a sample. Errors: `ConfigError` where the vocabulary does not fit."""
        raise NotImplementedError

    @property
    def positions(self) -> int:
        """`max_position_embeddings`, or the length of a sample."""
        return self.max_position_embeddings or self.encoder_seq_length

    @property
    def sizes(self) -> Sizes:
        """The parallel layout of one data-parallel rank: how many there are, the processes that are started say."""
        return Sizes(
            tensor=self.tensor_model_parallel_size,
            pipeline=self.pipeline_model_parallel_size,
            virtual_pipeline=self.virtual_pipeline_model_parallel_size or 1,
            context=self.context_parallel_size,
            expert=self.expert_model_parallel_size,
            sequence_parallel=self.sequence_parallel and self.tensor_model_parallel_size > 1,
            zero_stage=self.zero_stage,
            schedule=self._schedule,
            layers=tuple(self.pipeline_layers) if self.pipeline_layers else None,
            overlap=self.overlap_grad_reduce,
            offload=self.zero_cpu_offload,
        )

    @property
    def _schedule(self) -> PipelineSchedule:
        if self.pipeline_schedule != "auto":
            return self.pipeline_schedule
        return "interleaved" if (self.virtual_pipeline_model_parallel_size or 1) > 1 else "1f1b"

    def layout(self, world: int) -> Sizes:
        """The parallel layout of `world` processes. Legal or not: `Sizes.problems` says."""
        return self.sizes.fit(world, shard=self.zero_shard_size)

    @property
    def batch_schedule(self) -> BatchRampUp:
        """Batch size as a function of the samples consumed. Errors: `ConfigError` for a ramp that does not fit."""
        return BatchRampUp.from_config(self.rampup_batch_size, self.global_batch_size)

    def problems(self) -> Iterable[Problem]:
        yield from super().problems()
        yield from self._length_problems()
        yield from self._batch_problems()
        yield from self._layout_problems()
        if self.init_from and self.resume_from_checkpoint:
            yield error(
                "init_from",
                "and resume_from_checkpoint are both given: begin at step 0, or go on?",
                "~model.init_from or ~model.resume_from_checkpoint",
            )

    def _length_problems(self) -> Iterator[Problem]:
        learned = self.position_embedding_type == "learned_absolute"
        if learned and self.encoder_seq_length > self.positions:
            yield error(
                "encoder_seq_length",
                f"{self.encoder_seq_length} is longer than the position table, max_position_embeddings {self.positions}",
                f"model.max_position_embeddings={self.encoder_seq_length}, or shorter samples",
            )
        if self.data.seq_length not in (None, self.encoder_seq_length):
            yield error(
                "data.seq_length",
                f"{self.data.seq_length} differs from encoder_seq_length {self.encoder_seq_length}",
                "~model.data.seq_length makes it follow",
            )

    def _batch_problems(self) -> Iterator[Problem]:
        try:
            self.batch_schedule.check(self.micro_batch_size, self.sizes.data)
        except ConfigError as wrong:
            for problem in wrong.problems:
                yield error(problem.where.removeprefix("model."), problem.what, problem.fix)

    def _layout_problems(self) -> Iterator[Problem]:
        unbuilt = self.sizes.unbuilt()
        known = {problem.where for problem in unbuilt}
        found = self.sizes.problems(self.numbers())
        for problem in [*unbuilt, *(p for p in found if p.where not in known)]:
            key = problem.where if problem.where in type(self).model_fields else ""
            what = problem.what.removeprefix(f"{key} ") if key else f"{problem.where}: {problem.what}"
            yield error(key, what, problem.fix)
        if self.sequence_parallel and self.sizes.tensor == 1:
            yield warning("sequence_parallel", "has no effect while tensor_model_parallel_size is 1")
        if self.zero_cpu_offload and not self.zero_stage:
            yield error(
                "zero_cpu_offload", "keeps shares in the host's memory, and nothing is shared", "zero_stage=1"
            )
        if self.zero_shard_size and not self.zero_stage:
            yield warning("zero_shard_size", "has no effect while zero_stage is 0")

    def numbers(self, vocab: int | None = None, *, batch: bool = False) -> Divisible:
        """What parallel sizes must divide; with the `batch`, once the number of processes is known."""
        return Divisible(
            layers=self.num_layers,
            heads=self.num_attention_heads,
            kv_heads=self.num_query_groups or self.num_attention_heads,
            ffn=self.ffn_size,
            vocab=vocab,
            length=self.encoder_seq_length,
            micro_batch=self.micro_batch_size if batch else None,
            global_batch=self.global_batch_size if batch else None,
        )


def _preset_name(value: Any, family: str) -> str | None:
    """A preset's name as it is spelt here: NeMo-like underscores are taken for hyphens. None: the family has no such preset."""
    if not isinstance(value, str):
        return None
    name = value.strip().lower().replace("_", "-")
    return name if name in presets.names(family) else None
