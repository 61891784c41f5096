"""Shows rows of a batch to a person: text, borders of documents, positions, and which tokens the loss leaves out.

```
row 0: sample 96 of the run, sample 3 of epoch 2 of corpus_text_document
── document 17, tokens 41 to 60 of 61 · positions 0 to 19 · document 0 of the row ──
the text of the document, ⟦what is not predicted⟧ in brackets and grey, and its <|endoftext|>
```
Knows rows, masks and a tokenizer. Refuses to know where batches come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console, Group
from rich.text import Text

from megalith.data.gpt import Piece
from megalith.data.stream import Provenance
from megalith.tokenizers.base import Tokenizer

NOT_PREDICTED, END, LABEL = "bright_black", "bold yellow", "bold cyan"
VISIBLE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "␡"}
"""Control characters would move the terminal's cursor: show their symbols."""

Array = npt.NDArray


@dataclass(frozen=True)
class Row:
    """One row of a batch. `tokens` int64[T + 1] as read; the others as the model is given them.

    `targets` int64[T]; `positions`, `documents` int[T] or None where the masks are off.
    """

    number: int
    tokens: Array
    targets: Array
    provenance: Provenance
    positions: Array | None = None
    documents: Array | None = None

    def predicted(self) -> npt.NDArray[np.bool_]:
        """bool[T + 1]: whether each token is a target that counts. The first is nobody's target."""
        return np.concatenate([[False], self.targets >= 0])


@dataclass(frozen=True)
class Stretch:
    """Tokens `first … last − 1` of a row, one piece of a document."""

    first: int
    last: int
    piece: Piece
    whole: int

    @property
    def borders(self) -> str:
        """Which part of the document this is."""
        begin, end = self.piece.offset, self.piece.offset + self.piece.length
        if (begin, end) == (0, self.whole):
            return f"all {self.whole} tokens"
        return f"tokens {begin} to {end - 1} of {self.whole}"


def stretches(provenance: Provenance) -> Iterator[Stretch]:
    """The pieces of a row with their places in it."""
    at = 0
    for piece, whole in zip(provenance.pieces, provenance.item_lengths, strict=True):
        yield Stretch(at, at + piece.length, piece, whole)
        at += piece.length


def show_rows(console: Console, rows: Sequence[Row], tokenizer: Tokenizer) -> None:
    """Print rows below each other, with a legend."""
    legend = Text("⟦grey⟧", NOT_PREDICTED)
    legend.append(" is read but not predicted: its target is −1   ", "default")
    if tokenizer.eod is not None:
        legend.append(tokenizer.decode([tokenizer.eod]), END)
        legend.append(" ends a document", "default")
    console.print(legend)
    for i, row in enumerate(rows):
        console.print(_row(i, row, tokenizer))


def _row(i: int, row: Row, tokenizer: Tokenizer) -> Group:
    head = Text(f"\nrow {i}", LABEL)
    head.append(f": sample {row.number} of the run, {place(row.provenance)}", "default")
    predicted = row.predicted()
    parts: list[Text] = [head]
    for stretch in stretches(row.provenance):
        parts.append(_title(stretch, row))
        parts.append(
            _text(
                row.tokens[stretch.first : stretch.last], predicted[stretch.first : stretch.last], tokenizer
            )
        )
    counted = int((row.targets >= 0).sum())
    parts.append(Text(f"{counted} of {len(row.targets)} targets count", LABEL))
    return Group(*parts)


def place(provenance: Provenance) -> str:
    """Which sample of its source it is, for people."""
    name = Path(provenance.path).name
    if not provenance.epoch_length:
        return f"sample {provenance.index} of {name}"
    epoch, index = divmod(provenance.index, provenance.epoch_length)
    return f"sample {index} of epoch {epoch} of {name}"


def _title(stretch: Stretch, row: Row) -> Text:
    parts = [f"document {stretch.piece.item}, {stretch.borders}"]
    inputs = slice(stretch.first, min(stretch.last, len(row.targets)))
    if stretch.first >= len(row.targets):
        parts.append("only a target")
    else:
        place = row.positions if row.positions is not None else np.arange(len(row.targets))
        parts.append(f"positions {_span(place[inputs])}")
        if row.documents is not None:
            parts.append(f"attends within number {_span(row.documents[inputs])} of this row")
    return Text(f"── {' · '.join(parts)} ──", LABEL)


def _span(values: Array) -> str:
    """ "3", "3 to 9", or the runs where values do not count up one by one."""
    breaks = np.flatnonzero(~np.isin(np.diff(values), (0, 1))) + 1
    runs = np.split(values, breaks)
    shown = [str(run[0]) if run[0] == run[-1] else f"{run[0]} to {run[-1]}" for run in runs[:4]]
    return ", ".join(shown) + (", …" if len(runs) > 4 else "")


def _text(tokens: Array, predicted: Array, tokenizer: Tokenizer) -> Text:
    """Runs of equal kind are decoded together, so that characters of several tokens stay whole."""
    text = Text(overflow="fold")
    kinds = zip(tokens.tolist(), predicted.tolist(), strict=True)
    for (counts, end), run in groupby(kinds, key=lambda pair: (pair[1], pair[0] == tokenizer.eod)):
        words = tokenizer.decode([token for token, _ in run]).translate(VISIBLE)
        if counts:
            text.append(words, END if end else "default")
        else:
            text.append(f"⟦{words}⟧", NOT_PREDICTED)
    return text
