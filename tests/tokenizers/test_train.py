"""Training: deterministic, every customary file written, limits named."""

import json
from functools import partial

import pytest
import sentencepiece

from megalith.errors import DataError
from megalith.tokenizers.load import gpt2_tokenizer, load_tokenizer
from megalith.tokenizers.names import TokenizerFiles
from megalith.tokenizers.train import (
    TrainingOptions,
    train_bpe,
    train_sentence_piece,
    train_word_piece,
    write_trained,
)

TEXTS = ["low lower lowest\n", "new newer newest\n", "wide wider widest\n"] * 30


def test_layout_of_the_vocabulary():
    tokenizer = train_bpe(TEXTS, TrainingOptions(270, special_tokens=("<|endoftext|>", "<pad>")))
    pieces = [tokenizer.piece(id) for id in range(tokenizer.vocab_size)]
    assert pieces[:2] == ["<|endoftext|>", "<pad>"]
    assert pieces[2] == "!"
    assert tokenizer.vocab_size == 270 == len(set(pieces))
    assert all(len(piece) == 1 for piece in pieces[2:258])
    assert len(pieces[258]) == 2
    assert tokenizer.eod == 0


def test_the_first_merge_is_the_most_frequent_pair():
    tokenizer = train_bpe(["ab" * 50 + " cd"], TrainingOptions(258))
    assert tokenizer.definition["model"]["merges"] == [["a", "b"]]


def test_the_same_texts_give_the_same_files(tmp_path):
    for name in ("one", "two"):
        write_trained(train_bpe(iter(TEXTS), TrainingOptions(300)), tmp_path / name)
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_both_forms_agree(tmp_path):
    trained = train_bpe(TEXTS, TrainingOptions(300))
    files = write_trained(trained, tmp_path)
    assert sorted(path.name for path in files) == sorted(path.name for path in tmp_path.iterdir())
    again = gpt2_tokenizer(tmp_path / "vocab.json", tmp_path / "merges.txt")
    assert again.hash() == trained.hash()
    assert again.encode("newest lowest") == trained.encode("newest lowest")
    assert list(json.loads((tmp_path / "vocab.json").read_text()).values()) == list(range(trained.vocab_size))
    assert (tmp_path / "merges.txt").read_text(encoding="utf-8").startswith("#version: 0.2\n")


def test_min_frequency_limits_the_merges():
    rare = train_bpe(["abab cdcd"], TrainingOptions(400, min_frequency=3))
    assert rare.vocab_size == 257
    assert train_bpe(["abab cdcd"], TrainingOptions(400, min_frequency=2)).vocab_size > 257


def test_every_byte_is_known_whatever_the_corpus():
    tokenizer = train_bpe(["x"], TrainingOptions(257))
    text = "".join(map(chr, range(0x300))) + "中👩‍👩‍👧"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TrainingOptions(256), "256 is too small"),
        (TrainingOptions(257, special_tokens=("a", "b")), "257 is too small"),
        (TrainingOptions(300, min_frequency=0), "below 1"),
        (TrainingOptions(300, special_tokens=("a", "a")), "given twice"),
        (TrainingOptions(300, special_tokens=("",)), "is empty"),
    ],
)
def test_limits(options, message):
    with pytest.raises(DataError, match=message):
        train_bpe(TEXTS, options)


def test_without_end_of_text_there_is_no_eod():
    assert train_bpe(TEXTS, TrainingOptions(300, special_tokens=())).eod is None


@pytest.mark.parametrize("kind", ["BertWordPieceLowerCase", "BertWordPieceCase"])
def test_word_piece_files_are_berts(tmp_path, kind):
    texts = ["Low lower LOWEST", "new, newer newest!", "wide wider widest"] * 30
    trained = train_word_piece(texts, TrainingOptions(80, special_tokens=("[X]",)), type=kind)
    files = write_trained(trained, tmp_path)
    assert sorted(path.name for path in files) == sorted(path.name for path in tmp_path.iterdir())
    pieces = (tmp_path / "vocab.txt").read_text().splitlines()
    assert pieces[:6] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[X]"]
    assert trained.vocab_size == len(pieces) + 2 <= 82
    assert ("L" in pieces) == (kind == "BertWordPieceCase")
    theirs = load_tokenizer(TokenizerFiles(type=kind, vocab_file=str(tmp_path / "vocab.txt")))
    for loaded in (theirs, load_tokenizer(tmp_path)):
        assert loaded.hash() == trained.hash()
        assert loaded.encode("Lower, newest wide") == trained.encode("Lower, newest wide")
    assert trained.unk not in trained.encode("Lower, newest wide!")
    again = train_word_piece(iter(texts), TrainingOptions(80, special_tokens=("[X]",)), type=kind)
    assert again.hash() == trained.hash()


def test_sentence_piece_is_the_librarys_file_with_t5s_ids(tmp_path):
    texts = ["low lower lowest\n\nnew newer newest", "wide wider widest"] * 30
    trained = train_sentence_piece(texts, TrainingOptions(40, special_tokens=("<x>",)))
    files = write_trained(trained, tmp_path)
    assert sorted(path.name for path in files) == sorted(path.name for path in tmp_path.iterdir())
    assert (trained.pad, trained.eos, trained.unk) == (0, 1, 2)
    assert "<x>" in trained.vocabulary
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert library.encode("newer low") == trained.encode("newer low")
    assert load_tokenizer(tmp_path).hash() == trained.hash()
    assert (
        train_sentence_piece(iter(texts), TrainingOptions(40, special_tokens=("<x>",))).hash()
        == trained.hash()
    )


def test_limits_of_the_other_types():
    for train in (train_sentence_piece, partial(train_word_piece, type="BertWordPieceCase")):
        with pytest.raises(DataError, match="2 is too small"):
            train(TEXTS, TrainingOptions(2, special_tokens=()))
        with pytest.raises(DataError, match="given twice"):
            train(TEXTS, TrainingOptions(90, special_tokens=("a", "a")))
    with pytest.raises(DataError, match="no text was found"):
        train_sentence_piece(["", " \n"], TrainingOptions(90, special_tokens=()))
    with pytest.raises(DataError, match="SentencePiece cannot learn from this text"):
        train_sentence_piece(["abcdefgh ijklmnop"], TrainingOptions(6, special_tokens=()))
