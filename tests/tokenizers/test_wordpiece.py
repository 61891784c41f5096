"""BERT's WordPiece: ids are Hugging Face's, additions are Megatron's, bad vocabularies have one message each."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from megalith.errors import DataError
from megalith.tokenizers import fast, words
from megalith.tokenizers.base import Tokenizer
from megalith.tokenizers.config import TokenizerConfig
from megalith.tokenizers.fast import ReferenceEncoder, fast_encoder
from megalith.tokenizers.load import load_tokenizer
from megalith.tokenizers.names import TokenizerFiles

from . import corpora
from .bert import pieces, write_vocabulary

CASES = {"uncased": "BertWordPieceLowerCase", "cased": "BertWordPieceCase"}
SPECIAL_TEXT = "the [MASK] cat[SEP] [UNK] <extra_id_0> [BOS] [PAD]"


@pytest.fixture
def vocab_file(tmp_path):
    return write_vocabulary(tmp_path / "vocab.txt")


def bert(vocab_file, kind="BertWordPieceLowerCase", **more):
    return load_tokenizer(TokenizerFiles(type=kind, vocab_file=str(vocab_file), **more))


def real(case, **more):
    return bert(corpora.root() / f"bert-vocab/bert-base-{case}-vocab.txt", CASES[case], **more)


def theirs(case):
    """`transformers`' own tokenizer; special tokens in text are split like any text."""
    import transformers

    path = corpora.root() / f"bert-vocab/bert-base-{case}-vocab.txt"
    return transformers.BertTokenizer(str(path), do_lower_case=case == "uncased", split_special_tokens=True)


@pytest.mark.parametrize("extra_ids", [0, 3])
def test_megatrons_additions_follow_the_vocabulary(vocab_file, extra_ids):
    tokenizer = bert(vocab_file, num_sentinel_tokens=extra_ids)
    own = len(pieces())
    assert isinstance(tokenizer, Tokenizer)
    assert [tokenizer.piece(own + n) for n in range(2 + extra_ids)] == [
        "[BOS]",
        "[EOS]",
        *(f"<extra_id_{n}>" for n in range(extra_ids)),
    ]
    assert tokenizer.vocab_size == own + 2 + extra_ids
    assert tokenizer.sentinels == tuple(range(own + 2, own + 2 + extra_ids))
    assert (tokenizer.pad, tokenizer.unk, tokenizer.cls, tokenizer.sep, tokenizer.mask) == (0, 1, 2, 3, 4)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.eod) == (own, own + 1, None)


def test_a_special_token_of_the_vocabulary_is_not_added_again(tmp_path):
    path = write_vocabulary(tmp_path / "v.txt", [*pieces(), "<extra_id_1>", "[EOS]"])
    tokenizer = bert(path, num_sentinel_tokens=2)
    own = len(pieces())
    assert (tokenizer.eos, tokenizer.bos) == (own + 1, own + 2)
    assert tokenizer.sentinels == (own + 3, own)


def test_saved_and_loaded_it_is_the_same(vocab_file, tmp_path):
    for kind in CASES.values():
        tokenizer = bert(vocab_file, kind, num_sentinel_tokens=5)
        tokenizer.save(tmp_path / kind)
        again = load_tokenizer(tmp_path / kind)
        assert (again.type, again.hash(), again.special, again.sentinels, again.vocab_size) == (
            kind,
            tokenizer.hash(),
            tokenizer.special,
            tokenizer.sentinels,
            tokenizer.vocab_size,
        )
        assert again.eod is None
        assert again.encode("The Cats sat") == tokenizer.encode("The Cats sat")
    assert bert(vocab_file).hash() == bert(vocab_file, num_sentinel_tokens=5).hash()
    assert bert(vocab_file).hash() != bert(vocab_file, "BertWordPieceCase").hash()


def test_rules_of_bert(vocab_file):
    tokenizer = bert(vocab_file)

    def encoded(text):
        return [tokenizer.piece(id) for id in tokenizer.encode(text)]

    assert encoded("The CATS, unable!") == ["the", "cat", "##s", ",", "un", "##able", "!"]
    assert encoded("café\x00中 " + "a" * 101) == ["c", "##a", "##f", "##e", "中", "[UNK]"]
    assert tokenizer.decode(tokenizer.encode("The cats sat on, a mat.")) == "the cats sat on, a mat."
    assert tokenizer.decode([tokenizer.cls, tokenizer.mask, tokenizer.sep]) == "[CLS] [MASK] [SEP]"


def test_no_special_token_is_read_out_of_text(vocab_file):
    tokenizer = bert(vocab_file, num_sentinel_tokens=2)
    special = {*tokenizer.special.values(), *tokenizer.sentinels} - {tokenizer.unk}
    assert not special & set(tokenizer.encode(SPECIAL_TEXT))
    encoder, notice = fast_encoder(tokenizer, [SPECIAL_TEXT])
    assert notice == ""
    assert encoder.encode([SPECIAL_TEXT.encode()])[0].tolist() == tokenizer.encode(SPECIAL_TEXT)


@pytest.mark.parametrize(
    "name", ["megatron-bert-{}", "megatron-bert-345m-{}", "megatron_bert_345m_{}", "bert-large-{}"]
)
def test_names_of_models(vocab_file, name, tmp_path, monkeypatch):
    monkeypatch.setenv("MEGALITH_HOME", str(tmp_path))
    for case, kind in CASES.items():
        config = TokenizerConfig(type=name.format(case), vocab_file=str(vocab_file))
        assert list(config.problems()) == []
        assert load_tokenizer(config).type == kind
        with pytest.raises(
            DataError, match=f"the vocabulary bert-large-{case} is not on this machine"
        ) as caught:
            load_tokenizer(TokenizerConfig(type=name.format(case)))
        assert f"megalith hub download bert-large-{case}" in caught.value.problem.fix
        with pytest.raises(DataError, match="needs vocab_file") as caught:
            load_tokenizer(TokenizerConfig(type=kind))
        assert f"--tokenizer-type megatron-bert-{case}" in caught.value.problem.fix


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        (b"", ["line 1 is empty", "it has no [PAD], [UNK], [CLS], [SEP], [MASK]"]),
        ("\n".join(pieces()[2:]).encode(), ["it has no [PAD], [UNK]"]),
        ("\n".join([*pieces(), "cat"]).encode(), [r"'cat' is on line 7 and again on line"]),
        (b"\xef\xbb\xbf" + "\n".join(pieces()).encode(), ["byte order mark", "it has no [PAD]"]),
        ("\n".join(pieces()).encode("utf-16"), ["not a text file: byte 0 is not UTF-8"]),
        ("\n".join([*pieces(), "caf\xe9"]).encode("latin-1", "replace"), ["is not UTF-8"]),
        ("\n".join([*pieces()[:9], "", *pieces()[9:]]).encode(), ["line 10 is empty"]),
        ("\n".join(f"{piece}\t1" for piece in pieces()).encode(), ["line 1 has white space inside"]),
        (b'{"the": 0}', ["JSON, not a WordPiece vocabulary"]),
    ],
)
def test_bad_vocabularies(tmp_path, content, messages):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(DataError) as caught:
        bert(tmp_path / "vocab.txt")
    assert caught.value.problem.fix
    assert caught.value.problem.where == str(tmp_path / "vocab.txt")
    for message in messages:
        assert message in str(caught.value)


def test_windows_line_ends_are_read(tmp_path, vocab_file):
    (tmp_path / "windows.txt").write_bytes(vocab_file.read_bytes().replace(b"\n", b"\r\n"))
    assert bert(tmp_path / "windows.txt").hash() == bert(vocab_file).hash()


def test_wrong_files_are_named(vocab_file):
    with pytest.raises(DataError, match="BertWordPieceCase has no merges"):
        load_tokenizer(TokenizerFiles(type="BertWordPieceCase", vocab_file="v", merge_file="m"))
    with pytest.raises(DataError, match="without merges") as caught:
        load_tokenizer(TokenizerFiles(vocab_file=str(vocab_file)))
    assert "BertWordPieceLowerCase" in caught.value.problem.fix
    with pytest.raises(DataError, match="no such file"):
        bert(vocab_file.with_name("none.txt"))


def test_without_tokie_the_reference_does_the_work(vocab_file, monkeypatch):
    monkeypatch.setattr(words, "tokie", None)
    encoder, notice = fast.unchecked_encoder(bert(vocab_file))
    assert encoder is None
    assert "tokie is not installed" in notice


def real_texts(folder):
    return [data.decode() for _, data in corpora.samples(corpora.root() / folder)][:3]


@pytest.mark.parametrize("case", list(CASES))
def test_every_corpus(case, real_data):
    """Samples of every folder: `transformers`, our reference and the fast path agree."""
    real_data("bert-vocab")
    tokenizer, reference = real(case, num_sentinel_tokens=100), theirs(case)
    encoder, notice = fast_encoder(tokenizer, [])
    assert notice == ""
    for folder in corpora.folders():
        texts = real_texts(folder)
        expected = reference(texts, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode_batch(texts) == expected
        ids, lengths = encoder.encode([text.encode() for text in texts])
        assert lengths.tolist() == [len(row) for row in expected]
        assert ids.tolist() == [id for row in expected for id in row]
        for row in expected[:2]:
            assert tokenizer.decode(row) == reference.decode(row, clean_up_tokenization_spaces=False)


def test_known_ids(real_data):
    real_data("bert-vocab")
    assert real("uncased").encode("Hello world") == [7592, 2088]
    assert real("cased").encode("Hello world") == [8667, 1362]
    assert (real("uncased").vocab_size, real("cased").vocab_size) == (30524, 28998)
    assert real("uncased", num_sentinel_tokens=100).vocab_size == 30624


def documents(*folders):
    for folder in folders:
        for path in sorted((corpora.root() / folder).glob("*.jsonl.gz")):
            with gzip.open(path) as file:
                yield from (json.loads(line)["text"] for line in file)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_whole_corpora(case, real_data):
    """70 MB: every document of every corpus."""
    real_data("bert-vocab")
    tokenizer, reference = real(case), theirs(case)
    encoder, _ = fast_encoder(tokenizer, [])
    folders = [path.name for path in corpora.root().glob("corpus-*") if path.is_dir()]
    compared = 0
    for text in documents(*folders):
        expected = reference(text, add_special_tokens=False, verbose=False)["input_ids"]
        assert encoder.encode([text.encode()])[0].tolist() == expected
        compared += 1
    assert compared > 12_000


def test_the_reference_encoder_counts_as_the_fast_one(vocab_file):
    tokenizer = bert(vocab_file)
    encoder, _ = fast_encoder(tokenizer, [])
    texts = [b"", b"the cat", b" \n", "a \u0378 mat".encode(), b"", "\U0010fffe".encode()]
    for batch in ([], [b""], texts):
        ids, lengths = encoder.encode(batch)
        expected = ReferenceEncoder(tokenizer).encode(batch)
        assert ids.tolist() == expected[0].tolist()
        assert lengths.dtype == np.int64
        assert lengths.tolist() == expected[1].tolist()
