"""Ids equal the `tokenizers` reference on every corpus and on random Unicode, by `encode` and by the fast path alike."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tokenizers
from megalith.data.indexed.mmap import open_indexed
from megalith.tokenizers.fast import PROBES, GigatokenEncoder, ReferenceEncoder, fast_encoder
from megalith.tokenizers.load import gpt2_tokenizer
from megalith.tokenizers.train import TrainingOptions, train_bpe
from tokenizers import decoders, models, pre_tokenizers

from . import corpora

# Any text: scalar values of every plane, with the white space and the markers that BPE splitting turns on made likely.
CHARACTERS = st.one_of(
    st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t\r'’  <|>endoftextsS12é中\u00a0\u200d")
)
TEXTS = st.text(CHARACTERS, max_size=40)


def vocabulary_folder():
    base = corpora.root()
    return base / "gpt2-vocab" if base and (base / "gpt2-vocab").is_dir() else None


@pytest.fixture(scope="module")
def gpt2():
    folder = vocabulary_folder()
    if folder is None:
        pytest.skip("real data: no gpt2-vocab in MEGALITH_DATA")
    return gpt2_tokenizer(folder / "vocab.json", folder / "merges.txt")


@pytest.fixture(scope="module")
def reference():
    """GPT-2 built by the library itself from the two files, without any special token."""
    folder = vocabulary_folder()
    if folder is None:
        pytest.skip("real data: no gpt2-vocab in MEGALITH_DATA")
    engine = tokenizers.Tokenizer(
        models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    )
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    return engine


@pytest.fixture(scope="module")
def gpt2_fast(gpt2):
    encoder, notice = fast_encoder(gpt2, [])
    assert notice == ""
    return encoder


@pytest.fixture(scope="module")
def trained():
    """A small tokenizer of our own: no real data needed."""
    text = "The cat sat on the mat; the dog's dog didn't. Été à Paris, 中文字符, 123 456.\n\n" * 20
    return train_bpe([text], TrainingOptions(400))


@pytest.fixture(scope="module")
def trained_fast(trained):
    encoder, notice = fast_encoder(trained, ["the cat"])
    assert notice == ""
    return encoder


@pytest.mark.parametrize("folder", corpora.folders() or [None])
def test_every_corpus(gpt2, gpt2_fast, reference, folder):
    if folder is None:
        pytest.skip("real data: MEGALITH_DATA is not set")
    pieces = [data for _, data in corpora.samples(corpora.root() / folder)]
    assert pieces
    ids, lengths = gpt2_fast.encode(pieces)
    rows = np.split(ids, np.cumsum(lengths))
    for piece, row in zip(pieces, rows, strict=False):
        text = piece.decode()
        expected = reference.encode(text).ids
        assert row.tolist() == expected
        assert gpt2.encode(text) == expected
        assert gpt2.decode(expected) == text
    assert gpt2.encode_batch([piece.decode() for piece in pieces]) == [row.tolist() for row in rows[:-1]]


def test_known_ids(gpt2):
    assert gpt2.encode("Hello world") == [15496, 995]
    assert (gpt2.vocab_size, gpt2.eod, gpt2.piece(15496)) == (50257, 50256, "Hello")
    assert gpt2.decode([50256]) == "<|endoftext|>"
    assert gpt2.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]


def test_megatrons_tokens_are_text_again(gpt2, real_data):
    dataset = open_indexed(real_data("megatron-fixtures") / "meg-gpt2-openwebtext_text_document")
    folder = real_data("megatron-fixtures")
    tiny = gpt2_tokenizer(folder / "gpt2-tiny-vocab.json", folder / "gpt2-tiny-merges.txt")
    for number in range(0, 1000, 100):
        item = dataset[number].tolist()
        text = tiny.decode(item[:-1])
        assert tiny.encode(text) == item[:-1]
        assert item[-1] == tiny.eod
        assert gpt2.decode(item[:-1]) == text


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts=st.lists(TEXTS, min_size=1, max_size=6))
def test_random_unicode(trained, trained_fast, texts):
    documents = [text.encode() for text in texts]
    ids, lengths = trained_fast.encode(documents)
    expected = trained.encode_batch(texts)
    assert lengths.tolist() == [len(row) for row in expected]
    assert ids.tolist() == [id for row in expected for id in row]
    for text, row in zip(texts, expected, strict=True):
        assert trained.encode(text) == row
        assert trained.decode(row) == text
        assert trained.eod not in row


def test_random_unicode_with_gpt2(gpt2, gpt2_fast, reference):
    @settings(max_examples=200, deadline=None)
    @given(texts=st.lists(TEXTS, min_size=1, max_size=6))
    def check(texts):
        ids, lengths = gpt2_fast.encode([text.encode() for text in texts])
        expected = [row.ids for row in reference.encode_batch(texts)]
        assert [row.tolist() for row in np.split(ids, np.cumsum(lengths))][:-1] == expected
        assert [gpt2.decode(row) for row in expected] == texts

    check()


@pytest.mark.parametrize("text", PROBES)
def test_probes(trained, trained_fast, text):
    assert trained_fast.encode([text.encode()])[0].tolist() == trained.encode(text)
    assert trained.decode(trained.encode(text)) == text


def test_empty_documents_keep_their_place(trained, trained_fast):
    for documents in ([], [b""], [b"", b""], [b"", b"the cat", b"", b"", b"sat", b""]):
        ids, lengths = trained_fast.encode(documents)
        expected = ReferenceEncoder(trained).encode(documents)
        assert lengths.dtype == np.int64
        assert ids.tolist() == expected[0].tolist()
        assert (
            lengths.tolist() == expected[1].tolist() == [len(trained.encode(d.decode())) for d in documents]
        )


def test_reset_keeps_the_ids_and_forgets_the_count(trained, trained_fast):
    encoder = GigatokenEncoder(trained_fast.definition)
    before = encoder.encode([b"the cat sat"])[0]
    assert encoder.encoded_bytes == 11
    encoder.reset()
    assert encoder.encoded_bytes == 0
    assert encoder.encode([b"the cat sat"])[0].tolist() == before.tolist()


def test_a_separator_inside_a_document_is_refused(trained_fast):
    with pytest.raises(ValueError, match="not valid UTF-8"):
        trained_fast.encode([b"the\xffcat"])
