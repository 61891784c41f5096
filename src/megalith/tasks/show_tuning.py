"""`megalith tune … --show-batch STEP`: the rows that a tuning would be given at a step, decoded for a person.

    row 0: sample 16 of the run, train.jsonl:7, Winogrande
    ⟨Winogrande: 150 virtual tokens⟩⟦The trophy … Answer:⟧ trophy<|endoftext|>
    2 of 171 targets count

Grey, in brackets: read, but not predicted. Trains nothing and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np
from rich.console import Console
from rich.text import Text

from megalith.config.compose import Composed
from megalith.data.sampler import batch_positions
from megalith.data.show import END, LABEL, NOT_PREDICTED, VISIBLE
from megalith.data.tuning_samples import Ids, Sample
from megalith.errors import EXIT_SUCCESS
from megalith.tasks.show_batch import SHOWN_ROWS, consumed_before
from megalith.tasks.tuning import check_tags, choose, make_method
from megalith.tasks.tuning_base import open_base, tokenizer_of
from megalith.tasks.tuning_config import TuneConfig
from megalith.tasks.tuning_data import open_tuning_data
from megalith.tokenizers.base import Tokenizer
from megalith.topology.topology import Topology


def show(
    composed: Composed[TuneConfig], step: int, *, rows: int = SHOWN_ROWS, console: Console | None = None
) -> int:
    """Print the first `rows` rows of the global batch of step `step` (0 is the first). → exit code 0.

    Errors: what opening model and data raises; `ConfigError` for a step that cannot be found any more.
    """
    console, config = console or Console(), composed.config
    base = open_base(config.restore_from_path, config.exp_manager.exp_dir)
    check_tags(config, base)
    tokenizer = tokenizer_of(config, base)
    _, start = choose(config, base, make_method(config, base, tokenizer))
    state = start.state
    data = open_tuning_data(
        config, base, tokenizer, Topology.single("cpu"), stored=state.get("data_plan"), splits=["train"]
    )
    schedule = config.model.batch_schedule
    begun = int(state.get("step", 0)), int(state.get("consumed_samples", 0))
    consumed = consumed_before(schedule, step, *begun)
    size = schedule.size_at(consumed)
    for line in data.streams.summary():
        console.print(line, markup=False, highlight=False)
    console.print(
        f"step {step} (0 is the first) reads samples {consumed} to {consumed + size - 1}; "
        f"{min(rows, size)} of its {size} rows:",
        highlight=False,
    )
    positions = batch_positions(consumed, size)[:rows]
    _, samples = data.training_loader().read(positions)
    for i, (position, sample) in enumerate(zip(positions.tolist(), samples, strict=True)):
        for text in _row(i, position, sample, (tokenizer, base.architecture.vocab_size)):
            console.print(text, soft_wrap=not console.is_terminal)
    return EXIT_SUCCESS


def _row(i: int, position: int, sample: Sample, how: tuple[Tokenizer, int]) -> Iterator[Text]:
    head = Text(f"\nrow {i}", LABEL)
    name = f", {sample.task}" if sample.task else ""
    yield head.append(f": sample {position} of the run, {sample.origin}{name}", "default")
    if sample.encoder is not None:
        nothing = np.zeros(len(sample.encoder), np.bool_)
        yield Text("encoder  ", LABEL).append(_decoded(sample.encoder, nothing, sample.task, how))
        yield Text("decoder  ", LABEL).append(_decoded(sample.tokens, sample.scored, "", how))
    else:
        yield _decoded(sample.tokens, sample.scored, sample.task, how)
    counted = int(sample.scored[1:].sum())
    yield Text(f"{counted} of {len(sample.tokens) - 1} targets count", LABEL)


def _decoded(tokens: Ids, scored: np.ndarray, task: str, how: tuple[Tokenizer, int]) -> Text:
    """Runs of equal kind are decoded together, so that characters of several tokens stay whole."""
    tokenizer, vocabulary = how
    text = Text(overflow="fold")
    ends = {tokenizer.eod, tokenizer.eos} - {None}
    kinds = [
        (token, "virtual" if token >= vocabulary else "end" if counts and token in ends else bool(counts))
        for token, counts in zip(tokens.tolist(), scored.tolist(), strict=True)
    ]
    for kind, run in groupby(kinds, key=lambda pair: pair[1]):
        ids = [token for token, _ in run]
        if kind == "virtual":
            text.append(f"⟨{task}: {len(ids)} virtual tokens⟩", END)
            continue
        words = tokenizer.decode(ids).translate(VISIBLE)
        text.append(
            words if kind else f"⟦{words}⟧", END if kind == "end" else "default" if kind else NOT_PREDICTED
        )
    return text
