"""Folders of torch's distributed checkpoints and of megatron-core's torch_dist, against what was saved."""

from __future__ import annotations

import io
import json
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megalith.checkpoint.pickles.distributed import is_distributed, open_distributed
from megalith.errors import CheckpointError

from .helpers import assert_same, raw


def test_what_torch_saves_is_read(tmp_path):
    model = torch.nn.Linear(3, 4)
    saved = {
        "model": model.state_dict(),
        "n": {"b": torch.arange(5), "step": 3, "text": "é"},
        "half": torch.ones(2, 3).half().t(),
    }
    dcp.save(saved, checkpoint_id=tmp_path / "x", no_dist=True)
    assert is_distributed(tmp_path / "x")
    assert not is_distributed(tmp_path)
    found = open_distributed(tmp_path / "x")
    assert_same(
        {
            "model.weight": model.weight,
            "model.bias": model.bias,
            "n.b": saved["n"]["b"],
            "half": saved["half"],
        },
        found.tensors,
    )
    assert dict(found.objects) == {"n.step": 3, "n.text": "é"}
    assert (found.common, found.settings) == (None, {})


def chunked(folder, tensors, objects=(), *, fail=None):
    """A folder of two .distcp files as several processes write it: each chunk a torch file at an offset."""
    folder.mkdir()
    streams = [io.BytesIO(b"") for _ in range(2)]
    entries, storage = {}, {}

    def put(key, value):
        stream = streams[len(storage) % 2]
        start = stream.tell()
        torch.save(value, stream)
        storage[key] = _StorageInfo(f"__{len(storage) % 2}_0.distcp", start, stream.tell() - start)

    for name, value in dict(objects).items():
        put(MetadataIndex(name), value)
        entries[name] = BytesStorageMetadata()
    for name, (tensor, places) in tensors.items():
        chunks = []
        for number, place in enumerate(places):
            index = tuple(slice(a, b) for a, b in place)
            offsets, sizes = torch.Size(a for a, _ in place), torch.Size(b - a for a, b in place)
            piece = tensor[index]
            put(
                MetadataIndex(name, offsets, number),
                piece.t().contiguous().t()
                if number % 2 and piece.dim() == 2 and fail is None
                else piece.clone(),
            )
            chunks.append(ChunkStorageMetadata(offsets, sizes))
        entries[name] = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, chunks)
    for number, stream in enumerate(streams):
        (folder / f"__{number}_0.distcp").write_bytes(stream.getvalue())
    if fail is not None:
        fail(entries, storage)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(entries, None, storage)))


GRID = [((a, a + 1), (b, b + 2), (0, 4)) for a in range(3) for b in (0, 2)]


def test_megatron_core_folders(tmp_path):
    """Layers stacked as a further dim, a chunk a layer and tensor-parallel part; extra state as bytes; common.pt."""
    stacked = torch.randn(3, 4, 4)
    flat = torch.randn(10, 3)
    places = {
        "decoder.layers.mlp.weight": (stacked, GRID),
        "word": (flat, [((0, 5), (0, 3)), ((5, 10), (0, 3))]),
    }
    objects = {
        "decoder.layers.self_attention.core_attention._extra_state/shard_0_3": [io.BytesIO(b"state")],
        "rng/shard_0.0_1.1": [{"seed": 1}],
    }
    chunked(tmp_path / "x", places, objects)
    torch.save({"iteration": 7, "checkpoint_version": 3.0}, tmp_path / "x/common.pt")
    (tmp_path / "x/metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    found = open_distributed(tmp_path / "x")
    assert_same({name: tensor for name, (tensor, _) in places.items()}, found.tensors)
    layer = found.tensors["decoder.layers.mlp.weight"].rows(1, 2)
    assert raw(layer[0]) == raw(stacked[1])
    assert found.common["iteration"] == 7
    assert found.settings["sharded_backend"] == "torch_dist"
    assert found.objects["rng/shard_0.0_1.1"] == [{"seed": 1}]
    (state,) = found.objects["decoder.layers.self_attention.core_attention._extra_state/shard_0_3"]
    assert (state.name, state.state[0]) == ("BytesIO", b"state")


def _of(entries, name="a"):
    return entries[name]


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        (lambda entries, storage: _of(entries).chunks.pop(), "4 of 8 elements"),
        (lambda entries, storage: setattr(_of(entries), "size", torch.Size([8, 2])), "of 16 elements"),
        (lambda entries, storage: setattr(_of(entries).properties, "dtype", torch.float64), "not torch.float64"),
        (lambda entries, storage: setattr(_of(entries).chunks[0], "sizes", torch.Size([3, 2])), r"not torch.float32 \[3, 2\]"),
        (lambda entries, storage: storage.clear(), "malformed"),
        (lambda entries, storage: [setattr(i, "relative_path", "../x") for i in storage.values()], "no file of its folder"),
        (lambda entries, storage: [setattr(i, "relative_path", "/etc/passwd") for i in storage.values()], "no file of its folder"),
        (lambda entries, storage: [setattr(i, "offset", 1 << 40) for i in storage.values()], "truncated"),
        (lambda entries, storage: [setattr(i, "length", i.length - 5) for i in storage.values()], "truncated|goes on|zip"),
        (lambda entries, storage: [setattr(i, "transform_descriptors", ["zstd"]) for i in storage.values()], "transformed"),
        (lambda entries, storage: entries.update(a=3), "is expected"),
    ],
)  # fmt: skip
def test_metadata_that_lies_is_found_out(tmp_path, fail, words):
    chunked(tmp_path / "x", {"a": (torch.randn(4, 2), [((0, 2), (0, 2)), ((2, 4), (0, 2))])}, fail=fail)
    with pytest.raises(CheckpointError, match=words):
        open_distributed(tmp_path / "x")


def test_other_backends_are_refused_by_name(tmp_path):
    chunked(tmp_path / "x", {})
    (tmp_path / "x/metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(CheckpointError, match="'zarr', torch_dist is read"):
        open_distributed(tmp_path / "x")
    (tmp_path / "x/metadata.json").write_text("[")
    with pytest.raises(CheckpointError, match="not JSON"):
        open_distributed(tmp_path / "x")


def test_an_object_that_is_refused_leaves_the_tensors_readable(tmp_path):
    import os

    class Hostile:
        def __reduce__(self):
            return os.system, ("touch canary",)

    chunked(tmp_path / "x", {"a": (torch.ones(2), [((0, 2),)])}, {"o": Hostile()})
    found = open_distributed(tmp_path / "x")
    assert_same({"a": torch.ones(2)}, found.tensors)
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        found.objects["o"]
