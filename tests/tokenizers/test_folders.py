"""Folders of transformers without tokenizer.json: a vocabulary alone is read as transformers reads it."""

from __future__ import annotations

import json
import shutil

import pytest

from megalith.errors import DataError
from megalith.tokenizers.load import load_tokenizer

TEXTS = ["The cat's nöisy — Mat!", "Hello world", "unaffable  ABC 3.14"]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "a", "b", "mat", "!", "'", "s"]


def folder(tmp_path, name, content, **settings):
    (tmp_path / name).write_bytes(content)
    if settings:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


@pytest.mark.parametrize("name", ["bert-base-uncased-vocab.txt", "bert-base-cased-vocab.txt"])
def test_a_vocabulary_of_word_pieces(tmp_path, real_data, name):
    transformers = pytest.importorskip("transformers")
    shutil.copy(real_data("bert-vocab") / name, tmp_path / "vocab.txt")
    ours = load_tokenizer(tmp_path)
    theirs = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"), do_lower_case="uncased" in name)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.vocab_size == theirs.vocab_size
    assert (ours.cls, ours.sep, ours.mask, ours.pad) == (
        theirs.cls_token_id, theirs.sep_token_id, theirs.mask_token_id, theirs.pad_token_id,
    )  # fmt: skip


def test_what_the_configuration_says_of_case_holds(tmp_path):
    content = "\n".join(PIECES).encode() + b"\n"
    assert load_tokenizer(folder(tmp_path, "vocab.txt", content)).encode("The") == [5]
    assert load_tokenizer(folder(tmp_path, "vocab.txt", content, do_lower_case=False)).encode("The") == [1]
    assert load_tokenizer(tmp_path).vocab_size == len(PIECES)


def test_a_model_of_t5_has_its_sentinels_in_their_order(tmp_path, real_data):
    transformers = pytest.importorskip("transformers")
    source = real_data("t5-vocab")
    shutil.copy(source / "spiece.reconstructed.model", tmp_path / "spiece.model")
    ours = load_tokenizer(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(source / "t5-small-tokenizer.json"))
    assert ours.vocab_size == 32100
    for number in (0, 1, 99):
        assert ours.sentinels[number] == theirs.convert_tokens_to_ids(f"<extra_id_{number}>")
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert (ours.pad, ours.eos, ours.unk, ours.eod) == (0, 1, 2, 1)


def test_added_tokens_follow_the_model(tmp_path, real_data):
    shutil.copy(real_data("t5-vocab") / "spiece.reconstructed.model", tmp_path / "tokenizer.model")
    assert load_tokenizer(tmp_path).vocab_size == 32000
    (tmp_path / "added_tokens.json").write_text('{"<two>": 32001, "<one>": 32000}')
    ours = load_tokenizer(tmp_path)
    assert (ours.piece(32000), ours.piece(32001)) == ("<one>", "<two>")
    (tmp_path / "added_tokens.json").write_text('{"<two>": 32009, "<one>": 32000}')
    with pytest.raises(DataError, match="its ids do not follow on each other"):
        load_tokenizer(tmp_path)
