"""A tuning run saved on one layout goes on on another: its files hold what is tuned alone, the base comes as at first."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megalith.checkpoint.native import Checkpointer, read_tensors
from megalith.testing.parity import layouts, make_engine
from megalith.topology.sizes import Sizes
from megalith.training.saving import Saver
from tests.parity import test_lora, test_prompts
from tests.reshard.ranks import Leg, on, topology_of, train

CASES = {**test_prompts.CASES, "lora": test_lora.CASES["gpt2"]}
LAYOUTS = {**layouts(), "one": Sizes()}
RINGS = {
    "gpt2": ["pp2×shard_all2", "one", "tp2+sp×pp2-interleaved", "cp2"],
    "p-tuning": ["tp2+sp", "pp2", "one", "shard_all2"],
    "t5": ["pp2", "tp2+sp", "one"],
    "lora": ["tp2+sp×shard_all2", "pp2", "one"],
}


def go_on(case, sizes: Sizes, leg: Leg) -> tuple[list[float], str]:
    """`ranks.go` with an engine that keeps what trains: all of that is other numbers before it is loaded."""
    topology = topology_of(sizes)
    engine = make_engine(case, topology)
    engine.keep = "trainable"
    saver = Saver(engine, Checkpointer(Path(leg.target or "unused"), topology), config_yaml="a: 1\n")
    if leg.source:
        with torch.no_grad():
            for parameter in engine.trainable.values():
                parameter.fill_(0.5)
        saver.load(Path(leg.source))
    losses = train(engine, case, leg.upto)
    return losses, str(saver.save()) if leg.target else ""


@pytest.mark.parametrize("name", RINGS)
def test_around_a_ring_of_layouts(rank_pool, tmp_path, name):
    case, ring = CASES[name], RINGS[name]
    truth, _ = go_on(case, Sizes(), Leg(None, None, len(ring)))
    source = None
    for number, layout in enumerate(ring):
        leg = Leg(source, str(tmp_path / str(number)), number + 1)
        for (loss,), folder in on(rank_pool, go_on, LAYOUTS[layout], case, LAYOUTS[layout], leg):
            assert abs(loss - truth[number]) < 1e-10, f"step {number + 1} on {layout}"
            source = folder
        kept = {
            tensor.name for prefix in ("model.", "optim.") for tensor in read_tensors(Path(source), prefix)
        }
        assert kept
        tuned = "|".join(case.adapt.trains).replace("^", r"^\w+\.").replace("$", r"(\.|$)")
        assert all(re.search(tuned, kept_name) for kept_name in kept)


def test_a_step_folder_is_small(tmp_path):
    """Of a model of 1.6 MB it holds the matrices and their moments."""
    case = replace(CASES["gpt2"], model=CASES["gpt2"].model.model_copy(update={"hidden_size": 64}))
    _, folder = go_on(case, Sizes(), Leg(None, str(tmp_path), 1))
    assert sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) < 24_000
