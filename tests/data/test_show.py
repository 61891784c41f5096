"""A person can read from the picture what the model is given: every token, every border, every masked target."""

from __future__ import annotations

import io

import numpy as np
from rich.console import Console

from megalith.data.gpt import Piece
from megalith.data.masks import MaskOptions, make_batch
from megalith.data.show import Row, show_rows, stretches
from megalith.data.stream import Provenance

EOD = 0


class Letters:
    """Ids 1 … 26 are letters, 0 ends a document, 27 rings the terminal's bell."""

    eod = EOD

    def decode(self, ids):
        return "".join("<end>" if i == EOD else "\x07" if i == 27 else chr(96 + i) for i in ids)


def drawn(tokens, pieces, lengths, epoch_length=10, **masks):
    rows = np.array([tokens])
    batch = make_batch(rows, MaskOptions(EOD, **masks))
    optional = {name: batch[name][0] for name in ("positions", "documents") if name in batch}
    row = Row(
        96,
        rows[0],
        batch["targets"][0],
        Provenance("corpus/x", 23, epoch_length, pieces, lengths),
        **optional,
    )
    out = io.StringIO()
    show_rows(Console(file=out, width=200), [row], Letters())
    return out.getvalue()


PIECES = [Piece(17, 4, 3), Piece(5, 0, 4), Piece(8, 0, 1)]
TOKENS = [1, 2, EOD, 3, 4, 5, EOD, 6]


def test_the_whole_picture():
    masks = {"mask_loss": True, "reset_positions": True, "reset_attention": True}
    text = drawn(TOKENS, PIECES, [7, 4, 30], **masks)
    assert "row 0: sample 96 of the run, sample 3 of epoch 2 of x" in text
    assert (
        "── document 17, tokens 4 to 6 of 7 · positions 0 to 2 · attends within number 0 of this row ──\n⟦a⟧b<end>\n"
        in text
    )
    assert (
        "── document 5, all 4 tokens · positions 0 to 3 · attends within number 1 of this row ──\n⟦c⟧de<end>\n"
        in text
    )
    assert "── document 8, tokens 0 to 0 of 30 · only a target ──\n⟦f⟧\n" in text
    assert "5 of 7 targets count" in text


def test_without_masks():
    text = drawn(TOKENS, PIECES, [7, 4, 30])
    assert "document 5, all 4 tokens · positions 3 to 6 ──\ncde<end>" in text
    assert "attends" not in text
    assert "7 of 7 targets count" in text


def test_the_other_sense():
    text = drawn(TOKENS, PIECES, [7, 4, 30], mask_loss=True, sense="target")
    assert "⟦a⟧b⟦<end>⟧\n" in text
    assert "cde⟦<end>⟧\n" in text


def test_an_end_inside_a_document():
    """Positions follow the tokens, not the file: a border that only the model sees is shown too."""
    text = drawn([1, EOD, 2, 3, EOD, 4], [Piece(1, 0, 6)], [6], reset_positions=True, reset_attention=True)
    assert "all 6 tokens · positions 0 to 1, 0 to 2 · attends within number 0 to 1 of this row" in text


def test_megatrons_order_has_no_epochs():
    assert "sample 23 of x" in drawn(TOKENS, PIECES, [7, 4, 30], epoch_length=0)


def test_the_terminal_is_left_alone():
    text = drawn([1, 27, 2, 3, 4, 5, EOD, 6], PIECES, [7, 4, 30])
    assert "\x07" not in text
    assert "␇" in text


def test_stretches_cover_the_row():
    found = list(stretches(Provenance("x", 0, 0, PIECES, [7, 4, 30])))
    assert [(s.first, s.last) for s in found] == [(0, 3), (3, 7), (7, 8)]
