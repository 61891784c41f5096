"""The catalogue says what the original documents and programs said, and agrees with itself and with the tokenizers."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import pytest

from megalith.hub.catalogue import ENTRIES, entry_of, near, vocabulary_of
from megalith.tokenizers.names import known_type

DOCUMENTED = [
    "megatron-bert-345m-cased",
    "megatron-bert-345m-uncased",
    "biomegatron-bert-345m-uncased",
    "biomegatron-bert-345m-cased",
    "megatron-gpt2-345m",
    "megatron_bert_345m_cased",
    "biomegatron345m_biovocab_50k_uncased",
]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_names_are_models(name):
    assert entry_of(name).kind == "model"


def test_names_and_places_are_of_one_thing_each():
    names = [name for entry in ENTRIES for name in (entry.name, *entry.aliases)]
    assert len(names) == len(set(names))
    urls = [file.url for entry in ENTRIES for file in entry.files]
    assert len(urls) == len(set(urls))
    for entry in ENTRIES:
        assert re.fullmatch(r"[\w.-]+", entry.name)
        assert entry.opens in ("", *(file.name for file in entry.files))
        assert not entry.vocabulary or entry_of(entry.vocabulary).kind == "vocabulary"
        for file in entry.files:
            assert urlsplit(file.url).scheme == "https"
            assert "/" not in file.name
            assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)


@pytest.mark.parametrize(
    ("name", "vocabulary"),
    [
        ("megatron-bert-uncased", "bert-large-uncased"),
        ("megatron-bert-345m-cased", "bert-large-cased"),
        ("megatron_bert_345m_cased", "bert-large-cased"),
        ("bert-base-cased", "bert-large-cased"),
        ("megatron-gpt-345m", "gpt2"),
        ("biomegatron-bert-345m-cased", "biomegatron-bert-345m-cased-vocabulary"),
    ],
)
def test_vocabularies_by_the_names_of_models(name, vocabulary):
    found = vocabulary_of(name)
    assert found.name == vocabulary
    assert found.tokenizer == known_type(name)


def test_the_archive_s_own_vocabulary_is_not_published():
    name = "biomegatron345m_biovocab_30k_cased"
    assert vocabulary_of(name) is None
    assert known_type(name) == "BertWordPieceCase"  # of a vocab_file that somebody took out of it


def test_checksums_are_those_of_the_real_files(real_data):
    import hashlib

    gpt2, bert = real_data("gpt2-vocab"), real_data("bert-vocab")
    places = {
        "gpt2": [gpt2 / "vocab.json", gpt2 / "merges.txt"],
        "bert-large-uncased": [bert / "bert-base-uncased-vocab.txt"],
        "bert-large-cased": [bert / "bert-base-cased-vocab.txt"],
    }
    for name, paths in places.items():
        for file, path in zip(entry_of(name).files, paths, strict=True):
            content = path.read_bytes()
            assert (file.bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_near_names():
    assert near("megatron-gpt2-345") == ["megatron-gpt2-345m", "megatron-gpt-345m"]
    assert near("gtp2") == ["gpt2"]
    assert near("gtp2", "model") == []
