"""A person can read from the picture what is masked and how, in colour and without."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from megalith.data.gpt import Piece
from megalith.data.loader import Loader
from megalith.data.show_masked import MaskedRow, show_masked_rows
from megalith.data.stream import Provenance
from megalith.data.token_ids import TokenIds
from megalith.tasks.show_batch import show_loaded
from tests.data import corpus
from tests.data.sentences import random_documents, run_data, write_sentences

PIECES = [
    "[PAD]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "[BOS]",
    "[EOS]",
    "the",
    "quick",
    "fox",
    "jump",
    "##s",
    "{over}",
    "\x07",
]
IDS = TokenIds(15, 1, 2, 3, 0, 4, 5, (13, 14), np.array([piece == "##s" for piece in PIECES] + [False] * 2))
PAD, CLS, SEP, MASK, BOS, EOS, THE, QUICK, FOX, JUMP, S, OVER, BELL = range(13)
PROVENANCE = Provenance("corpus/x", 23, 10, [Piece(17, 0, 4), Piece(18, 0, 3)], [4, 3])


class Words:
    eod = None

    def decode(self, ids):
        pieces = [PIECES[i] if i < len(PIECES) else f"<extra_id_{i - 13}>" for i in ids]
        return " ".join(pieces).replace(" ##", "").removeprefix("##")


def drawn(kind, width=100, colours=False, **arrays):
    row = MaskedRow(96, kind, {name: np.array(value) for name, value in arrays.items()}, PROVENANCE)
    out = io.StringIO()
    show_masked_rows(Console(file=out, width=width, force_terminal=colours), [row], Words(), IDS)
    return out.getvalue()


BERT = {
    "tokens": [CLS, THE, MASK, MASK, MASK, SEP, QUICK, FOX, BELL, SEP, PAD, PAD],
    "types": [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0],
    "targets": [-1, -1, JUMP, S, FOX, -1, OVER, FOX, -1, -1, -1, -1],
    "lengths": 10,
    "order": 1,
}


def test_bert():
    text = drawn("bert", **BERT)
    assert "row 0: sample 96 of the run, sample 3 of epoch 2 of x · items 17 to 18\n" in text
    assert "── 10 of 12 tokens · halves of 4 and 3 tokens, swapped ──\n" in text
    assert "[CLS] the ⟦jumps fox⟧ [SEP] ⟦{over}←quick⟧ ⟦=fox⟧ ␇ [SEP]\n" in text
    assert "5 of 10 tokens are guessed: 3 as [MASK], 1 as another token, 1 as themselves\n" in text


def test_bert_without_a_binary_head():
    text = drawn("bert", **{name: value for name, value in BERT.items() if name != "order"})
    assert "── 10 of 12 tokens · one piece ──\n" in text


def test_colours():
    text = drawn("bert", colours=True, **BERT)
    for coloured in (
        "\x1b[1;32m⟦jumps fox⟧",
        "\x1b[1;35m⟦{over}←quick⟧",
        "\x1b[1;33m⟦=fox⟧",
        "\x1b[90m[SEP]",
    ):
        assert coloured in text
    text = drawn("t5", colours=True, **T5)
    assert text.count("\x1b[1;32m‹0›") == 3, "the legend, the encoder and the decoder"
    assert "\x1b[32m jumps" in text or "\x1b[32mjumps" in text
    assert text.count("\x1b[1;35m‹1›") == 2


T5 = {
    "encoder_tokens": [THE, 13, FOX, 14, PAD, PAD],
    "encoder_lengths": 4,
    "tokens": [BOS, 13, JUMP, S, 14, QUICK, FOX, PAD],
    "targets": [13, JUMP, S, 14, QUICK, FOX, EOS, -1],
    "lengths": 7,
}


def test_t5():
    text = drawn("t5", **T5)
    assert "── encoder: 4 of 6 tokens ──\nthe ‹0› fox ‹1›\n" in text
    assert "── decoder: 7 of 8 tokens ──\n‹0› jumps ‹1› quick fox [EOS]\n" in text


def test_bart():
    """The second run was deleted: nothing stands for it in the encoder."""
    text = drawn(
        "bart",
        encoder_tokens=[THE, MASK, FOX, S, PAD, PAD],
        encoder_lengths=4,
        tokens=[BOS, THE, QUICK, FOX, JUMP, S],
        targets=[THE, QUICK, FOX, JUMP, S, EOS],
        lengths=6,
    )
    assert "── encoder: 4 of 6 tokens ──\nthe [MASK] foxs\n" in text
    assert "── decoder: 6 of 6 tokens ──\nthe ⟦quick⟧ fox ⟦jump⟧s [EOS]\n" in text


def test_a_prefix_model():
    arrays = {"encoder_tokens": [THE, FOX], "encoder_lengths": 2, "tokens": [BOS, JUMP], "targets": [JUMP, S],
              "lengths": 2}  # fmt: skip
    text = drawn("t5_prefix_lm", **arrays)
    assert "the encoder reads the first part of a text" in text
    assert "tokens ──\nthe fox\n" in text
    assert "tokens ──\njumps\n" in text


class Numbers:
    """Every token as its number."""

    eod = None

    def decode(self, ids):
        return " ".join(map(str, ids))


@pytest.mark.parametrize("kind", ["bert", "t5", "bart", "t5_prefix_lm"])
def test_what_is_shown_is_what_is_read(tmp_path, kind):
    if kind == "t5_prefix_lm":
        path = corpus.write(tmp_path / "a", [30] * 20)
    else:
        path, _ = write_sentences(tmp_path / "a", random_documents(0))
    data, masks = run_data(kind, path)
    loader, out = Loader(data.train, masks, workers=0), io.StringIO()
    show_loaded(Console(file=out, width=10_000), loader, np.arange(4, 7), Numbers())
    text = out.getvalue()
    assert [f"row {i}: sample {4 + i} of the run" in text for i in range(4)] == [True, True, True, False]
    (batch,) = loader.read([np.arange(4, 7)])
    name = "tokens" if kind == "bert" else "encoder_tokens"
    for row, length in zip(
        batch[name], batch["lengths" if kind == "bert" else "encoder_lengths"], strict=True
    ):
        assert f"{int(length)} of {len(row)} tokens" in text
