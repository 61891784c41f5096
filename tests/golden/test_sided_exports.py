"""What `checkpoint convert` writes of BERT, T5 and BART, read by `transformers`: the same answers to 1e-10 in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from megalith.checkpoint.convert.convert import Plan, convert
from megalith.checkpoint.convert.to_megatron import Sizes
from tests.golden import tiny_sides

MODELS = {
    "bert": (tiny_sides.bert, transformers.AutoModelForPreTraining),
    "bert-masked": (partial(tiny_sides.bert, kind=transformers.BertForMaskedLM), transformers.AutoModelForMaskedLM),
    "megatron-bert": (partial(tiny_sides.megatron_bert, "gelu", "gelu"), transformers.AutoModelForPreTraining),
    "t5": (tiny_sides.t5, transformers.AutoModelForSeq2SeqLM),
    "t5-1.1": (partial(tiny_sides.t5, "gated-gelu", untied=True), transformers.AutoModelForSeq2SeqLM),
    "bart": (tiny_sides.bart, transformers.AutoModelForSeq2SeqLM),
    "bart-bias": (partial(tiny_sides.bart, bias=True), transformers.AutoModelForSeq2SeqLM),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_it(tmp_path, name):
    """Hugging Face → native → Hugging Face, a BERT of Megatron's wiring by way of Megatron's files."""
    make, loader = MODELS[name]
    model = make()
    model.save_pretrained(tmp_path / "0")
    folder = convert(tmp_path / "0", tmp_path / "1", Plan("native")).folder
    if name == "megatron-bert":
        folder = convert(folder, tmp_path / "2", Plan("megatron", Sizes(2, 2), megatron_version=1)).folder
    done = convert(folder, tmp_path / "3", Plan("huggingface"))
    assert done.certificate["read_back_by"].startswith("transformers ")
    back, report = loader.from_pretrained(done.folder, dtype=torch.float64, output_loading_info=True)
    assert not any(report.values()), report
    back = tiny_sides.wide_norms(back.eval())
    for mine, theirs in zip(tiny_sides.answers(back), tiny_sides.answers(model), strict=True):
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() <= 1e-10
