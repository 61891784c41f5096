"""The peak that a run's utilisation is measured against."""

from __future__ import annotations

from megalith.config.compose import compose
from megalith.engine.metrics import Peak
from megalith.tasks.pretrain_config import PretrainGPTConfig
from megalith.tasks.pretrain_parts import prepare
from tests.tasks.nano import make_corpus, overrides


def test_peak_tflops_gives_a_device_without_data_sheet_a_utilisation(tmp_path):
    corpus = make_corpus(tmp_path)
    for asked, expected in (([], None), (["trainer.peak_tflops=0.5"], Peak(0.5, "trainer.peak_tflops"))):
        composed = compose(PretrainGPTConfig, overrides=overrides(corpus, tmp_path / "run", *asked))
        assert prepare(composed, notice=print).meter.peak == expected
