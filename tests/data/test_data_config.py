"""The section `model.data`: NeMo's defaults, and every impossible combination with its fix."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from megalith.data.config import DataConfig


def said(**values):
    return [f"{problem.where} {problem.what} {problem.fix}" for problem in DataConfig(**values).problems()]


def test_defaults_are_nemos():
    config = DataConfig(data_prefix="a")
    assert said(data_prefix="a") == []
    expected = {
        "data_impl": "mmap",
        "splits_string": "900,50,50",
        "skip_warmup": True,
        "num_workers": 2,
        "dataloader_type": "single",
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "index_mapping_dir": None,
        "validation_drop_last": True,
        "order": "native",
    }
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, ["data_prefix", "names no files to train on", "megalith data preprocess"]),
        ({"data_prefix": "a", "train_data_path": "b"}, ["data_prefix", "train_data_path both name files"]),
        ({"valid_data_path": "b"}, ["valid_data_path", "no files to train on", "add train_data_path"]),
        ({"data_prefix": {"test": "b"}}, ["data_prefix", "no files to train on"]),
        ({"data_prefix": "a", "splits_string": "x"}, ["splits_string", "not a number", "969, 30, 1"]),
        ({"data_prefix": "a", "dataloader_type": "cyclic"}, ["dataloader_type", "order=megatron", "single"]),
        ({"train_data_path": "a", "splits_string": "1,1,1"}, ["splits_string", "has no effect"]),
    ],
)
def test_combinations(values, words):
    (problem,) = said(**values)
    for word in words:
        assert word in problem


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"data_prefix": [0.3, "a", "b"]}, "alternate"),
        ({"data_prefix": {"training": "a"}}, "train, validation, test"),
        ({"data_prefix": "a", "dataloader_type": "random"}, "single"),
        ({"data_prefix": "a", "num_workers": -1}, "greater than or equal to 0"),
    ],
)
def test_wrong_values(values, word):
    with pytest.raises(ValidationError, match=word):
        DataConfig(**values)


def test_files_of_each_split():
    shared = DataConfig(data_prefix=[1, "a", 3, "b"])
    assert shared.shared_files.paths == ("a", "b")
    assert shared.own_files("train") is None
    own = DataConfig(train_data_path="1 a 2 b", valid_data_path="c")
    assert own.shared_files is None
    assert (own.own_files("train").weights, own.own_files("validation").paths) == ((1, 2), ("c",))
    assert own.own_files("test") is None
    mapping = DataConfig(data_prefix={"train": ["a", "b"], "validation": "c"})
    assert mapping.shared_files is None
    assert mapping.own_files("train").paths == ("a", "b")


def test_reading_the_configuration_imports_no_torch():
    code = "import sys, megalith.data.config, megalith.data.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
