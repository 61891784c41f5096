"""Where in a text's ids a part of it begins: by offsets, for each kind of tokenizer."""

from __future__ import annotations

import io

import pytest
import sentencepiece

from megalith.tokenizers.base import Tokenizer
from megalith.tokenizers.load import load_tokenizer
from megalith.tokenizers.names import WORD_PIECE_LOWER, TokenizerFiles
from megalith.tokenizers.sentencepiece import from_model
from megalith.tokenizers.train import TrainingOptions, train_bpe

PAIRS = [
    ("The trophy is big.", " yes"), ("The trophy is big. ", "yes"), ("q:\n", "no"), ("", "yes"), ("no", ""), ("tro", "phy"),
    ("naïve 🙂", "🙂 yes"), ("x    ", "  no"),
]  # fmt: skip


def bpe(tmp_path) -> Tokenizer:
    return train_bpe(["The trophy is big. yes no yes no trophy The " * 20], TrainingOptions(vocab_size=320))


def word_piece(tmp_path) -> Tokenizer:
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "trophy",
        "is",
        "big",
        ".",
        "yes",
        "no",
        "q",
        ":",
        "tro",
        "##phy",
        "x",
        "na",
        "##ive",
        "##yes",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    return load_tokenizer(TokenizerFiles(type=WORD_PIECE_LOWER, vocab_file=str(tmp_path / "vocab.txt")))


def sentence_piece(tmp_path) -> Tokenizer:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["The trophy is big. yes no yes no", "q: no tro phy naïve x"] * 20),
        model_writer=out, vocab_size=300, byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return from_model(out.getvalue(), type="SentencePieceTokenizer", megatron=False, where="here")


@pytest.mark.parametrize("make", [bpe, word_piece, sentence_piece])
def test_the_first_token_of_the_answer_is_found(tmp_path, make):
    tokenizer = make(tmp_path)
    for text, answer in PAIRS:
        ids, begin = tokenizer.encode_from(text + answer, len(text))
        assert ids == tokenizer.encode(text + answer)
        alone = tokenizer.encode(text)
        if answer.startswith(" ") and text and not text.endswith(" "):
            assert begin == len(alone)
        assert begin <= len(alone) + 1, "a space that ends the text may be a token of its own here"


def test_a_token_across_counts_as_the_answer_s(tmp_path):
    tokenizer = bpe(tmp_path)
    whole = tokenizer.encode("The trophy")
    ids, begin = tokenizer.encode_from("The trophy", len("The tro"))
    assert ids == whole
    assert tokenizer.decode(ids[:begin]) == "The"
    assert "tro" in tokenizer.decode(ids[begin:])


def test_a_character_of_several_bytes_is_one_side_s_alone(tmp_path):
    tokenizer = sentence_piece(tmp_path)
    ids, begin = tokenizer.encode_from("yes🙂", 3)
    assert len(ids) - begin >= 4, "its bytes are pieces of their own"
    assert tokenizer.decode(ids[:begin]) == "yes"
