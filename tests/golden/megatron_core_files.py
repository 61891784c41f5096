"""megatron-core's `torch_dist` folders from the weights of a tiny model, written with torch.distributed.checkpoint itself.

Every tensor is one tensor of the whole model under one name, stored in the chunks that the ranks of TP × PP hold. Names after
megatron/core/dist_checkpointing: layers lie along a leading axis of one tensor, or (heterogeneous layers) under one name each;
both layer specifications end in the names of Transformer Engine's.
"""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from tests.golden.cuts import padded_table, query_key_value
from tests.golden.foreign_classes import arguments, megatron_installed
from tests.golden.whole import Tensors, Whole


@dataclass(frozen=True)
class CoreLayout:
    """`layers`: "stacked" or "each"; `common`: "file" (common.pt) or "shard" (an object among the tensors, today's form)."""

    tp: int = 1
    pp: int = 1
    layers: str = "stacked"
    common: str = "file"
    dtype: torch.dtype = torch.float64
    place: str = "root"
    optimizer: bool = False
    split_gate: bool = False


class Chunks:
    """A tensor as the planner of torch.distributed.checkpoint sees it when several ranks hold it: cut into equal boxes."""

    def __init__(self, tensor: torch.Tensor, cuts: tuple[int, ...]) -> None:
        self.tensor = tensor
        self.box = tuple(size // cut for size, cut in zip(tensor.shape, cuts, strict=True))
        places = product(*(range(cut) for cut in cuts))
        self.offsets = [tuple(i * size for i, size in zip(at, self.box, strict=True)) for at in places]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.tensor.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, torch.Size(offset)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(offset), torch.Size(self.box)),
                    properties=properties,
                    size=self.tensor.shape,
                ),
            )
            for offset in self.offsets
        ]

    def at(self, offset: torch.Size) -> torch.Tensor:
        """The box there, as memory of its own."""
        box = tuple(slice(at, at + size) for at, size in zip(offset, self.box, strict=True))
        return self.tensor[box].clone(memory_format=torch.contiguous_format)


class Planner(DefaultSavePlanner):
    """Finds the boxes of `Chunks`, and adds what megatron-core keeps in the metadata for itself."""

    def lookup_object(self, index):
        found = self.state_dict[index.fqn]
        return found.at(index.offset) if isinstance(found, Chunks) else found

    def create_global_plan(self, plans):
        plan, metadata = super().create_global_plan(plans)
        metadata.mcore_data = {name: {} for name in metadata.state_dict_metadata}
        return plan, metadata


def write_core(folder: Path, whole: Whole, layout: CoreLayout, facts: dict[str, object]) -> Path:
    """Writes a root with its tracker, and returns the root or, with `place` "iteration", the iteration's folder."""
    whole = whole.to(layout.dtype)
    step = folder / "iter_0000010"
    step.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("10")
    state: dict[str, object] = dict(model_tensors(whole, layout))
    if layout.optimizer:
        names = list(state)
        for kind in ("fp32_param", "exp_avg", "exp_avg_sq"):
            for name in names:
                chunks = state[name]
                assert isinstance(chunks, Chunks)
                state[f"optimizer.state.{kind}.{name}"] = Chunks(
                    chunks.tensor.float() * 3, tuple(1 for _ in chunks.box)
                )
    state |= objects(whole, layout)
    with megatron_installed() as classes:
        sizes = {
            "tensor_model_parallel_size": layout.tp,
            "pipeline_model_parallel_size": layout.pp,
            "padded_vocab_size": len(padded_table(whole.word, layout.tp)),
            "use_dist_ckpt": True,
            "ckpt_format": "torch_dist",
        }
        common = {
            "args": arguments(classes, layout.dtype, facts | sizes),
            "checkpoint_version": 3.0,
            "iteration": 10,
            "num_floating_point_operations_so_far": 0,
            "opt_param_scheduler": {"max_lr": 1e-4, "num_steps": 320},
        }
        if layout.common == "file":
            torch.save(common, step / "common.pt")
        else:
            state["common_state/shard_0_1"] = [common]
        writer = dcp.FileSystemWriter(
            step, thread_count=2, sync_files=False
        )  # two files, as megatron-core's ranks write
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.save(state, storage_writer=writer, planner=Planner(flatten_state_dict=False), no_dist=True)
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    if layout.common == "file":
        config |= {"common_backend": "torch", "common_backend_version": 1}
    (step / "metadata.json").write_text(json.dumps(config))
    return folder if layout.place == "root" else step


def objects(whole: Whole, layout: CoreLayout) -> dict[str, object]:
    """What is no tensor: states of Transformer Engine and of random numbers, each a list of what one rank holds."""
    out: dict[str, object] = {}
    linears = ("self_attention.core_attention", "self_attention.linear_qkv", "mlp.linear_fc1")
    count = len(whole.layers)
    for number in range(count):
        for linear in linears:
            if layout.layers == "stacked":
                out[f"decoder.layers.{linear}._extra_state/shard_{number}_{count}"] = [io.BytesIO(b"state")]
            else:
                out[f"decoder.layers.{number}.{linear}._extra_state/shard_0_1"] = [io.BytesIO(b"state")]
    out["rng_state/shard_0.0_1.1"] = [[{"torch_rng_state": torch.Generator().get_state()}]]
    return out


def model_tensors(whole: Whole, layout: CoreLayout) -> dict[str, Chunks]:
    """Every tensor of the whole model under megatron-core's name, in the chunks that TP × PP ranks hold."""
    tp = layout.tp
    out = {"embedding.word_embeddings.weight": Chunks(padded_table(whole.word, tp), (tp, 1))}
    if whole.position is not None:
        out["embedding.position_embeddings.weight"] = Chunks(whole.position, (1, 1))
    for kind, tensor in whole.final_norm.items():
        out[f"decoder.final_layernorm.{kind}"] = Chunks(tensor, (1,))
    if whole.output is not None:
        out["output_layer.weight"] = Chunks(padded_table(whole.output, tp), (tp, 1))

    layers = [core_layer(whole, layer, layout.split_gate) for layer in whole.layers]
    for name in layers[0]:
        cut = [1] * layers[0][name].ndim
        if name in ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight"):
            cut[1] = tp
        elif name.startswith(("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias")):
            cut[0] = tp
        elif name == "mlp.linear_fc1.weight" and "gate.weight" in whole.layers[0] and not layout.split_gate:
            cut[0] = 2 * tp  # every rank's gates and ups are chunks of their own
        elif name.startswith(("mlp.linear_fc1.weight", "mlp.linear_fc1.bias")):
            cut[0] = tp
        if layout.layers == "stacked":
            stacked = torch.stack([layer[name] for layer in layers])
            out[f"decoder.layers.{name}"] = Chunks(stacked, (len(layers), *cut))
        else:
            for number, layer in enumerate(layers):
                out[f"decoder.layers.{number}.{name}"] = Chunks(layer[name], tuple(cut))
    return out


def core_layer(whole: Whole, layer: Tensors, split_gate: bool) -> Tensors:
    """One whole layer. All gates lie before all ups, whatever TP is; `split_gate`: under names of their own."""
    out: Tensors = {}
    for kind in ("weight", "bias"):
        if f"norm1.{kind}" in layer:
            out[f"self_attention.linear_qkv.layer_norm_{kind}"] = layer[f"norm1.{kind}"]
            out[f"mlp.linear_fc1.layer_norm_{kind}"] = layer[f"norm2.{kind}"]
        if f"q.{kind}" in layer:
            out[f"self_attention.linear_qkv.{kind}"] = query_key_value(whole, layer, kind, 3.0, 1, 0)
            out[f"self_attention.linear_proj.{kind}"] = layer[f"proj.{kind}"]
            out[f"mlp.linear_fc2.{kind}"] = layer[f"down.{kind}"]
            if f"gate.{kind}" not in layer:
                out[f"mlp.linear_fc1.{kind}"] = layer[f"up.{kind}"]
            elif split_gate:
                out[f"mlp.linear_fc1.{kind}_w"] = layer[f"gate.{kind}"]
                out[f"mlp.linear_fc1.{kind}_v"] = layer[f"up.{kind}"]
            else:
                out[f"mlp.linear_fc1.{kind}"] = torch.cat([layer[f"gate.{kind}"], layer[f"up.{kind}"]])
    return out
