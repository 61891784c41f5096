"""A small BERT vocabulary and a small SentencePiece model, for tests without real data."""

from __future__ import annotations

import io
from pathlib import Path

import sentencepiece

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "##s",
    "##ting",
    "un",
    "##able",
    ".",
    ",",
    "!",
    "[",
    "]",
    "中",
    "é",
]
TEXT = ["the cat sat on the mat.", "a dog’s dog; naïve café, 3.14!", "«Où?» over and over again"]


def pieces() -> list[str]:
    """About 150: whole words, each letter alone and behind another."""
    return list(dict.fromkeys([*SPECIALS, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]))


def write_vocabulary(path: Path, lines: list[str] | None = None) -> Path:
    path.write_text("\n".join(pieces() if lines is None else lines) + "\n", encoding="utf-8")
    return path


def write_model(path: Path, **options: object) -> Path:
    """A Unigram model of `TEXT`, as SentencePiece's own trainer makes it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 20),
        model_writer=model,
        **{"vocab_size": 60, "hard_vocab_limit": False, "minloglevel": 2, **options},
    )
    path.write_bytes(model.getvalue())
    return path
