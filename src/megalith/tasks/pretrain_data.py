"""The data of a pretraining run: which samples it asks for, the plans it goes on with, and the loaders that give batches.

Knows the run's configuration. Knows no engine and no loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megalith.data.build import Request, RunData, open_run_data, requested_samples
from megalith.data.loader import Batch, Loader
from megalith.data.masks import Masks
from megalith.data.sampler import CyclicSampler, Sampler, SequentialSampler
from megalith.data.schedule import BatchRampUp
from megalith.data.sources import Vocabulary
from megalith.data.splits import SPLITS
from megalith.data.stream import Stream
from megalith.tasks.pretrain_config import PretrainConfig
from megalith.tokenizers.base import Tokenizer
from megalith.topology.topology import Topology

Notice = Callable[[str], None]


@dataclass(frozen=True)
class Data:
    """Streams and loaders of a run."""

    config: PretrainConfig
    streams: RunData
    masks: Masks
    topology: Topology
    vocab_size: int
    notice: Notice

    def training(self, consumed: int) -> Iterator[Batch]:
        """This rank's share of every global batch from `consumed` samples to the end of the run."""
        schedule, end = self.config.model.batch_schedule, self.streams.train.plan.samples
        return self.training_loader().training(schedule, consumed=consumed, end=end)

    def training_loader(self) -> Loader:
        """Reads the training split at any place."""
        return self._loader(self.streams.train, self._sampler(self.streams.train))

    def validation(self) -> Callable[[], Iterator[Batch]] | None:
        """A function that starts a validation at sample 0; None when the run has none."""
        return self._evaluation(self.streams.validation, self.config.trainer.limit_val_batches)

    def test(self) -> Callable[[], Iterator[Batch]] | None:
        """The same for the test split."""
        return self._evaluation(self.streams.test, self.config.trainer.limit_test_batches)

    def _evaluation(self, stream: Stream | None, batches: int) -> Callable[[], Iterator[Batch]] | None:
        if stream is None:
            return None
        loader, model = self._loader(stream, SequentialSampler()), self.config.model
        positions = loader.evaluation_positions(
            batches, model.global_batch_size, drop_last=model.data.validation_drop_last, notice=self.notice
        )
        return lambda: loader.read(positions)

    def _loader(self, stream: Stream, sampler: Sampler) -> Loader:
        return Loader(
            stream,
            masks=self.masks,
            sampler=sampler,
            data_rank=self.topology.data_rank,
            data_size=self.topology.data_size,
            workers=self.config.model.data.num_workers,
            vocab_size=self.vocab_size,
            pin=self.topology.device.type == "cuda",
        )

    def _sampler(self, stream: Stream) -> Sampler:
        model = self.config.model
        if model.data.dataloader_type == "single":
            return SequentialSampler()
        return CyclicSampler(
            stream.plan.cycle, model.micro_batch_size, self.topology.data_size, model.data.data_sharding
        )


def open_data(
    config: PretrainConfig,
    tokenizer: Tokenizer,
    topology: Topology,
    *,
    vocab_size: int,
    stored: Mapping[str, Any] | None = None,
    step: int = 0,
    consumed: int = 0,
    splits: Sequence[str] = SPLITS,
    notice: Notice = lambda text: None,
) -> Data:
    """Open the token files and make the plans, or continue those in `stored` (a checkpoint's) at `step` and `consumed`.

    `splits`: those of train, validation and test that will be read, where the configuration asks for samples of them.

    Errors: what `open_run_data` raises, and `ConfigError` for a vocabulary that the family's samples cannot be made with.
    """
    trainer, model = config.trainer, config.model
    masks = model.masks(tokenizer)
    samples = requested_samples(
        model.batch_schedule,
        max_steps=trainer.max_steps,
        val_check_interval=trainer.val_check_interval or 0,
        limit_val_batches=trainer.limit_val_batches,
        limit_test_batches=trainer.limit_test_batches if trainer.test_at_end else 0,
    )
    samples["train"] = samples_at_end(model.batch_schedule, consumed, max(trainer.max_steps - step, 0))
    request = Request(
        seq_length=model.encoder_seq_length,
        seed=model.seed,
        samples={split: samples[split] for split in splits},
        stored=stored,
        consumed=consumed,
        vocabulary=Vocabulary.of(tokenizer),
        notice=notice,
        shape=model.shape,
    )
    return Data(config, open_run_data(model.data, request), masks, topology, vocab_size, notice)


def samples_at_end(schedule: BatchRampUp, consumed: int, steps: int) -> int:
    """Samples read after `steps` further steps: of a run whose batch size was changed, too."""
    while steps and schedule.size_at(consumed) != schedule.global_batch_size:
        consumed, steps = consumed + schedule.size_at(consumed), steps - 1
    return consumed + steps * schedule.global_batch_size
