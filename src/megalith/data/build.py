"""From the section `model.data` to the streams of a run: files opened, splits cut, plans made or continued, orders built.

```
config ─ prefixes ─ sources ─ splits ─▶ wish ─┬─ new run ───▶ plan ─ orders (cache) ─▶ stream
                       the checkpoint's plan ─┘  continued
```
Knows how the pieces fit. Refuses to know batches and models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalith.data.cache import IndexCache, Notice, cache_folders, no_notice
from megalith.data.config import PATH_KEYS, DataConfig
from megalith.data.plan import DataPlan, Source, Wish
from megalith.data.prefixes import Prefixes
from megalith.data.reading import Part, Wanted, reading
from megalith.data.schedule import BatchRampUp
from megalith.data.shape import Shape
from megalith.data.sources import Files, OpenFile, Vocabulary
from megalith.data.splits import SPLITS, Range
from megalith.data.stream import Samples, Stream
from megalith.errors import ConfigError, DataError, Problem


@dataclass(frozen=True)
class Request:
    """What a run wants: `samples` of each split ("train", "validation", "test"; 0 or missing: not wanted).

    `stored` is `RunData.state()` of the checkpoint that is resumed, at `consumed` training samples.
    """

    seq_length: int
    seed: int
    samples: Mapping[str, int]
    stored: Mapping[str, Any] | None = None
    consumed: int = 0
    vocabulary: Vocabulary | None = None
    notice: Notice = no_notice
    shape: Shape = field(default_factory=Shape)


@dataclass(frozen=True)
class RunData:
    """The streams of a run by split."""

    streams: Mapping[str, Stream]
    stored: Mapping[str, Any] = field(default_factory=dict)

    @property
    def train(self) -> Stream:
        return self.streams["train"]

    @property
    def validation(self) -> Stream | None:
        return self.streams.get("validation")

    @property
    def test(self) -> Stream | None:
        return self.streams.get("test")

    def state(self) -> dict[str, Any]:
        """JSON of all plans, for the checkpoint. Plans of splits that are not read now are kept as they were."""
        return {**self.stored, **{name: stream.plan.to_json() for name, stream in self.streams.items()}}

    def summary(self) -> list[str]:
        """A line for each source, for people."""
        return [line for stream in self.streams.values() for line in _describe(stream)]


def open_run_data(config: DataConfig, request: Request) -> RunData:
    """Open everything that `request.samples` asks for.

    DataError for files that are missing, damaged, changed, too small or another tokenizer's, or a split without
    documents; ConfigError for keys that cannot change while a run goes on.
    """
    if config.seq_length not in (None, request.seq_length):
        what = f"{config.seq_length} differs from model.encoder_seq_length {request.seq_length}"
        raise ConfigError(
            [Problem("model.data.seq_length", what, "~model.data.seq_length takes the model's")]
        )
    ends = config.eod_mask_loss or config.reset_position_ids or config.reset_attention_mask
    files = Files(request.vocabulary, ends_needed=ends, warm_up=not config.skip_warmup)
    wanted = [split for split in SPLITS if request.samples.get(split, 0) > 0]
    streams = {split: _open_split(config, request, files, split) for split in wanted}
    return RunData(streams, dict(request.stored or {}))


def requested_samples(
    schedule: BatchRampUp,
    *,
    max_steps: int,
    val_check_interval: int,
    limit_val_batches: int,
    limit_test_batches: int = 0,
) -> dict[str, int]:
    """How many samples of each split a run of `max_steps` asks for, as Megatron and NeMo count them.

    Train: what its batches add up to. Validation: a new stretch for every validation and one more, although each starts
    at sample 0, because Megatron's index depends on the number. 0 for `limit_val_batches` 0 or `val_check_interval` 0.
    """
    validations = max_steps // val_check_interval + 1 if val_check_interval else 0
    return {
        "train": schedule.consumed_at(max_steps),
        "validation": validations * limit_val_batches * schedule.global_batch_size,
        "test": limit_test_batches * schedule.global_batch_size,
    }


def _open_split(config: DataConfig, request: Request, files: Files, split: str) -> Stream:
    prefixes = config.shared_files or config.own_files(split)
    if prefixes is None:
        key = f"model.data.{PATH_KEYS[split]}"
        raise DataError(
            f"the run needs {split} data and none is named", where=key, fix=_how_to_do_without(split)
        )
    opened = [files.open(path) for path in prefixes.paths]
    parts = [Part(file, _range(config, request, file, split), split) for file in opened]
    kept, weights = _usable(parts, prefixes, config, request)
    wanted = _wanted(config, request)
    wish = Wish(
        split=split,
        order=config.order,
        seq_length=wanted.seq_length,
        seed=request.seed,
        samples=request.samples[split],
        sources=tuple(kept),
        weights=weights,
        splits=config.splits_string if config.shared_files else None,
        dataloader_type=config.dataloader_type if split == "train" else "single",
        shape=request.shape,
        measure=(lambda source: _open(config, request, files, (source, split)).order.once)
        if request.shape.grouped
        else None,
    )
    stored = (request.stored or {}).get(split)
    if stored is None:
        plan = DataPlan.make(wish)
    else:
        consumed = request.consumed if split == "train" else 0
        plan = DataPlan.from_json(stored).append(wish, consumed, request.notice)
    return Stream(plan, lambda i: _open(config, request, files, (plan.sources[i], split)))


def _wanted(config: DataConfig, request: Request) -> Wanted:
    window = request.shape.window(request.seq_length, config.order)
    return Wanted(config.order, window, request.seed, request.shape)


def _range(config: DataConfig, request: Request, file: OpenFile, split: str) -> Range:
    if not config.shared_files:
        return Range(0, len(file.indexed))
    return reading(request.shape).range(file, config.splits_string, split)


def _usable(
    parts: list[Part], prefixes: Prefixes, config: DataConfig, request: Request
) -> tuple[list[Source], tuple[float, ...] | None]:
    """Sources that can give a sample, and their weights. Training needs all of them; a blend for evaluation, one."""
    sources = [part.file.source(part.items) for part in parts]
    split = parts[0].split
    weights = prefixes.weights
    if weights is None and len(sources) > 1:
        weights = tuple(float(source.split_tokens) for source in sources)
    reasons = [_unusable(part, config, request) for part in parts]
    good = [i for i, reason in enumerate(reasons) if reason is None]
    for source, reason in zip(sources, reasons, strict=True):
        if reason is None:
            continue
        if split == "train" or not good:
            raise DataError(reason[0], where=source.path, fix=reason[1])
        request.notice(f"{source.path}: left out of the {split} data: {reason[0]}")
    return [sources[i] for i in good], tuple(weights[i] for i in good) if weights else None


def _unusable(part: Part, config: DataConfig, request: Request) -> tuple[str, str] | None:
    """Why a source cannot give a sample, and what to do; None: it can."""
    if len(part.items):
        return reading(request.shape).fault(part, _wanted(config, request))
    documents = part.file.indexed.num_documents if request.shape.grouped else len(part.file.indexed)
    cut = f"splits_string {config.splits_string} gives {part.split} none of the {documents} documents"
    fix = f"give {part.split} a larger share in model.data.splits_string; or {_how_to_do_without(part.split)}"
    return cut if config.shared_files else "holds no documents", fix


def _how_to_do_without(split: str) -> str:
    keys = {
        "validation": "trainer.limit_val_batches=0 trains without",
        "test": "trainer.limit_test_batches=0 goes without",
    }
    return keys.get(split, "name the files in model.data.data_prefix")


def _open(config: DataConfig, request: Request, files: Files, which: tuple[Source, str]) -> Samples:
    """The samples of a source of a split."""
    source, split = which
    file = files.reopen(source)
    cache = IndexCache(cache_folders(Path(file.path), config.index_mapping_dir), request.notice)
    part = Part(file, Range(source.first, source.last), split, source.chapters)
    return reading(request.shape).open(part, _wanted(config, request), cache)


def _describe(stream: Stream) -> list[str]:
    plan, segment = stream.plan, stream.plan.segments[-1]
    lines = []
    for member in segment.members:
        source, samples = plan.sources[member.source], stream.dataset(member.source)
        once, item = samples.order.once, "sentences" if plan.shape.grouped else "documents"
        share = f", weight {member.weight:.4g}" if len(segment.members) > 1 else ""
        share_samples = (plan.samples - segment.start) * member.weight
        # Evaluation begins at its sample 0 each time, so epochs would say nothing of it.
        endless = plan.order == "native" and plan.split == "train"
        passes = f", {share_samples / once:.3g} epochs" if endless else ""
        lines.append(
            f"{plan.split:<10} {source.path}: {item} {source.first:,} to {source.last:,} of {source.items:,}, "
            f"{source.split_tokens:,} tokens, {once:,} samples{share}{passes}"
        )
        wanted = Wanted(plan.order, plan.seq_length, plan.seed, plan.shape)
        if unread := reading(plan.shape).unread(samples, wanted):
            lines.append(f"{'':<10} {unread}")
    return lines
