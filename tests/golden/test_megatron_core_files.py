"""The writer of `torch_dist` folders, read back by torch.distributed.checkpoint alone."""

from __future__ import annotations

import io
import json
import warnings

import pytest
import torch
from torch.distributed import checkpoint as dcp

pytest.importorskip("transformers")

from tests.golden import tiny
from tests.golden.foreign_classes import megatron_installed
from tests.golden.megatron_core_files import CoreLayout, write_core
from tests.golden.megatron_facts import gpt2_facts, llama_facts
from tests.golden.whole import from_gpt2, from_llama


@pytest.mark.parametrize("layers", ["stacked", "each"])
def test_torch_assembles_the_chunks(tmp_path, layers):
    whole = from_llama(tiny.llama())
    layout = CoreLayout(tp=2, pp=2, layers=layers, place="iteration", optimizer=True)
    step = write_core(tmp_path, whole, layout, llama_facts(2, tied=False))
    reader = dcp.FileSystemReader(step)
    stored = reader.read_metadata().state_dict_metadata
    name = "decoder.layers.mlp.linear_fc1.weight"
    if layers == "each":
        name = "decoder.layers.2.mlp.linear_fc1.weight"
    assert len(stored[name].chunks) == (16 if layers == "stacked" else 4)
    assert f"optimizer.state.exp_avg.{name}" in stored
    into = {name: torch.empty(stored[name].size, dtype=torch.float64)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(into, storage_reader=reader, no_dist=True)
    read = into[name][2] if layers == "stacked" else into[name]
    assert torch.equal(read, torch.cat([whole.layers[2]["gate.weight"], whole.layers[2]["up.weight"]]))


@pytest.mark.parametrize("common", ["file", "shard"])
def test_arguments_lie_beside_or_among_the_tensors(tmp_path, common):
    step = write_core(
        tmp_path, from_gpt2(tiny.gpt2()), CoreLayout(common=common, place="iteration"), gpt2_facts()
    )
    assert json.loads((step / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
    assert len(list(step.glob("*.distcp"))) == 2
    if common == "file":
        with megatron_installed():
            content = torch.load(step / "common.pt", weights_only=False)
    else:
        at = dcp.FileSystemReader(step).read_metadata()
        where = next(info for index, info in at.storage_data.items() if index.fqn == "common_state/shard_0_1")
        raw = (step / where.relative_path).read_bytes()[where.offset : where.offset + where.length]
        with megatron_installed():
            (content,) = torch.load(io.BytesIO(raw), weights_only=False)
    assert content["args"].ckpt_format == "torch_dist"
    assert content["checkpoint_version"] == 3.0
