"""`--show-batch STEP` shows the very rows that the training loop is given at that step."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from rich.console import Console

from megalith.config.compose import gather, settle
from megalith.data.schedule import BatchRampUp
from megalith.errors import ConfigError, DataError
from megalith.tasks.pretrain_config import ROOTS, PretrainGPTConfig
from megalith.tasks.pretrain_data import open_data
from megalith.tasks.show_batch import consumed_before, read_rows, show
from megalith.tokenizers.load import load_tokenizer
from megalith.topology.topology import Topology

from .nano import make_corpus, overrides


@pytest.fixture
def composed(real_data, tmp_path):
    fixtures = real_data("megatron-fixtures")

    def make(*overrides):
        given = [
            f"model.data.data_prefix={fixtures}/meg-gpt2-openwebtext_text_document",
            f"model.tokenizer.vocab_file={fixtures}/gpt2-tiny-vocab.json",
            f"model.tokenizer.merge_file={fixtures}/gpt2-tiny-merges.txt",
            f"model.data.index_mapping_dir={tmp_path}",
            f"exp_manager.exp_dir={tmp_path}/runs",
            "model.encoder_seq_length=64",
            "model.micro_batch_size=2",
            "trainer.max_steps=20",
            "model.optim.sched.name=constant",
            *overrides,
        ]
        return settle(PretrainGPTConfig, gather(PretrainGPTConfig, overrides=given))

    return make


def shown(composed, step, **options):
    out = io.StringIO()
    assert show(composed, step, console=Console(file=out, width=10_000), **options) == 0
    return out.getvalue()


def test_what_is_shown_is_what_is_trained_on(composed):
    config = composed("model.rampup_batch_size=[2,2,20]", "model.data.reset_attention_mask=true")
    text = shown(config, 5, rows=100)
    tokenizer = load_tokenizer(config.config.model.tokenizer)
    data = open_data(config.config, tokenizer, Topology.single("cpu"), vocab_size=50257)
    batches = data.training(0)
    for _ in range(5):
        next(batches)
    batch = next(batches)
    batches.close()
    consumed = int(batch["sample"][0])
    assert (
        f"step 5 (0 is the first) reads samples {consumed} to {consumed + len(batch['tokens']) - 1}" in text
    )
    for tokens, number in zip(batch["tokens"], batch["sample"].tolist(), strict=True):
        assert f"sample {number} of the run" in text
        inner = tokenizer.decode(tokens[2:20].tolist()).split("<|endoftext|>")[0]
        assert inner in text
    rows = read_rows(data.training_loader(), batch["sample"].numpy())
    assert np.array_equal([row.tokens[:-1] for row in rows], batch["tokens"].numpy())


def test_a_step_behind_the_plan(composed):
    with pytest.raises(DataError, match="is not in the plan"):
        shown(composed("model.data.order=megatron"), 2000)


def test_where_a_step_begins():
    ramp = BatchRampUp.from_config([2, 2, 20], 8)
    for step in range(30):
        assert consumed_before(ramp, step, 0, 0) == ramp.consumed_at(step)
        assert consumed_before(ramp, step, 10, ramp.consumed_at(10)) == ramp.consumed_at(step)
    changed = BatchRampUp.constant(4)
    assert consumed_before(changed, 12, 10, 80) == 88
    with pytest.raises(ConfigError, match="the batch size was changed before step 10"):
        consumed_before(changed, 9, 10, 80)


@pytest.mark.parametrize(
    ("family", "more", "words"),
    [
        ("bert", (), ("of 16 tokens · halves of", "[CLS]", "are guessed")),
        ("t5", (), ("encoder:", "decoder:", "‹0›")),
        (
            "t5",
            ("model.data.dataset_type=t5_prefix_lm", "model.data.data_prefix=[{}/whole]"),
            ("encoder:", "decoder:"),
        ),
        ("bart", (), ("encoder:", "decoder:", "[MASK]")),
    ],
)
def test_other_families_rows(family, more, words, tmp_path):
    """The words of the corpus are spelled, and what is to be guessed is marked: the very rows of the loader."""
    corpus = make_corpus(tmp_path / "corpus", family)
    config = settle(
        ROOTS[family],
        gather(
            ROOTS[family],
            overrides=overrides(corpus, tmp_path / "run", *(each.format(corpus) for each in more)),
        ),
    )
    text = shown(config, 2)
    assert "step 2 (0 is the first) reads samples 8 to 11; 4 of its 4 rows:" in text
    for word in words:
        assert word in text
    tokenizer = load_tokenizer(config.config.model.tokenizer)
    data = open_data(config.config, tokenizer, Topology.single("cpu"), vocab_size=tokenizer.vocab_size)
    batches = data.training(8)
    batch = next(batches)
    batches.close()
    spelled = {tokenizer.decode([t]) for t in batch["tokens"].flatten().tolist() if t}
    assert {word for word in spelled if word.startswith("w")} <= set(re.split(r"[\s⟦⟧←=‹›]+", text))
