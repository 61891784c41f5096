"""What a family cannot be trained on, or with: one error before anything is written, which names the fix."""

from __future__ import annotations

import pytest

from megalith.errors import CheckpointError, ConfigError, DataError

from .nano import FAMILIES, make_corpus, pretrain


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    return {family: make_corpus(folder / family, family) for family in FAMILIES}


def refused(corpora, family, folder, *more, kind=ConfigError):
    """The message."""
    with pytest.raises(kind) as caught:
        pretrain(corpora[family], folder / "run", *more, steps=2)
    assert caught.value.exit_code == 2
    assert not (folder / "run").exists()
    return str(caught.value)


def test_whole_documents_for_bert(corpora, tmp_path):
    documents = f"model.data.data_prefix={corpora['gpt']}/nano"
    said = refused(corpora, "bert", tmp_path, documents, kind=DataError)
    assert "not split into sentences" in said
    assert "--split-sentences" in said


def test_documents_do_where_nothing_is_paired(corpora, tmp_path):
    """A few ids of the other tokenizer have no row here, which the loader says; in so far the documents were taken."""
    documents = [f"model.data.data_prefix={corpora['gpt']}/nano", "model.vocab_size=300"]
    code, text = pretrain(
        corpora["bert"], tmp_path / "run", *documents, "model.bert_binary_head=false", steps=1
    )
    assert code == 0
    assert "the documents are one piece each" in text
    assert "sop" not in text


@pytest.mark.parametrize("family", ["bert", "bart"])
def test_a_vocabulary_without_a_mask(corpora, tmp_path, family):
    gpt = [f"model.tokenizer.file={corpora['gpt']}/tok/tokenizer.json", "model.tokenizer.vocab_file=null"]
    assert "has no " in (said := refused(corpora, family, tmp_path, *gpt))
    assert "[MASK] token" in said
    assert "WordPiece" in said


def test_what_a_t5_asks_of_a_vocabulary(corpora, tmp_path):
    file = tmp_path / "vocab.txt"
    pieces = (corpora["t5"] / "tok/vocab.txt").read_text().splitlines()
    file.write_text("\n".join([*pieces[1:], pieces[0]]) + "\n")
    few = [
        "model.tokenizer.num_sentinel_tokens=1",
        "model.encoder_seq_length=96",
        "model.data.seq_length_dec=48",
    ]
    said = refused(corpora, "t5", tmp_path, f"model.tokenizer.vocab_file={file}", *few)
    assert "too few sentinels (<extra_id_0> …): 1, for about 3 spans in 96 tokens" in said
    assert f"its padding token has the id {len(pieces) - 1}" in said


def test_a_decoder_that_is_too_short(corpora, tmp_path):
    more = ["model.encoder_seq_length=96", "model.data.seq_length_dec=8"]
    said = refused(corpora, "t5", tmp_path, *more)
    assert "model.data.seq_length_dec: 8 is too short for what is masked: 14 of 96 tokens" in said


@pytest.mark.parametrize(
    ("family", "more", "key"),
    [
        ("bert", "model.encoder_seq_length=32", "model.encoder_seq_length"),
        ("t5", "model.data.seq_length_dec=32", "model.data.seq_length_dec"),
        ("bart", "model.encoder_seq_length=32", "model.encoder_seq_length"),
    ],
)
def test_rows_longer_than_the_position_table(corpora, tmp_path, family, more, key):
    said = refused(corpora, family, tmp_path, "model.max_position_embeddings=16", more)
    assert f"{key} (command line): 32 is longer than the position table, max_position_embeddings 16" in said


def test_sentences_for_the_prefix_language_model(corpora, tmp_path):
    said = refused(corpora, "t5", tmp_path, "model.data.dataset_type=t5_prefix_lm", kind=DataError)
    assert "without --split-sentences" in said


def test_a_checkpoint_of_another_family(corpora, tmp_path):
    pretrain(corpora["bert"], tmp_path / "bert", steps=1)
    said = refused(corpora, "t5", tmp_path, f"model.init_from={tmp_path}/bert", kind=CheckpointError)
    assert "it holds a model of the family bert, not t5" in said
    assert "megalith pretrain bert" in said


def test_a_decoder_without_pipeline_ranks(corpora, tmp_path):
    more = ["model.pipeline_model_parallel_size=2", "model.pipeline_model_parallel_split_rank=2"]
    assert "2 of 2 stages for the encoder's 2 layers" in refused(corpora, "t5", tmp_path, *more)


def test_a_preset_of_another_family(corpora, tmp_path):
    assert "megalith pretrain bert model.preset=bert-110m" in refused(
        corpora, "t5", tmp_path, "model.preset=bert-110m"
    )
