"""The sections of BERT, T5 and BART: NeMo's names and defaults, and what they make."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from megalith.config.compose import gather, settle
from megalith.config.schema import Section, setting
from megalith.data.masked import BertMasks
from megalith.data.masked_config import BartDataConfig, BertDataConfig, T5DataConfig
from megalith.data.ngrams import Lengths
from megalith.data.shape import Shape
from megalith.data.span import PrefixMasks, SpanMasks
from tests.data.sentences import token_ids

SPANS = {
    "splits_string": "949,45,5",
    "masked_lm_prob": 0.15,
    "short_seq_prob": 0.0,
    "max_ngram_size": 10,
    "mean_ngram_size": None,
    "geometric_dist": True,
    "permutation": False,
    "whole_word_masking": True,
    "favor_longer_ngrams": False,
    "data_impl": "mmap",
    "dataloader_type": "single",
}


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (BertDataConfig, {"splits_string": "900,50,50", "masked_lm_prob": 0.15, "short_seq_prob": 0.1,
                          "reset_position_ids": False, "max_ngram_size": 3, "geometric_dist": False}),
        (T5DataConfig, {**SPANS, "seq_length_dec": 128, "dataset_type": "t5"}),
        (BartDataConfig, {**SPANS, "dataset_type": "bart", "delete_mask_prob": 0.3}),
    ],
)  # fmt: skip
def test_defaults_are_nemos(section, expected):
    config = section(data_prefix="a")
    assert {key: getattr(config, key) for key in expected} == expected
    assert list(config.problems()) == []


class Root(Section):
    data: T5DataConfig = setting(T5DataConfig, "")


def test_the_key_that_nemos_code_reads(tmp_path):
    """Its YAML says favor_longer_ngrams, its code reads favor_long_ngrams: both mean the same here."""
    typed = ["data.data_prefix=a", "data.favor_long_ngrams=true", "data.geometric_dist=false"]
    (tmp_path / "a.yaml").write_text("data: {seq_length_dec: 64}\n")
    config = settle(Root, gather(Root, config_file=tmp_path / "a.yaml", overrides=typed)).config
    assert config.data.favor_longer_ngrams
    assert config.data.lengths == Lengths(10, False, None, True)


def test_megatrons_name_of_bert():
    assert BertDataConfig(data_prefix="a", dataset_type="standard_bert").dataset_type == "bert"


@pytest.mark.parametrize(
    ("values", "where", "words"),
    [
        ({"reset_position_ids": True}, "reset_position_ids", "is for GPT"),
        ({"eod_mask_loss": True}, "eod_mask_loss", "is for GPT"),
        ({"mean_ngram_size": 3, "geometric_dist": False}, "mean_ngram_size", "geometric_dist is false"),
        ({"favor_longer_ngrams": True}, "favor_longer_ngrams", "no effect"),
        ({"dataloader_type": "cyclic"}, "dataloader_type", "cyclic is Megatron's order"),
    ],
)
def test_combinations(values, where, words):
    (problem,) = T5DataConfig(data_prefix="a", **values).problems()
    assert problem.where == where
    assert words in problem.what


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (T5DataConfig, {"dataset_type": "bart"}),
        (BartDataConfig, {"dataset_type": "t5"}),
        (BertDataConfig, {"masked_lm_prob": 0}),
        (T5DataConfig, {"masked_lm_prob": 1}),
        (T5DataConfig, {"max_ngram_size": 0}),
        (BartDataConfig, {"delete_mask_prob": 1.5}),
        (BertDataConfig, {"seq_length_dec": 10}),
    ],
)
def test_wrong_values(section, values):
    with pytest.raises(ValidationError):
        section(data_prefix="a", **values)


def test_what_they_make():
    ids = token_ids()
    bert = BertDataConfig(data_prefix="a", masked_lm_prob=0.2)
    assert bert.shape(64, binary_head=True) == Shape("bert", 61, 2, 0.1)
    assert bert.shape(64, binary_head=False) == Shape("bert", 61, 1, 0.1)
    made = bert.masks(ids, 64, binary_head=False)
    assert made == BertMasks(ids, 64, False, 0.2, True, Lengths(3))
    t5 = T5DataConfig(data_prefix="a", mean_ngram_size=3, whole_word_masking=False)
    assert t5.shape(64) == Shape("t5", 62)
    assert t5.masks(ids, 64) == SpanMasks(
        "t5", ids, 64, 128, lengths=Lengths(10, True, 3.0), whole_words=False
    )
    prefix = T5DataConfig(data_prefix="a", dataset_type="t5_prefix_lm")
    assert (prefix.shape(64).grouped, prefix.masks(ids, 64)) == (False, PrefixMasks(ids, 64))
    bart = BartDataConfig(data_prefix="a", permutation=True, delete_mask_prob=0.1)
    assert bart.shape(64) == Shape("bart", 62)
    assert bart.masks(ids, 64) == SpanMasks("bart", ids, 64, 64, permutation=True, delete_mask_prob=0.1)


def test_reading_the_configuration_imports_no_torch():
    code = "import sys, megalith.data.masked_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
