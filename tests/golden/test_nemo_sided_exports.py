"""Archives that we write of BERT, T5 and BART hold, rank by rank, what straight-line code writes of the same weights."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch
import yaml

from megalith.checkpoint.convert.convert import Plan, convert
from megalith.checkpoint.convert.to_megatron import Sizes
from megalith.errors import CheckpointError
from tests.golden import tiny, tiny_sides
from tests.golden.nemo_files import Layout, place
from tests.golden.nemo_sided_files import TARGETS, keys, sectioned, write
from tests.golden.sides import from_megatron_bert, from_pegasus


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path, "r:") as archive:
        found = {entry.name: archive.extractfile(entry) for entry in archive if entry.isfile()}
        return {name.removeprefix("./"): file.read() for name, file in found.items() if file}


@pytest.mark.parametrize(
    ("family", "tp", "pp"),
    [("bert", 1, 1), ("bert", 2, 2), ("t5", 2, 1), ("t5", 1, 2), ("bart", 2, 2)],
)
def test_every_rank_of_every_family(tmp_path, family, tp, pp):
    if family == "bert":
        whole, said = from_megatron_bert(tiny_sides.megatron_bert()), keys("bert")
    else:
        whole, said = from_pegasus(*tiny_sides.megatron_t5()), sectioned(family)
    source = write(tmp_path / "source.nemo", whole, Layout(), said)
    theirs = members(write(tmp_path / "theirs.nemo", whole, Layout(tp, pp), said, split=1))
    done = convert(source, tmp_path / "out.nemo", Plan("nemo", Sizes(tp, pp), untrained=True))
    assert done.certificate["max_abs_logit_error"] == 0
    ours = members(tmp_path / "out.nemo")
    written = yaml.safe_load(ours["model_config.yaml"])
    assert written["target"] == TARGETS[family]
    for stage in range(pp):
        for r in range(tp):
            name = place(Layout(tp, pp), r, stage) + "model_weights.ckpt"
            one, other = (torch.load(io.BytesIO(file[name]), weights_only=True) for file in (ours, theirs))
            assert one.keys() == other.keys()
            for key, tensor in other.items():
                table = len(tensor) == 128 and ("word_embeddings" in key or "head" in key)
                real = max(0, tiny.VOCABULARY - 128 * r) if table else len(tensor)
                assert torch.equal(one[key][:real], tensor[:real]), key


@pytest.mark.parametrize("model", [tiny_sides.bert, tiny_sides.t5], ids=["BERT of 2018", "T5 1.0"])
def test_other_wirings_are_refused(tmp_path, model):
    model().save_pretrained(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=r"--to nemo: .* has no place for "):
        convert(tmp_path / "theirs", tmp_path / "out.nemo", Plan("nemo", untrained=True))
    assert not (tmp_path / "out.nemo").exists()
