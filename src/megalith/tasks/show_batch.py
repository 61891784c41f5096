"""`megalith pretrain gpt … --show-batch STEP`: what the model would be given at a step, decoded for a person.

Reads what the run would read, from the run's own data plan where it has a checkpoint. Trains nothing and writes nothing
but the data's index cache.
"""

from __future__ import annotations

import numpy as np
from rich.console import Console

from megalith.config.compose import Composed
from megalith.data.loader import Batch, Loader
from megalith.data.masked import BertMasks
from megalith.data.sampler import batch_positions
from megalith.data.schedule import BatchRampUp
from megalith.data.show import Row, show_rows
from megalith.data.show_masked import MaskedRow, show_masked_rows
from megalith.data.span import PrefixMasks, SpanMasks
from megalith.errors import EXIT_SUCCESS, ConfigError, Problem
from megalith.tasks.pretrain_config import PretrainConfig
from megalith.tasks.pretrain_data import open_data, samples_at_end
from megalith.tokenizers.base import Tokenizer
from megalith.tokenizers.load import load_tokenizer
from megalith.topology.topology import Topology
from megalith.training.experiment import choose_folder
from megalith.training.starting import choose_start

SHOWN_ROWS = 4


def show(
    composed: Composed[PretrainConfig],
    step: int,
    *,
    rows: int = SHOWN_ROWS,
    console: Console | None = None,
) -> int:
    """Print the first `rows` rows of the global batch of step `step` (0 is the first). → exit code 0.

    Errors: what opening the data raises; ConfigError for a step that cannot be found any more.
    """
    console = console or Console()
    config = composed.config
    state = _state(config)
    tokenizer = load_tokenizer(config.model.tokenizer)
    vocab_size = config.model.architecture(tokenizer.vocab_size).vocab_size
    begun = int(state.get("step", 0)), int(state.get("consumed_samples", 0))
    data = open_data(
        config, tokenizer, Topology.single("cpu"), vocab_size=vocab_size, stored=state.get("data_plan"),
        step=begun[0], consumed=begun[1], notice=lambda text: console.print(text, markup=False, highlight=False),
    )  # fmt: skip
    schedule = config.model.batch_schedule
    consumed = consumed_before(schedule, step, *begun)
    size = schedule.size_at(consumed)
    console.print(
        f"step {step} (0 is the first) reads samples {consumed} to {consumed + size - 1}; "
        f"{min(rows, size)} of its {size} rows:",
        highlight=False,
    )
    positions = batch_positions(consumed, size)[:rows]
    show_loaded(console, data.training_loader(), positions, tokenizer)
    return EXIT_SUCCESS


def show_loaded(console: Console, loader: Loader, positions: np.ndarray, tokenizer: Tokenizer) -> None:
    """Print the rows at `positions` of any model's data."""
    masks = loader.masks
    if isinstance(masks, BertMasks | SpanMasks | PrefixMasks):
        show_masked_rows(console, read_masked_rows(loader, positions), tokenizer, masks.ids)
    else:
        show_rows(console, read_rows(loader, positions), tokenizer)


def consumed_before(schedule: BatchRampUp, step: int, begun_step: int, begun_consumed: int) -> int:
    """Samples read before `step`, in a run that has come to `begun_step` and `begun_consumed`.

    ConfigError for an earlier step when the run's batch size was changed: then only its samples are known.
    """
    if step < begun_step and schedule.consumed_at(begun_step) != begun_consumed:
        what = f"the batch size was changed before step {begun_step}: where step {step} began is not known any more"
        raise ConfigError([Problem("--show-batch", what, f"a step from {begun_step} on")])
    if step < begun_step:
        return schedule.consumed_at(step)
    return samples_at_end(schedule, begun_consumed, step - begun_step)


def read_rows(loader: Loader, positions: np.ndarray) -> list[Row]:
    """The rows at `positions` as the model is given them, with where they come from."""
    (batch,) = loader.read([positions])
    numbers = loader.sampler.numbers(positions)
    tokens = loader.stream.read(numbers)
    return [
        Row(
            number=int(position),
            tokens=tokens[i],
            targets=batch["targets"][i].numpy(),
            provenance=loader.stream.provenance(int(numbers[i])),
            positions=_of_row(batch, "positions", i),
            documents=_of_row(batch, "documents", i),
        )
        for i, position in enumerate(positions)
    ]


def read_masked_rows(loader: Loader, positions: np.ndarray) -> list[MaskedRow]:
    """The same for BERT, T5 and BART."""
    (batch,) = loader.read([positions])
    numbers = loader.sampler.numbers(positions)
    return [
        MaskedRow(
            number=int(position),
            kind=loader.stream.plan.shape.kind,
            arrays={name: tensor[i].numpy() for name, tensor in batch.items()},
            provenance=loader.stream.provenance(int(numbers[i])),
        )
        for i, position in enumerate(positions)
    ]


def _of_row(batch: Batch, name: str, i: int) -> np.ndarray | None:
    return batch[name][i].numpy() if name in batch else None


def _state(config: PretrainConfig) -> dict:
    """The state of the checkpoint that the run would go on from; empty for a new run."""
    return choose_start(
        choose_folder(config.exp_manager).checkpoints,
        resume_if_exists=config.exp_manager.resume_if_exists,
        ignore_no_checkpoint=True,
        resume_from=config.model.resume_from_checkpoint,
        init_from=config.init_from,
    ).state
