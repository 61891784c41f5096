"""Archives that we write hold, rank by rank, what straight-line code writes of the same weights; torch alone opens them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
import yaml

from megalith.checkpoint.convert.certificate import Failed
from megalith.checkpoint.convert.convert import Plan, convert
from megalith.checkpoint.convert.to_megatron import Sizes
from megalith.checkpoint.convert.verify import is_converted, problems_of_conversion
from megalith.checkpoint.foreign import open_foreign
from megalith.checkpoint.formats.nemo_archive import open_archive
from megalith.errors import CheckpointError
from tests.golden import tiny
from tests.golden.nemo_files import GPT, Layout, gpt_keys, place, state_dict, write
from tests.golden.whole import from_gpt2, from_llama


def members(path: Path) -> dict[str, bytes]:
    """Files of an uncompressed tar, read by Python's own library."""
    with tarfile.open(path, "r:") as archive:
        found = {entry.name: archive.extractfile(entry) for entry in archive if entry.isfile()}
        assert all(entry.mtime == 0 and entry.uid == 0 and not entry.uname for entry in archive)
        return {name.removeprefix("./"): file.read() for name, file in found.items() if file}


def exported(path: Path, target: Path, tp: int, pp: int) -> dict[str, bytes]:
    done = convert(path, target, Plan("nemo", Sizes(tp, pp), untrained=True))
    assert done.certificate["max_abs_logit_error"] == 0
    assert not list(target.parent.glob("*.partial"))
    return members(target)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_gpt(tmp_path, tp, pp):
    whole = from_gpt2(tiny.gpt2())
    source = write(tmp_path / "source.nemo", whole, Layout(), gpt_keys())
    found = exported(source, tmp_path / "out.nemo", tp, pp)
    layout = Layout(tp, pp)
    for stage in range(pp):
        for rank in range(tp):
            file = found.pop(place(layout, rank, stage) + "model_weights.ckpt")
            ours = torch.load(io.BytesIO(file), weights_only=True)
            assert_same(ours, state_dict(whole, layout, rank, stage), rank)
    assert sorted(found) == ["conversion.json", "model_config.yaml"]
    keys = yaml.safe_load(found["model_config.yaml"])
    assert (keys["target"], keys["nemo_version"]) == (GPT, "1.8.2")
    assert (keys["tensor_model_parallel_size"], keys["pipeline_model_parallel_size"]) == (tp, pp)
    expected = {"num_layers": tiny.LAYERS, "hidden_size": tiny.WIDTH, "bias_gelu_fusion": True}
    assert {name: keys[name] for name in expected} == expected


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], rank: int) -> None:
    """Rows of padding, 128 a rank, are nobody's."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        real = tiny.VOCABULARY - 128 * rank if len(tensor) == 128 and tensor.ndim == 2 else len(tensor)
        assert torch.equal(ours[name][: max(0, real)], tensor[: max(0, real)]), name


def test_llama_of_multi_head_attention(tmp_path):
    model = tiny.llama(tiny.HEADS)
    source = tmp_path / "llama"
    model.save_pretrained(source)
    found = exported(source, tmp_path / "out.nemo", 2, 1)
    layout = Layout(2)
    for rank in range(2):
        ours = torch.load(io.BytesIO(found[place(layout, rank, 0) + "model_weights.ckpt"]), weights_only=True)
        assert_same(ours, state_dict(from_llama(model), layout, rank, 0), rank)
    keys = yaml.safe_load(found["model_config.yaml"])
    assert keys["activation"] == "fast-swiglu"
    assert (keys["normalization"], keys["position_embedding_type"]) == ("rmsnorm", "rope")
    assert keys["nemo_version"] == "1.20.0"


def test_the_same_source_is_the_same_bytes(tmp_path):
    source = write(tmp_path / "source.nemo", from_gpt2(tiny.gpt2()), Layout(), gpt_keys())
    first, second = (exported(source, tmp_path / name / "out.nemo", 2, 1) for name in ("a", "b"))
    first.pop("conversion.json"), second.pop("conversion.json")
    assert first == second


def test_the_certificate_lists_every_member(tmp_path):
    source = write(tmp_path / "source.nemo", from_gpt2(tiny.gpt2()), Layout(container="gzip"), gpt_keys())
    found = exported(source, tmp_path / "out.nemo", 2, 2)
    certificate = json.loads(found.pop("conversion.json"))
    assert certificate["target"]["files"].keys() == found.keys()
    assert {name: file["bytes"] for name, file in certificate["target"]["files"].items()} == {
        name: len(content) for name, content in found.items()
    }
    assert certificate["source"]["files"].keys() == {str(source)}


def test_an_archive_is_verified_by_its_certificate(tmp_path):
    source = write(tmp_path / "source.nemo", from_gpt2(tiny.gpt2()), Layout(), gpt_keys())
    out = tmp_path / "out.nemo"
    exported(source, out, 2, 1)
    assert is_converted(out)
    assert not is_converted(source)
    assert problems_of_conversion(out) == []
    member = open_archive(out).members["mp_rank_01/model_weights.ckpt"]
    with open(out, "r+b") as file:
        file.seek(member.offset + member.length // 2)
        file.write(b"other")
    (problem,) = problems_of_conversion(out)
    assert problem.startswith("mp_rank_01/model_weights.ckpt: its content changed")


def test_grouped_queries_are_refused(tmp_path):
    tiny.llama(2).save_pretrained(tmp_path / "llama")
    with pytest.raises(CheckpointError, match="NeMo's own transformer has no grouped queries"):
        convert(tmp_path / "llama", tmp_path / "out.nemo", Plan("nemo", untrained=True))
    with pytest.raises(CheckpointError, match=r"an archive is called …\.nemo"):
        convert(tmp_path / "llama", tmp_path / "out", Plan("nemo", untrained=True))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["llama"]


def test_nothing_is_left_of_an_archive_that_is_another_model(tmp_path, monkeypatch):
    source = write(tmp_path / "source.nemo", from_gpt2(tiny.gpt2()), Layout(), gpt_keys())
    real = tiny.torch.Tensor.contiguous
    monkeypatch.setattr(
        "megalith.checkpoint.exported.Cut.read", lambda cut: real(torch.zeros(cut.shape, dtype=cut.dtype))
    )
    with pytest.raises(Failed):
        convert(source, tmp_path / "out.nemo", Plan("nemo", untrained=True))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["source.nemo"]


def test_a_round_trip_over_other_sizes(tmp_path):
    source = write(
        tmp_path / "source.nemo", from_gpt2(tiny.gpt2("gelu")), Layout(2, 2), gpt_keys(bias_gelu_fusion=False)
    )
    exported(source, tmp_path / "out.nemo", 4, 1)
    before, after = open_foreign(source), open_foreign(tmp_path / "out.nemo")
    assert before.config.activation == after.config.activation == "gelu_erf"
    for name, tensor in before.tensors.items():
        rows = slice(None, tiny.VOCABULARY) if name == "token_embedding.weight" else slice(None)
        assert torch.equal(tensor.read()[rows], after.tensors[name].read()[rows])
