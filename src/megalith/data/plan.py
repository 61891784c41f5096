"""The data plan: everything the order of a run's samples depends on, frozen, stored in every checkpoint as JSON.

```
number of a sample in the run ─ segment (weights) ─▶ source, number in the source ─ order (epochs or chapters) ─▶ tokens
```
Order = f(plan, consumed samples). Batch sizes, data-parallel size, workers and the run's length do not appear in it.

* A longer run: native orders are endless, nothing changes. Megatron's order gives each source another chapter behind
  those it has (`orders`); what was planned stays where it was.
* Other weights, a source more or less, from a resume on: a new segment begins at the samples consumed so far, and every
  source goes on where it stopped, so none of its samples is lost or read twice.
* Changed contents, split, order, seed, sample length or shape would move what is already read: refused, naming the file or key.

Knows numbers, hashes and names. Opens no file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import msgspec
import numpy as np

from megalith.data.blend import Blend
from megalith.data.cache import Notice, no_notice
from megalith.data.orders import chapter_length
from megalith.data.shape import Shape
from megalith.errors import CheckpointError, ConfigError, DataError, Problem

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Source:
    """One split of one pair of token files: where it was seen last, what it holds, which chapters were planned.

    `items` and `tokens` are the whole file's; items `first … last − 1` with `split_tokens` tokens are read.
    `bin_sha256` is known where a side-car lies beside the files. `chapters`: samples asked, Megatron's order only.
    """

    path: str
    items: int
    tokens: int
    idx_sha256: str
    bin_bytes: int
    bin_sha256: str | None
    first: int
    last: int
    split_tokens: int
    chapters: tuple[int, ...] = ()

    def same_content(self, other: Source) -> bool:
        """Whether both are the same files, wherever they lie."""
        return (
            (self.idx_sha256, self.bin_bytes) == (other.idx_sha256, other.bin_bytes)
            and (self.bin_sha256 or other.bin_sha256) == (other.bin_sha256 or self.bin_sha256)
        )  # fmt: skip


@dataclass(frozen=True)
class Member:
    """A source's part in a segment: its normalised weight, and its first sample (those before are read already)."""

    source: int
    weight: float
    first: int = 0


@dataclass(frozen=True)
class Segment:
    """From sample `start` of the run on, `members` are blended by their weights."""

    start: int
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Wish:
    """What the configuration asks for now. `weights` is None for one source without a weight."""

    split: str
    order: Literal["native", "megatron"]
    seq_length: int
    seed: int
    samples: int
    sources: tuple[Source, ...]
    weights: tuple[float, ...] | None = None
    splits: str | None = None
    dataloader_type: Literal["single", "cyclic"] = "single"
    shape: Shape = field(default_factory=Shape)
    measure: Callable[[Source], int] | None = None
    """Samples that the chapters of a source hold, where it takes a look into the file; None: windows."""

    def planned(self, source: Source) -> int:
        """Samples that the chapters of `source` hold (they run over whole epochs, so often more than was asked)."""
        if self.measure:
            return self.measure(source)
        return sum(chapter_length(source.split_tokens, self.seq_length, asked) for asked in source.chapters)


@dataclass(frozen=True)
class DataPlan:
    """The plan of one split ("train", "validation", "test") of a run."""

    split: str
    order: Literal["native", "megatron"]
    seq_length: int
    seed: int
    samples: int
    """Samples asked for when the plan was made or last continued."""
    sources: tuple[Source, ...]
    segments: tuple[Segment, ...]
    splits: str | None = None
    """`splits_string`, for people: the ranges that came of it are in the sources."""
    dataloader_type: Literal["single", "cyclic"] = "single"
    cycle: int = 0
    """Length of the data set that Megatron's cyclic sampler goes round in; 0 for the others."""
    shape: Shape = field(default_factory=Shape)
    format_version: int = FORMAT_VERSION

    @classmethod
    def make(cls, wish: Wish) -> DataPlan:
        """The plan of a new run."""
        weights = _normalised(wish)
        members = tuple(Member(i, weight) for i, weight in enumerate(weights))
        asked = _asked(wish.samples, weights, wish.weights is not None)
        megatron = wish.order == "megatron"
        sources = tuple(
            replace(source, chapters=(count,) if megatron else ())
            for source, count in zip(wish.sources, asked, strict=True)
        )
        return cls(
            split=wish.split,
            order=wish.order,
            seq_length=wish.seq_length,
            seed=wish.seed,
            samples=wish.samples,
            sources=sources,
            segments=(Segment(0, members),),
            splits=wish.splits,
            dataloader_type=wish.dataloader_type,
            cycle=_cycle(wish, sources) if wish.dataloader_type == "cyclic" else 0,
            shape=wish.shape,
        )

    def append(self, wish: Wish, consumed: int, notice: Notice = no_notice) -> DataPlan:
        """The plan that goes on from `consumed` samples as `wish` asks. Nothing consumed moves.

        Equal to this plan where nothing but batch sizes changed. DataError for files whose contents changed, ConfigError
        for keys that would move what was read.
        """
        _refuse_changes(self, wish)
        sources, used = _merge_sources(self, wish)
        members = tuple(zip(used, _normalised(wish), strict=True))
        segments = tuple(segment for segment in self.segments if segment.start <= consumed)
        if members != tuple((m.source, m.weight) for m in segments[-1].members):
            segments = self._new_segment(segments, members, consumed)
            notice(f"{self.split} data: other sources or weights from sample {consumed} on")
        plan = replace(self, sources=sources, segments=segments, samples=wish.samples, splits=wish.splits)
        return plan if self.order == "native" or self.cycle else plan._with_chapters(wish)

    def cursors(self, consumed: int) -> dict[int, int]:
        """Number of samples that each source has given (or skipped) when `consumed` samples of the run are read."""
        given: dict[int, int] = {}
        for i, segment in enumerate(self.segments):
            end = self.segments[i + 1].start if i + 1 < len(self.segments) else consumed
            taken = Blend([m.weight for m in segment.members]).taken(
                max(min(end, consumed) - segment.start, 0)
            )
            for member, count in zip(segment.members, taken, strict=True):
                given[member.source] = member.first + int(count)
        return given

    def segment_of(self, number: int) -> int:
        """Which segment sample `number` of the run lies in."""
        starts = [segment.start for segment in self.segments]
        return int(np.searchsorted(starts, number, side="right")) - 1

    def to_json(self) -> dict[str, Any]:
        """For `state.json` of a checkpoint."""
        return msgspec.json.decode(msgspec.json.encode(self))  # lists, as they come back from a file

    @classmethod
    def from_json(cls, data: Any) -> DataPlan:
        """Inverse of `to_json`; CheckpointError where it is not a plan."""
        try:
            plan = msgspec.convert(data, cls)
        except msgspec.ValidationError as error:
            raise CheckpointError(f"the stored data plan cannot be read: {error}") from None
        if plan.format_version > FORMAT_VERSION:
            raise CheckpointError(
                f"the stored data plan has format {plan.format_version}; this program knows up to {FORMAT_VERSION}",
                fix="resume with the version of Megalith that wrote it, or a newer one",
            )
        return plan

    def _new_segment(
        self, segments: tuple[Segment, ...], members: Sequence[tuple[int, float]], consumed: int
    ) -> tuple[Segment, ...]:
        if self.cycle:
            raise ConfigError(
                [_changed("data_prefix", "a cyclic order goes round in a fixed data set", "what the run had")]
            )
        cursors = replace(self, segments=segments).cursors(consumed)
        made = tuple(Member(source, weight, cursors.get(source, 0)) for source, weight in members)
        kept = segments[:-1] if segments[-1].start == consumed else segments
        return (*kept, Segment(consumed, made))

    def _with_chapters(self, wish: Wish) -> DataPlan:
        """Megatron's order: another chapter for each source that the samples asked for would run out of."""
        segment = self.segments[-1]
        sources = list(self.sources)
        weights = [m.weight for m in segment.members]
        asked = _asked(self.samples - segment.start, weights, wish.weights is not None)
        for member, count in zip(segment.members, asked, strict=True):
            source = sources[member.source]
            missing = member.first + count - wish.planned(source)
            if missing > 0:
                sources[member.source] = replace(source, chapters=(*source.chapters, missing))
        return replace(self, sources=tuple(sources))


def _normalised(wish: Wish) -> list[float]:
    """Weights that add up to 1, summed left to right as Megatron does (blend normalises once more, as Megatron does)."""
    weights = wish.weights or tuple(1.0 for _ in wish.sources)
    total = sum(weights)
    return [weight / total for weight in weights]


def _asked(samples: int, weights: Sequence[float], weighted: bool) -> list[int]:
    """Samples that Megatron asks of each source: all of them of a bare one, half a percent more than its share else."""
    return [math.ceil(max(samples, 0) * w * 1.005) if weighted else samples for w in weights]


def _cycle(wish: Wish, sources: Sequence[Source]) -> int:
    if wish.order == "native":
        raise ConfigError([Problem("model.data.dataloader_type", "cyclic goes with model.data.order: megatron",
                                   "native shuffles every epoch anew already: use single")])  # fmt: skip
    if len(sources) > 1:
        return wish.samples
    return wish.planned(sources[0])


_KEYS = {
    "seed": "model.seed",
    "seq_length": "model.encoder_seq_length",
    "kind": "model.data.dataset_type",
    "min_sentences": "model.bert_binary_head",
    "decoder_length": "model.data.seq_length_dec",
}
"""Where in the configuration a field of the plan comes from, if not from model.data."""


def _changed(key: str, what: str, value: object) -> Problem:
    fix = f"set it back to {value}, or begin a new run with model.init_from=CHECKPOINT"
    return Problem(_KEYS.get(key, f"model.data.{key}"), f"cannot change while a run goes on: {what}", fix)


def _setting(name: str, value: object) -> object:
    """What the user wrote for a field of the shape."""
    return value == 2 if name == "min_sentences" else value


def _refuse_changes(plan: DataPlan, wish: Wish) -> None:
    same = "the samples already read would be other ones"
    problems = [
        _changed(key, same, getattr(plan, key))
        for key in ("order", "seq_length", "seed", "dataloader_type")
        if getattr(plan, key) != getattr(wish, key)
        and not (
            key == "seq_length" and plan.shape.decoder_length != wish.shape.decoder_length
        )  # a window holds both
    ]
    problems += [
        _changed(part.name, same, _setting(part.name, getattr(plan.shape, part.name)))
        for part in fields(Shape)
        if getattr(plan.shape, part.name) != getattr(wish.shape, part.name)
        and part.name != "max_length"  # kind and seq_length say it
    ]
    if problems:
        raise ConfigError(problems)


def _merge_sources(plan: DataPlan, wish: Wish) -> tuple[tuple[Source, ...], list[int]]:
    """(the plan's sources with new ones behind them, which of them each wanted source is)."""
    sources, used = list(plan.sources), []
    for wanted in wish.sources:
        free = [i for i in range(len(sources)) if i not in used]
        same = [i for i in free if sources[i].same_content(wanted)]
        if not same:
            _refuse_changed_file([sources[i] for i in free], wanted)
            sources.append(replace(wanted, chapters=()))
            used.append(len(sources) - 1)
            continue
        known = sources[same[0]]
        if (known.first, known.last) != (wanted.first, wanted.last):
            raise ConfigError([_changed("splits_string", f"{plan.split} would read other documents of {wanted.path}",
                                        plan.splits or "separate paths")])  # fmt: skip
        sources[same[0]] = replace(wanted, chapters=known.chapters)
        used.append(same[0])
    return tuple(sources), used


def _refuse_changed_file(known: Sequence[Source], wanted: Source) -> None:
    for source in known:
        if source.path != wanted.path:
            continue
        suffix = ".idx" if source.idx_sha256 != wanted.idx_sha256 else ".bin"
        raise DataError(
            f"the file has changed since the run read it ({source.items} items and {source.tokens} tokens then, "
            f"{wanted.items} and {wanted.tokens} now)",
            where=wanted.path + suffix,
            fix="put the old file back; or give the new one another name and the run takes it as a new source; "
            "or begin a new run with model.init_from=CHECKPOINT",
        )
