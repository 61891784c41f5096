"""A checkpoint of an encoder-decoder's pipeline goes on elsewhere: names are the whole model's, shared tables are stored once."""

from __future__ import annotations

import pytest

from megalith.testing.parity import layouts
from megalith.topology.sizes import Sizes
from tests.parity.test_encdec_pipeline import CASES
from tests.reshard.ranks import Leg, go, on

LAYOUTS = {**layouts(), "one": Sizes(), "pp4, one stage of the encoder": Sizes(pipeline=4, pipeline_split=1)}
RINGS = {
    "megatron": ["tp2×pp2", "one", "pp2", "pp2-interleaved×shard_all2", "tp2×pp2"],
    "t5": ["tp2+sp×pp2-interleaved", "one", "pp4, one stage of the encoder", "pp2×shard_grads2"],
}


@pytest.mark.parametrize("name", ["megatron", pytest.param("t5", marks=pytest.mark.slow)])
def test_around_a_ring_of_layouts(rank_pool, tmp_path, name):
    """Each layout loads from the one before and makes one step; one process that never stopped is the truth."""
    case, ring = CASES[name], RINGS[name]
    truth, _ = go(case, Sizes(), Leg(None, None, len(ring)))
    source = None
    for number, layout in enumerate(ring):
        leg = Leg(source, str(tmp_path / str(number)), number + 1)
        for (loss,), folder in on(rank_pool, go, LAYOUTS[layout], case, LAYOUTS[layout], leg):
            assert abs(loss - truth[number]) < 1e-10, f"step {number + 1} on {layout}"
            source = folder
