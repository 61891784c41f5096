"""A checkpoint of a BERT, T5 or BART is refused by its name where only a GPT can be read: by generation and by converters."""

from __future__ import annotations

import pytest

from megalith.checkpoint.convert.source import open_source
from megalith.checkpoint.native import Checkpointer
from megalith.errors import CheckpointError, UnsupportedError
from megalith.generate.loading import load_model
from megalith.models.family import FAMILIES, describe
from megalith.parallel.apply import build
from megalith.topology.topology import Topology


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt"])
def test_refused_by_name(family, tmp_path):
    model_class, config_class = FAMILIES[family]
    config = config_class(vocab_size=50, num_layers=1, hidden_size=16, num_attention_heads=2)
    (model,) = build(model_class, config, Topology.single("cpu"), seed=1)
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    state = {"step": 1, "seed": 1, **describe(family, config)}
    Checkpointer(tmp_path / "checkpoints", Topology.single("cpu")).save(1, tensors, state, config_yaml="")
    with pytest.raises(CheckpointError, match=f"is a {family.upper()}") as caught:
        load_model(tmp_path)
    with pytest.raises(UnsupportedError, match=f"is a {family.upper()}"):
        open_source(tmp_path)
    assert "GPT" in caught.value.problem.fix
