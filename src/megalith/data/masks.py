"""From rows of `seq_length + 1` tokens to what the model is given: inputs, targets, positions, document numbers.

```
row        a  b  ␄  c  d          ␄ ends a document
tokens     a  b  ␄  c             targets    b  ␄  c  d     (−1: not counted)
documents  0  0  0  1             positions  0  1  2  0     the ␄ belongs to the document that it ends
```
All of it for a whole batch at once. Knows ids and −1. Refuses to know what the model does with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from megalith.data.stream import Numbers, Stream
from megalith.errors import ConfigError, Problem

Array = npt.NDArray
EodSense = Literal["input", "target"]

IGNORED = -1
"""Target that the loss does not count."""


class Masks(Protocol):
    """Makes what a model is given of the samples that a stream reads: `MaskOptions` for GPT, `masked` for BERT, `span`."""

    def batch(self, stream: Stream, numbers: Numbers) -> dict[str, Array]:
        """Arrays with the sample first: `tokens`, `targets`, and what the model needs besides."""


@dataclass(frozen=True)
class MaskOptions:
    """What the ends of documents do.

    `mask_loss` drops a target at each of them: with `sense` "input" (Megatron's) the prediction of the *next document's
    first token*, made from the end-of-document token; with "target" the prediction of the end-of-document token itself.
    `reset_positions` counts positions anew behind each, `reset_attention` numbers the documents, so that tokens attend
    within their own only. `eod` is the token; it is needed as soon as one of them is on.
    """

    eod: int | None = None
    mask_loss: bool = False
    sense: EodSense = "input"
    reset_positions: bool = False
    reset_attention: bool = False

    def __post_init__(self) -> None:
        wanted = {
            "eod_mask_loss": self.mask_loss,
            "reset_position_ids": self.reset_positions,
            "reset_attention_mask": self.reset_attention,
        }
        if self.eod is None and any(wanted.values()):
            what = "needs an end-of-document token, and the tokenizer has none"
            fix = "switch it off, or use a tokenizer with an end-of-document token"
            raise ConfigError([Problem(f"model.data.{key}", what, fix) for key, on in wanted.items() if on])

    def batch(self, stream: Stream, numbers: Numbers) -> dict[str, Array]:
        """`make_batch` of the windows `numbers`."""
        return make_batch(stream.read(numbers), self)


def make_batch(rows: Array, options: MaskOptions) -> dict[str, Array]:
    """Rows int64[B, T + 1] → `tokens`, `targets` int64[B, T]; `positions` int64, `documents` int32 where asked for."""
    tokens, targets = rows[:, :-1], rows[:, 1:].copy()
    batch = {"tokens": np.ascontiguousarray(tokens), "targets": targets}
    if options.mask_loss:
        targets[(tokens if options.sense == "input" else targets) == options.eod] = IGNORED
    if options.reset_positions:
        batch["positions"] = positions(tokens, options.eod)
    if options.reset_attention:
        batch["documents"] = documents(tokens, options.eod)
    return batch


def documents(tokens: Array, eod: int | None) -> npt.NDArray[np.int32]:
    """int32[B, T]: number of the document within its row. It grows behind an end-of-document token."""
    ends = tokens == eod
    return np.cumsum(ends, axis=1, dtype=np.int32) - ends


def positions(tokens: Array, eod: int | None) -> npt.NDArray[np.int64]:
    """int64[B, T]: place within the document, as far as the row shows it. 0 behind an end-of-document token."""
    place = np.arange(tokens.shape[1], dtype=np.int64)
    starts = np.zeros(tokens.shape, np.int64)
    starts[:, 1:] = np.where(tokens[:, :-1] == eod, place[1:], 0)
    return place - np.maximum.accumulate(starts, axis=1)
