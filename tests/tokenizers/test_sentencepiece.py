"""SentencePiece: ids are the library's, additions are Megatron's, T5's file and Hugging Face's, bad models have one message."""

from __future__ import annotations

import gzip
import json
import pickle

import pytest
import sentencepiece

from megalith.errors import DataError
from megalith.tokenizers.base import Tokenizer
from megalith.tokenizers.config import TokenizerConfig
from megalith.tokenizers.fast import ReferenceEncoder, fast_encoder
from megalith.tokenizers.load import load_tokenizer
from megalith.tokenizers.names import TokenizerFiles

from . import corpora
from .bert import TEXT, write_model

SPECIAL_TEXT = "the <CLS> cat</s><EOD> <extra_id_0>: <s> <pad> <MASK>"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "small.model")


def open_model(path, kind="SentencePieceTokenizer", **more):
    return load_tokenizer(TokenizerFiles(type=kind, model=str(path), **more))


def library(path):
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def test_megatrons_additions_follow_the_pieces(model):
    """The trainer's default: <unk>, <s>, </s> are there, a pad is not."""
    own = library(model).get_piece_size()
    tokenizer = open_model(model, num_sentinel_tokens=2)
    assert isinstance(tokenizer, Tokenizer)
    added = ["<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>", "<extra_id_0>", "<extra_id_1>"]
    assert [tokenizer.piece(id) for id in range(own, tokenizer.vocab_size)] == added
    assert (tokenizer.unk, tokenizer.bos, tokenizer.eos) == (0, 1, 2)
    assert (tokenizer.cls, tokenizer.sep, tokenizer.eod, tokenizer.mask, tokenizer.pad) == tuple(
        range(own, own + 5)
    )
    assert tokenizer.sentinels == (own + 5, own + 6)


def test_what_a_model_has_is_not_added_again(tmp_path):
    """T5's way: pad and eos, no bos; and two of Megatron's tokens are the user's own symbols."""
    path = write_model(
        tmp_path / "t5.model",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        user_defined_symbols=["<SEP>", "<extra_id_1>"],
    )
    own = library(path).get_piece_size()
    tokenizer = open_model(path, num_sentinel_tokens=2)
    added = [tokenizer.piece(id) for id in range(own, tokenizer.vocab_size)]
    assert added == ["<CLS>", "<EOD>", "<MASK>", "<BOS>", "<extra_id_0>"]
    assert (tokenizer.pad, tokenizer.eos, tokenizer.unk) == (0, 1, 2)
    assert tokenizer.sep < own
    assert tokenizer.sentinels[0] == own + 4
    assert tokenizer.sentinels[1] < own
    special = {*tokenizer.special.values(), *tokenizer.sentinels} - {tokenizer.unk}
    text = "the<SEP>cat <extra_id_1>"
    assert special & set(library(path).encode(text)), "the library would parse them"
    assert not special & set(tokenizer.encode(text))


def test_ids_are_the_librarys(model):
    tokenizer, reference = open_model(model), library(model)
    texts = [*TEXT, "", " ", "\n\n", "  a  b ", "\u3000x\u00a0", "日本", "\x00\x01", "e\u0301", "a" * 5000]
    expected = [reference.encode(text) for text in texts]
    assert [tokenizer.encode(text) for text in texts] == tokenizer.encode_batch(texts) == expected
    ids, lengths = ReferenceEncoder(tokenizer).encode([text.encode() for text in texts])
    assert ids.tolist() == [id for row in expected for id in row]
    assert lengths.tolist() == list(map(len, expected))
    assert [tokenizer.decode(row) for row in expected] == [reference.decode(row) for row in expected]
    assert fast_encoder(tokenizer, texts) == (None, "")


def test_no_special_token_is_read_out_of_text(model):
    tokenizer = open_model(model, num_sentinel_tokens=3)
    special = {*tokenizer.special.values(), *tokenizer.sentinels} - {tokenizer.unk}
    assert not special & set(tokenizer.encode(SPECIAL_TEXT))


def test_special_tokens_are_written_out(model):
    tokenizer = open_model(model, num_sentinel_tokens=1)
    ids = [
        tokenizer.cls,
        *tokenizer.encode("the cat"),
        tokenizer.sentinels[0],
        *tokenizer.encode("sat"),
        tokenizer.eos,
    ]
    assert tokenizer.decode(ids) == "<CLS> the cat <extra_id_0> sat </s>"
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(DataError, match="outside the vocabulary"):
            tokenizer.decode([wrong])
    with pytest.raises(DataError, match="lone surrogate"):
        tokenizer.encode("\ud800")


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "GPTSentencePieceTokenizer"])
def test_saved_and_loaded_it_is_the_same(model, tmp_path, kind):
    tokenizer = open_model(model, kind, num_sentinel_tokens=4)
    tokenizer.save(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == model.read_bytes()
    for again in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert (again.type, again.hash(), again.special, again.sentinels) == (
            kind,
            tokenizer.hash(),
            tokenizer.special,
            tokenizer.sentinels,
        )
        assert again.vocabulary == tokenizer.vocabulary
        assert again.encode(TEXT[0]) == tokenizer.encode(TEXT[0])
    assert open_model(model, kind).hash() == tokenizer.hash(), "sentinels change no id of a text"
    notes = json.loads((tmp_path / "megalith_tokenizer.json").read_text())
    (tmp_path / "megalith_tokenizer.json").write_text(
        json.dumps({**notes, "added": ["<other>", *notes["added"]]})
    )
    with pytest.raises(DataError, match="was changed"):
        load_tokenizer(tmp_path)


def test_every_way_to_name_it(model, tmp_path):
    open_model(model).save(tmp_path)
    ways = [
        TokenizerConfig(type="SentencePieceTokenizer", model=str(model)),
        TokenizerConfig(library="sentencepiece", model=str(model)),
        TokenizerConfig(library="sentencepiece", type=None, model=str(model), num_sentinel_tokens=100),
        TokenizerFiles(type="SentencePieceTokenizer", file=str(model)),
        TokenizerFiles(file=str(model)),
        TokenizerFiles(file=str(tmp_path)),
    ]
    assert {load_tokenizer(way).hash() for way in ways} == {open_model(model).hash()}
    located = ways[1].located()
    assert load_tokenizer(TokenizerConfig(**located)).hash() == open_model(model).hash()


def test_the_gpt_type_adds_nothing(model):
    tokenizer = open_model(model, "GPTSentencePieceTokenizer")
    assert tokenizer.vocab_size == library(model).get_piece_size()
    assert (tokenizer.eod, tokenizer.eos, tokenizer.cls, tokenizer.sentinels) == (2, 2, None, ())


def test_the_hash_depends_on_what_makes_ids(model, tmp_path):
    other = write_model(tmp_path / "other.model", model_type="bpe", vocab_size=55)
    kinds = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer")
    hashes = {open_model(path, kind).hash() for path in (model, other) for kind in kinds}
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a SentencePiece model: it is empty"),
        (b"not a model at all", "not a SentencePiece model"),
        (b'{"model": {"type": "Unigram"}}', "not a SentencePiece model"),
        (bytes(range(256)) * 20, "not a SentencePiece model"),
        (None, "no such tokenizer file"),
    ],
)
def test_files_that_are_no_model(tmp_path, content, message):
    path = tmp_path / "x.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_model(path)
    assert caught.value.problem.where == str(path)
    assert caught.value.problem.fix


def test_damaged_models_are_one_message_or_another_tokenizer(model, tmp_path):
    """Cut anywhere, a model is refused, or is a model with fewer pieces, which the hash tells apart."""
    data = model.read_bytes()
    own = open_model(model).hash()
    for end in range(1, len(data), len(data) // 25):
        (tmp_path / "cut.model").write_bytes(data[:end])
        try:
            found = open_model(tmp_path / "cut.model").hash()
        except DataError as error:
            found = error.problem.where
        assert found
        assert found != own


def t5_model():
    return corpora.root() / "t5-vocab/spiece.reconstructed.model"


def test_t5(real_data):
    """The .model with Megatron's additions, and Hugging Face's file, whose sentinels run backwards."""
    folder = real_data("t5-vocab")
    megatron = open_model(t5_model(), num_sentinel_tokens=100)
    assert megatron.encode("Hello world") == [8774, 296]
    assert (megatron.pad, megatron.eos, megatron.unk) == (0, 1, 2)
    assert (megatron.cls, megatron.sep, megatron.eod, megatron.mask, megatron.bos) == tuple(
        range(32000, 32005)
    )
    assert megatron.sentinels == tuple(range(32005, 32105))
    theirs = load_tokenizer(folder / "t5-small-tokenizer.json")
    assert theirs.sentinels == tuple(range(32099, 31999, -1))
    assert theirs.vocab_size == 32100
    text = "It is the <extra_id_0> of times, naïve."
    assert theirs.encode(text) == megatron.encode(text)


def test_every_corpus(real_data):
    real_data("t5-vocab")
    tokenizer, reference = open_model(t5_model(), num_sentinel_tokens=100), library(t5_model())
    for folder in corpora.folders():
        texts = [data.decode() for _, data in corpora.samples(corpora.root() / folder)]
        expected = [reference.encode(text) for text in texts]
        assert tokenizer.encode_batch(texts) == expected
        assert [tokenizer.decode(row) for row in expected] == [
            " ".join(filter(None, [reference.decode(row)])) for row in expected
        ]


@pytest.mark.slow
def test_whole_corpora(real_data):
    """70 MB: every document of every corpus, through the batches of a worker."""
    real_data("t5-vocab")
    encoder, reference = ReferenceEncoder(open_model(t5_model())), library(t5_model())
    compared = 0
    for path in sorted(corpora.root().glob("corpus-*/*.jsonl.gz")):
        with gzip.open(path) as file:
            texts = [json.loads(line)["text"] for line in file]
        ids, _ = encoder.encode([text.encode() for text in texts])
        assert ids.tolist() == [id for text in texts for id in reference.encode(text)]
        compared += len(texts)
    assert compared > 12_000
