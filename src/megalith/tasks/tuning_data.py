"""The data of a tuning run: its tasks and where their virtual tokens are, its samples, and the loaders that give batches.

Knows the run's configuration and the model it begins from. Knows no engine and no loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalith.adapt.method import Tag
from megalith.adapt.prompts import virtual_ids
from megalith.data.loader import Batch
from megalith.data.tuning import (
    Padding,
    Rounds,
    TuningLoader,
    in_file_order,
    refuse_changes,
    state_of,
)
from megalith.data.tuning_samples import Maker, Rules, Samples
from megalith.data.tuning_tasks import TASK, Task, parse_template, plain, tagged
from megalith.errors import ConfigError, Problem
from megalith.generate.manner import Manner, manner_of
from megalith.models.config import ModelConfig
from megalith.tasks.tuning_base import Base
from megalith.tasks.tuning_config import TaskTemplate, TuneConfig, TuneKeys
from megalith.tokenizers.base import Tokenizer
from megalith.topology.sizes import Sizes
from megalith.topology.topology import Topology

Notice = Callable[[str], None]
PLAIN = (("input", "output"), ("text", "answer"))
"""The fields of rows that name no task."""
SPLITS = {"train": "train", "valid": "validation", "test": "test"}


@dataclass(frozen=True)
class TuningStreams:
    """What a run reads, for its summary and its checkpoints."""

    config: TuneConfig
    samples: Mapping[str, Samples]

    def state(self) -> dict[str, Any]:
        """For `state.json`."""
        model = self.config.model
        return {"train": state_of(self.samples["train"], seed=model.seed, length=model.longest)}

    def summary(self) -> list[str]:
        """A line for each file set."""
        return [f"{SPLITS[split]:<10} {_said(samples)}" for split, samples in self.samples.items()]


@dataclass(frozen=True)
class TuningData:
    """Samples and loaders of a run."""

    config: TuneConfig
    streams: TuningStreams
    topology: Topology
    padding: Padding

    def training(self, consumed: int) -> Iterator[Batch]:
        """This rank's share of every global batch from `consumed` samples to the end of the run."""
        schedule, steps = self.config.model.batch_schedule, self.config.trainer.max_steps
        end = max(schedule.consumed_at(steps), consumed + steps * schedule.global_batch_size)
        return self.training_loader().training(schedule, consumed=consumed, end=end)

    def training_loader(self) -> TuningLoader:
        """Reads the training samples at any place of the run."""
        samples = self.streams.samples["train"]
        return self._loader("train", Rounds(len(samples), self.config.model.seed))

    def validation(self) -> Callable[[], Iterator[Batch]] | None:
        """A function that starts a validation; None when the run has none."""
        return self._evaluation("valid", self.config.trainer.limit_val_batches)

    def test(self) -> Callable[[], Iterator[Batch]] | None:
        """The same for the test files."""
        return self._evaluation("test", self.config.trainer.limit_test_batches)

    @property
    def longest(self) -> tuple[int, int]:
        """Tokens of the longest row that is trained on, as it is padded: of a model's one side, or of encoder and decoder."""
        loader = self.training_loader()
        one, two = loader.lengths
        return (two, one) if two else (one, 0)

    def _evaluation(self, split: str, batches: int) -> Callable[[], Iterator[Batch]] | None:
        if split not in self.streams.samples or not batches:
            return None
        return self._loader(split, in_file_order()).evaluation(batches, self.config.model.global_batch_size)

    def _loader(self, split: str, order: Any) -> TuningLoader:
        return TuningLoader(
            self.streams.samples[split],
            order,
            self.padding,
            data_rank=self.topology.data_rank,
            data_size=self.topology.data_size,
            workers=self.config.model.data.num_workers,
            pin=self.topology.device.type == "cuda",
        )


def open_tuning_data(
    config: TuneConfig,
    base: Base,
    tokenizer: Tokenizer,
    topology: Topology,
    *,
    stored: Mapping[str, Any] | None = None,
    splits: Sequence[str] = tuple(SPLITS),
    notice: Notice = lambda text: None,
) -> TuningData:
    """Read the files and make their samples. `stored`: what the checkpoint says of the run's data that goes on.

    Errors: `DataError` with what is wrong in a file; `ConfigError` where the tokenizer lacks a token, or a run would go on with
    other samples.
    """
    maker = Maker(tokenizer, tasks_of(config, base), rules_of(config, base, tokenizer))
    samples = {
        split: maker.read(config.model.data.files(split), training=split == "train")
        for split in splits
        if config.model.data.files(split) and _wanted(config, split)
    }
    streams = TuningStreams(config, samples)
    data = TuningData(config, streams, topology, padding_of(base.architecture, tokenizer, topology.sizes))
    for split, found in samples.items():
        data._loader(split, in_file_order())  # its longest row can be padded as the layout needs it
        _tell_limit(config, split, len(found), notice)
    if stored:
        refuse_changes(stored.get("train", {}), streams.state()["train"])
    return data


def _wanted(config: TuneConfig, split: str) -> bool:
    trainer = config.trainer
    asked = {
        "train": True,
        "valid": bool(trainer.limit_val_batches and trainer.val_check_interval),
        "test": trainer.test_at_end,
    }
    return asked[split]


def _tell_limit(config: TuneConfig, split: str, count: int, notice: Notice) -> None:
    key = {"valid": "limit_val_batches", "test": "limit_test_batches"}.get(split)
    if key is None:
        return
    size, batches = config.model.global_batch_size, getattr(config.trainer, key)
    if batches * size < count:
        notice(
            f"{SPLITS[split]}: {batches * size:,} of its {count:,} samples are measured on; "
            f"trainer.{key}={-(-count // size)} takes all"
        )


def tasks_of(config: TuneConfig, base: Base) -> list[Task]:
    """Every task that a row may be of, with the ids of its virtual tokens. Without prompts: how rows may be spelled."""
    model = config.model
    if not model.with_prompts:
        only = model.calc_loss_on_answer_only
        return [
            plain(text, answer, answer_only=only, truncate=_truncated(model, text)) for text, answer in PLAIN
        ]
    earlier = base.adapter.tags if base.adapter else ()
    templates = {template.taskname: template for template in model.task_templates or ()}
    lengths = {tag: templates[tag].total_virtual_tokens if tag in templates else model.num_prompt_tokens
               for tag in model.new_tags}  # fmt: skip
    tags = [*earlier, *(Tag(name, length) for name, length in lengths.items())]
    ids = virtual_ids(base.architecture.vocab_size, tags)
    frozen = {tag.name for tag in earlier}
    return [
        (_of_template(templates[tag.name]) if tag.name in templates else _of_tag(model, tag)).at(
            ids[tag.name].start, frozen=tag.name in frozen
        )
        for tag in tags
        if not templates or tag.name in templates
    ]


def _of_tag(model: TuneKeys, tag: Tag) -> Task:
    return tagged(
        tag.name,
        tag.length,
        answer_only=model.calc_loss_on_answer_only,
        truncate=_truncated(model, "text"),
    )


def _truncated(model: TuneKeys, text: str) -> str | None:
    """`truncate_field`, if it is the text that may be cut. Errors: `ConfigError`."""
    asked = model.data.truncate_field
    if asked is None or asked in ("text", "input"):
        return None if asked is None else text
    what = f"{asked} is not what can be cut off: that is the text"
    raise ConfigError([Problem("model.data.truncate_field", what, "model.data.truncate_field=text, or null")])


def _of_template(template: TaskTemplate) -> Task:
    parts = parse_template(template.prompt_template, template.splits)
    fields = [part.name for part in parts if hasattr(part, "name")]
    return Task(
        template.taskname,
        parts,
        template.answer_field or fields[-1],
        template.answer_only_loss,
        template.truncate_field,
        key=TASK,
    )


def rules_of(config: TuneConfig, base: Base, tokenizer: Tokenizer) -> Rules:
    """What stands around texts: what the model was trained with, and what the configuration says. Errors: `ConfigError`."""
    data, manner = config.model.data, manner_of(base.state, tokenizer)
    special, problems = tokenizer.special, list[Problem]()
    eos = manner.eod if manner.eod is not None else special.get("eos")
    if data.add_eos and eos is None:
        what = "is true, and the tokenizer has no token that ends a text"
        problems.append(Problem("model.data.add_eos", what, "model.data.add_eos=false"))
    bos = special.get("bos", special.get("eod"))
    if data.add_bos and bos is None:
        what = "is true, and the tokenizer has no token that begins a text"
        problems.append(Problem("model.data.add_bos", what, "model.data.add_bos=false"))
    if problems:
        raise ConfigError(problems)
    before = manner.before if data.add_bos is None else ((bos,) if data.add_bos and bos is not None else ())
    return Rules(
        max_length=config.model.longest,
        min_length=data.min_seq_length,
        before=before,
        behind=manner.behind if base.family != "gpt" else (),
        eos=eos if data.add_eos else None,
        start=None if base.family == "gpt" else _start(manner),
    )


def _start(manner: Manner) -> tuple[int, ...]:
    """What a decoder's row begins with, and the word that it is made to say first."""
    first = manner.forced[0]
    return manner.start if first is None else (*manner.start, first)


def padding_of(architecture: ModelConfig, tokenizer: Tokenizer, sizes: Sizes) -> Padding:
    """How long rows are filled up: context ranks cut them into chunks, sequence parallelism into parts, and a pipeline keeps a
    schedule for each length."""
    unit = math.lcm(
        2 * sizes.context if sizes.context > 1 else 1, sizes.tensor if sizes.sequence_parallel else 1
    )
    if sizes.context > 1 and sizes.sequence_parallel:
        unit = 2 * sizes.context * sizes.tensor
    roomy = math.lcm(8, unit) * (8 if sizes.pipeline > 1 else 1)
    special = tokenizer.special
    filler = special.get("pad", special.get("eod", special.get("eos", 0)))
    return Padding(filler, unit, roomy, architecture.max_positions)


def _said(samples: Samples) -> str:
    tasks = ", ".join(f"{name} {count:,}" for name, count in samples.tasks.items() if name)
    files = ", ".join(Path(file).name for file in samples.files)
    left = [f"{samples.too_long:,} rows too long"] if samples.too_long else []
    left += [f"{samples.too_short:,} too short"] if samples.too_short else []
    out = f"; left out: {', '.join(left)}" if left else ""
    cut = f"; {samples.cut:,} cut" if samples.cut else ""
    return f"{len(samples):,} samples of {files}{f' ({tasks})' if tasks else ''}{out}{cut}"
