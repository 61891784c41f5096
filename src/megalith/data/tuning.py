"""Batches of tuning samples: the order of a run, padding, and this data rank's share; exact from any number of samples on.

    consumed ─ schedule ─▶ positions of the global batch ─ order ─▶ samples ─ pad to their longest ─▶ this rank's rows

The order goes round in the samples, shuffled anew each time as a function of (seed, round), so batches reach across the end
of a round, and no sample is left out. Every rank knows all lengths, so that all of them pad a global batch alike. A
validation reads each sample once; rows that fill up its last batch do not count. Knows samples. Knows no model and no file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megalith.data.loader import Batch, ordered
from megalith.data.masks import IGNORED
from megalith.data.sampler import Numbers, Sampler, SequentialSampler
from megalith.data.schedule import BatchRampUp
from megalith.data.tuning_samples import Sample, Samples
from megalith.errors import ConfigError, Problem

Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rounds:
    """Position i of the run is a sample of round ⌊i / total⌋, each of which is a permutation drawn from (seed, round)."""

    total: int
    seed: int
    _kept: dict[int, Numbers] = field(default_factory=dict, init=False, repr=False, compare=False)

    def check_start(self, consumed: int) -> None:
        """Any."""

    def numbers(self, positions: Numbers) -> Numbers:
        """The sample at each position."""
        rounds, places = np.divmod(positions, self.total)
        result = np.empty_like(positions)
        for number in np.unique(rounds):
            here = rounds == number
            result[here] = self._permutation(int(number))[places[here]]
        return result

    def _permutation(self, number: int) -> Numbers:
        kept = self._kept.get(number)
        if kept is None:
            kept = np.random.Generator(np.random.PCG64([self.seed, number])).permutation(self.total)
            for old in [n for n in list(self._kept) if abs(n - number) > 1]:  # other threads do the same
                self._kept.pop(old, None)
            self._kept[number] = kept
        return kept


@dataclass(frozen=True)
class Padding:
    """Rows are filled up with `filler` to a multiple of `unit` tokens, comfortably of `roomy`, but never beyond `limit`."""

    filler: int
    unit: int = 1
    roomy: int = 8
    limit: int | None = None

    def length(self, longest: int) -> int:
        """Errors: `ConfigError` where no length within the limit can be cut as the layout needs it."""
        for unit in (self.roomy, self.unit):
            length = -(-max(longest, 1) // unit) * unit
            if self.limit is None or length <= self.limit:
                return length
        what = f"a sample of {longest} tokens cannot be filled up to a multiple of {self.unit} within {self.limit}"
        fix = f"model.data.max_seq_length={(self.limit or 0) // self.unit * self.unit}"
        raise ConfigError([Problem("model.data.max_seq_length", what, fix)])

    def rows(self, rows: Sequence[Array], length: int, filler: int | None = None) -> Array:
        """int64[len(rows), length]"""
        padded = np.full((len(rows), length), self.filler if filler is None else filler, np.int64)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
        return padded


def inputs_and_targets(sample: Sample) -> tuple[Array, Array]:
    """What the model reads, and what it is to predict there: −1 where that does not count."""
    tokens = sample.tokens
    return tokens[:-1], np.where(sample.scored[1:], tokens[1:], IGNORED)


@dataclass(frozen=True)
class TuningLoader:
    """Batches of `samples` for data rank `data_rank` of `data_size`.

    GPT: `tokens`, `targets` int64[b, T]. Encoder-decoder: `encoder_tokens` int64[b, S], `encoder_lengths` int64[b], `tokens`,
    `targets` int64[b, T], `lengths` int64[b]. Both: `sample` int64[b], the position in the run; −1 in rows that only fill up.
    """

    samples: Samples
    order: Sampler
    padding: Padding
    data_rank: int = 0
    data_size: int = 1
    workers: int = 0
    pin: bool = False

    def __post_init__(self) -> None:
        """Errors: `ConfigError` where a row cannot be padded as the layout needs it."""
        self.lengths  # noqa: B018

    @property
    def lengths(self) -> tuple[int, int]:
        """Padded tokens of the longest row of the one side (the decoder), and of the encoder, 0 where there is none."""
        return self._longest(self.samples.samples)

    def training(self, schedule: BatchRampUp, *, consumed: int, end: int) -> Iterator[Batch]:
        """Batches from `consumed` samples to `end`, in the sizes of the schedule."""
        return ordered(self._share, self._positions(schedule, consumed, end), self.workers)

    def evaluation(self, batches: int, batch_size: int) -> Callable[[], Iterator[Batch]]:
        """A function that starts to read up to `batches` batches: every sample once, the last batch filled up."""
        positions = []
        for first in range(0, min(batches * batch_size, len(self.samples)), batch_size):
            row = np.arange(first, first + batch_size, dtype=np.int64)
            positions.append(np.where(row < len(self.samples), row, -1))
        return lambda: ordered(self._share, iter(positions), self.workers)

    def read(self, positions: Numbers) -> tuple[Batch, list[Sample]]:
        """Rows of the run, and the samples that they are made of."""
        chosen = self._chosen(positions)
        return self._batch(positions, chosen, self._longest(chosen)), chosen

    def _positions(self, schedule: BatchRampUp, consumed: int, end: int) -> Iterator[Numbers]:
        while consumed + (size := schedule.size_at(consumed)) <= end:
            yield np.arange(consumed, consumed + size, dtype=np.int64)
            consumed += size

    def _share(self, positions: Numbers) -> Batch:
        """Of a global batch, this rank's contiguous part."""
        rows = len(positions) // self.data_size
        chosen = self._chosen(positions)
        mine = slice(self.data_rank * rows, (self.data_rank + 1) * rows)
        batch = self._batch(positions[mine], chosen[mine], self._longest(chosen))
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self.pin else batch

    def _chosen(self, positions: Numbers) -> list[Sample]:
        return [self.samples.samples[i] for i in self.order.numbers(np.maximum(positions, 0)).tolist()]

    def _longest(self, chosen: Sequence[Sample]) -> tuple[int, int]:
        """Tokens of the rows of the decoder (or of the one side), and of the encoder."""
        one, two = zip(*map(_lengths, chosen), strict=True)
        return self.padding.length(max(one)), self.padding.length(max(two)) if any(two) else 0

    def _batch(self, positions: Numbers, chosen: Sequence[Sample], lengths: tuple[int, int]) -> Batch:
        pairs = [inputs_and_targets(sample) for sample in chosen]
        targets = self.padding.rows([target for _, target in pairs], lengths[0], IGNORED)
        targets[positions < 0] = IGNORED
        arrays = {"tokens": self.padding.rows([read for read, _ in pairs], lengths[0]), "targets": targets}
        encoders = [sample.encoder for sample in chosen if sample.encoder is not None]
        if encoders:
            arrays["lengths"] = np.array([len(read) for read, _ in pairs])
            arrays["encoder_tokens"] = self.padding.rows(encoders, lengths[1])
            arrays["encoder_lengths"] = np.array([len(row) for row in encoders])
        return {name: torch.from_numpy(array) for name, array in (arrays | {"sample": positions}).items()}


def _lengths(sample: Sample) -> tuple[int, int]:
    return len(sample.tokens) - 1, 0 if sample.encoder is None else len(sample.encoder)


def in_file_order() -> Sampler:
    """For validation."""
    return SequentialSampler()


def fingerprint(samples: Samples) -> str:
    """SHA-256 (hex) of what is trained on: other rows, lengths, templates or another tokenizer give another one."""
    digest = hashlib.sha256()
    for sample in samples.samples:
        for array in (sample.tokens, sample.scored, sample.encoder):
            digest.update(b"|" if array is None else array.tobytes() + b"|")
    return digest.hexdigest()


def state_of(samples: Samples, *, seed: int, length: int) -> dict[str, Any]:
    """What a checkpoint says of the data that its run goes on with."""
    return {
        "kind": "tuning",
        "files": list(samples.files),
        "samples": len(samples),
        "seq_length": length,
        "seed": seed,
        "hash": fingerprint(samples),
    }


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Errors: `ConfigError` where a run would go on with other samples, or in another order, than it has begun with."""
    fix = "set it back, or begin a new run: another exp_manager.name"
    problems = []
    if before.get("seed") != now["seed"]:
        what = f"cannot change while a run goes on: {before.get('seed')} at its beginning, {now['seed']} now"
        problems.append(Problem("model.seed", what, fix))
    if before.get("hash") != now["hash"]:
        what = (
            f"its samples are other ones than when the run began ({before.get('samples')} then, {now['samples']} now): the "
            "file, its lengths, the template or the tokenizer changed"
        )
        problems.append(Problem("model.data.train_ds", what, fix))
    if problems:
        raise ConfigError(problems)
