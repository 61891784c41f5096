"""Shows rows of BERT, T5 and BART to a person: what is masked and how, what the encoder reads, what the decoder writes.

```
row 0: sample 96 of the run, sample 3 of epoch 2 of corpus_text_sentence · sentences 17 to 21
── A: 12 tokens · B: 9 tokens · swapped ──
[CLS]the quick ⟦brown fox⟧ jumps ⟦over←at⟧ the ⟦=lazy⟧ dog[SEP]…
── encoder: 20 of 512 tokens ──
the quick ‹0› jumps over ‹1› dog
── decoder: 8 of 128 tokens ──
‹0›brown fox‹1›the lazy[EOS]
```
Knows rows and a tokenizer. Refuses to know where batches come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby

import numpy as np
import numpy.typing as npt
from rich.console import Console, Group
from rich.text import Text

from megalith.data.shape import Kind
from megalith.data.show import LABEL, VISIBLE, place
from megalith.data.stream import Provenance
from megalith.data.token_ids import TokenIds
from megalith.tokenizers.base import Tokenizer

MASKED, OTHER, KEPT, SPECIAL = "bold green", "bold magenta", "bold yellow", "bright_black"
SPANS = ("green", "magenta", "yellow", "cyan", "red", "blue")
"""Colours of T5's spans, in turn: a sentinel in the encoder looks like its span in the decoder."""

Array = npt.NDArray
Run = tuple[list[int], str, str]  # tokens, style, how they are written: "{}" is the text


@dataclass(frozen=True)
class MaskedRow:
    """One row of a batch as the model is given it, by the names of `masked` and `span`."""

    number: int
    kind: Kind
    arrays: Mapping[str, Array]
    provenance: Provenance


@dataclass(frozen=True)
class Writer:
    """Writes runs of tokens with the spaces that a word-piece vocabulary leaves out."""

    tokenizer: Tokenizer
    ids: TokenIds

    def text(self, runs: Iterable[Run]) -> Text:
        written = Text(overflow="fold")
        for tokens, style, pattern in runs:
            words = self.tokenizer.decode(tokens).translate(VISIBLE).strip(" ")
            if written and self._begins_word(tokens[0]):
                written.append(" ")
            written.append(pattern.format(words), style)
        return written

    def _begins_word(self, token: int) -> bool:
        return self.ids.continues is not None and bool(
            self.ids.begins(np.array([token]), whole_words=True)[0]
        )


def show_masked_rows(
    console: Console, rows: Sequence[MaskedRow], tokenizer: Tokenizer, ids: TokenIds
) -> None:
    """Print rows of one kind below each other, with a legend."""
    writer = Writer(tokenizer, ids)
    for kind in {row.kind for row in rows}:
        console.print(_bert_legend() if kind == "bert" else _encoder_legend(kind))
    for i, row in enumerate(rows):
        pieces = row.provenance.pieces
        head = Text(f"\nrow {i}", LABEL)
        span = f"{pieces[0].item} to {pieces[-1].item}" if len(pieces) > 1 else f"{pieces[0].item}"
        head.append(f": sample {row.number} of the run, {place(row.provenance)} · items {span}", "default")
        parts = _bert(row.arrays, writer) if row.kind == "bert" else _encoder_decoder(row, writer)
        console.print(Group(head, *parts))


# ---- BERT ----


def _bert_legend() -> Text:
    legend = Text("⟦green⟧", MASKED)
    legend.append(" the model reads [MASK]   ", "default")
    legend.append("⟦magenta←other⟧", OTHER)
    legend.append(" it reads another token   ", "default")
    legend.append("⟦=yellow⟧", KEPT)
    legend.append(" it reads the token itself; each is to be guessed", "default")
    return legend


def _bert(arrays: Mapping[str, Array], writer: Writer) -> list[Text]:
    count = int(arrays["lengths"])
    read, targets = arrays["tokens"][:count].tolist(), arrays["targets"][:count].tolist()
    kinds = [_kind(r, t, writer.ids) for r, t in zip(read, targets, strict=True)]
    title = f"── {count} of {len(arrays['tokens'])} tokens · {_halves(arrays, count)} ──"
    tally = ", ".join(f"{kinds.count(kind)} {name}" for kind, name in
                      ((MASKED, "as [MASK]"), (OTHER, "as another token"), (KEPT, "as themselves")))  # fmt: skip
    guessed = sum(target >= 0 for target in targets)
    return [
        Text(title, LABEL),
        writer.text(_bert_runs(read, targets, kinds, writer)),
        Text(f"{guessed} of {count} tokens are guessed: {tally}", LABEL),
    ]


def _kind(read: int, target: int, ids: TokenIds) -> str:
    if target < 0:
        return SPECIAL if read in (ids.cls, ids.sep) else "default"
    if read == ids.mask:
        return MASKED
    return KEPT if read == target else OTHER


def _halves(arrays: Mapping[str, Array], count: int) -> str:
    second = int(arrays["types"][:count].sum())
    if "order" not in arrays:
        return "one piece"
    swapped = {1: "swapped", 0: "in their order"}.get(int(arrays["order"]), "not counted")
    return f"halves of {count - second - 2} and {max(second - 1, 0)} tokens, {swapped}"


def _bert_runs(read: list[int], targets: list[int], kinds: list[str], writer: Writer) -> Iterator[Run]:
    patterns = {MASKED: "⟦{}⟧", KEPT: "⟦={}⟧"}
    for kind, places in groupby(range(len(read)), key=kinds.__getitem__):
        run = list(places)
        seen = [read[i] for i in run]
        wanted = [targets[i] if targets[i] >= 0 else read[i] for i in run]
        pattern = patterns.get(kind, "{}")
        if kind == OTHER:
            other = writer.tokenizer.decode(seen).translate(VISIBLE).strip(" ")
            pattern = "⟦{}←" + other.replace("{", "{{").replace("}", "}}") + "⟧"
        yield wanted, kind, pattern


# ---- encoder and decoder ----


def _encoder_legend(kind: Kind) -> Text:
    if kind == "t5_prefix_lm":
        return Text("the encoder reads the first part of a text, the decoder writes the second")
    if kind == "t5":
        legend = Text("‹0›", MASKED)
        return legend.append(
            " stands for a run of tokens, which the decoder writes behind its ‹0›", "default"
        )
    legend = Text("⟦green⟧", MASKED)
    return legend.append(" is what the encoder does not read; a mask stands for it, or nothing", "default")


def _encoder_decoder(row: MaskedRow, writer: Writer) -> list[Text]:
    arrays, ids = row.arrays, writer.ids
    encoder = arrays["encoder_tokens"][: int(arrays["encoder_lengths"])].tolist()
    counted = int((arrays["targets"] >= 0).sum())
    targets = arrays["targets"][:counted].tolist()
    if row.kind == "t5":
        runs = _t5_runs(encoder, ids), _t5_runs(targets, ids, coloured=True)
    elif row.kind == "bart":
        runs = _marked(encoder, lambda token: token == ids.mask), _missing(targets, encoder, ids)
    else:
        runs = _plain(encoder, "default", ids), _plain(targets, "default", ids)
    return [
        Text(f"── encoder: {len(encoder)} of {len(arrays['encoder_tokens'])} tokens ──", LABEL),
        writer.text(runs[0]),
        Text(f"── decoder: {counted} of {len(arrays['targets'])} tokens ──", LABEL),
        writer.text(runs[1]),
    ]


def _t5_runs(tokens: list[int], ids: TokenIds, *, coloured: bool = False) -> Iterator[Run]:
    """`coloured`: what follows a sentinel belongs to it (the decoder's side)."""
    number = {token: i for i, token in enumerate(ids.sentinels)}
    style = "default"
    for is_sentinel, run in groupby(tokens, key=number.__contains__):
        for token in run if is_sentinel else ():
            style = SPANS[number[token] % len(SPANS)]
            yield [token], f"bold {style}", f"‹{number[token]}›"
        yield from _plain(list(run), style if coloured else "default", ids)


def _plain(tokens: list[int], style: str, ids: TokenIds) -> Iterator[Run]:
    for end, run in groupby(tokens, key=lambda token: token in (ids.bos, ids.eos)):
        yield list(run), SPECIAL if end else style, "{}"


def _marked(tokens: list[int], marked: Callable[[int], bool]) -> Iterator[Run]:
    for mask, run in groupby(tokens, key=marked):
        yield list(run), MASKED if mask else "default", "{}"


def _missing(tokens: list[int], encoder: list[int], ids: TokenIds) -> Iterator[Run]:
    """The decoder's tokens; in colour those that the encoder does not read."""
    at = 0
    for block in SequenceMatcher(None, encoder, tokens, autojunk=False).get_matching_blocks():
        for run in _plain(tokens[at : block.b], MASKED, ids):
            yield run if run[1] == SPECIAL else (*run[:2], "⟦{}⟧")
        yield from _plain(tokens[block.b : block.b + block.size], "default", ids)
        at = block.b + block.size
