"""Looking into token files: counts, lengths, documents as text, and which tokenizer made them."""

import json

import numpy as np
import pytest

from megalith.data.indexed.builder import IndexedWriter
from megalith.data.inspect import inspect, length_statistics
from megalith.errors import DataError
from megalith.tokenizers.config import TokenizerConfig

from .indexed.corpus import TEXTS, make_pair, make_tokenizer


@pytest.fixture
def prefix(tmp_path):
    make_tokenizer(tmp_path / "tokenizer")
    return make_pair(tmp_path / "x", tmp_path / "tokenizer")


def test_documents_are_text_again_by_the_side_cars_tokenizer(prefix):
    found = inspect(prefix)
    assert [sample.text for sample in found.samples] == [text + "<|endoftext|>" for text in TEXTS]
    assert found.notices == []
    assert [sample.document for sample in inspect(prefix, documents=[2, 0]).samples] == [2, 0]


def test_everything_is_json(prefix):
    values = json.loads(json.dumps(inspect(prefix).as_dict()))
    assert (values["layout"], values["dtype"], values["documents"]) == ("MMIDIDX", "uint16", 3)
    assert values["tokens"] == sum(len(sample["ids"]) for sample in values["samples"])
    assert values["side_car"]["tokenizer"]["type"] == "GPT2BPETokenizer"


def test_sentences_of_a_document_are_joined(tmp_path):
    with IndexedWriter(tmp_path / "x", np.int32) as writer:
        writer.add_block(np.arange(6), np.array([1, 2, 3]), np.array([2, 1]))
    assert [sample.ids for sample in inspect(tmp_path / "x").samples] == [[0, 1, 2], [3, 4, 5]]


def test_without_a_tokenizer_ids_only(prefix):
    prefix.with_name("x.meta.json").unlink()
    found = inspect(prefix)
    assert found.samples[0].text is None
    assert "no tokenizer is known" in found.notices[0]


def test_a_tokenizer_that_moved_or_changed(prefix, tmp_path):
    (tmp_path / "tokenizer").rename(tmp_path / "away")
    assert "cannot be opened" in inspect(prefix).notices[0]
    given = inspect(prefix, tokenizer=TokenizerConfig(file=str(tmp_path / "away")))
    assert given.samples[0].text.startswith(TEXTS[0])
    assert given.notices == []
    make_tokenizer(tmp_path / "tokenizer", 270)
    changed = inspect(prefix)
    assert (changed.samples[0].text, len(changed.notices)) == (None, 1)
    assert "have changed" in changed.notices[0]


def test_another_tokenizer_is_noticed(prefix, tmp_path):
    make_tokenizer(tmp_path / "other", 258)
    found = inspect(prefix, tokenizer=TokenizerConfig(file=str(tmp_path / "other")))
    assert "not the tokenizer that made these" in found.notices[0]
    assert any("outside the vocabulary" in notice for notice in found.notices)


def test_a_document_that_is_not_there(prefix):
    for number in (3, -1):
        with pytest.raises(DataError, match="documents go from 0 to 2"):
            inspect(prefix, documents=[number])


def test_empty_files(tmp_path):
    IndexedWriter(tmp_path / "x", np.uint16).finish()
    found = inspect(tmp_path / "x")
    assert (found.samples, found.lengths) == ([], {})
    with pytest.raises(DataError, match="it is empty"):
        inspect(tmp_path / "x", documents=[0])


def test_length_statistics():
    values = length_statistics(np.array([0, 10, 20, 30, 1000], np.int32))
    assert values == {
        "min": 0,
        "mean": 212.0,
        "p10": 0,
        "p50": 20,
        "p90": 1000,
        "p99": 1000,
        "max": 1000,
        "empty": 1,
    }
