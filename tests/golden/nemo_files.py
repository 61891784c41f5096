"""NeMo's archives in every layout that it ever wrote, from the weights of a tiny model.

Straight-line on purpose: the golden that the readers of `megalith.checkpoint` are held to must not share their tables.
"""

from __future__ import annotations

import io
import tarfile
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from tests.golden.cuts import columns, first_linear, padded_table, query_key_value, rows
from tests.golden.tiny import HEADS, LAYERS, POSITIONS, WIDTH
from tests.golden.whole import Tensors, Whole

GPT = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"


@dataclass(frozen=True)
class Layout:
    """One way to write an archive. `container`: tar, gzip, folder. `dots`: members are called ./NAME, as `tar .` calls them.

    `tree`: Megatron-LM's, the same behind `module.` (O2), with gates apart, or megatron-core's. `artifacts`: name → content.
    """

    tp: int = 1
    pp: int = 1
    container: str = "tar"
    tree: str = "V2.5"
    dots: bool = True
    dtype: torch.dtype = torch.float64
    artifacts: dict[str, bytes] = field(default_factory=dict)


def gpt_keys(**more: object) -> dict[str, object]:
    """`model_config.yaml` of the tiny GPT-2, in the keys of NeMo 1.8."""
    return {
        "micro_batch_size": 4,
        "global_batch_size": 8,
        "encoder_seq_length": POSITIONS,
        "max_position_embeddings": "${.encoder_seq_length}",
        "num_layers": LAYERS,
        "hidden_size": WIDTH,
        "ffn_hidden_size": 4 * WIDTH,
        "num_attention_heads": HEADS,
        "init_method_std": 0.02,
        "hidden_dropout": 0.1,
        "kv_channels": None,
        "apply_query_key_layer_scaling": True,
        "layernorm_epsilon": 1e-5,
        "make_vocab_size_divisible_by": 128,
        "optim": {"name": "fused_adam", "lr": 2e-4},
        "target": GPT,
        "nemo_version": "1.8.2",
        **more,
    }


def write(path: Path, whole: Whole, layout: Layout, keys: dict[str, object]) -> Path:
    """Writes an archive, or a folder, at `path`."""
    sizes = {"tensor_model_parallel_size": layout.tp, "pipeline_model_parallel_size": layout.pp}
    members = {"model_config.yaml": yaml.safe_dump(sizes | keys).encode(), **layout.artifacts}
    for stage in range(layout.pp):
        for r in range(layout.tp):
            members[place(layout, r, stage) + "model_weights.ckpt"] = saved(
                state_dict(whole.to(layout.dtype), layout, r, stage)
            )
    return pack(path, members, layout)


def place(layout: Layout, r: int, stage: int) -> str:
    if layout.pp > 1:
        return f"tp_rank_{r:02d}_pp_rank_{stage:03d}/"
    return f"mp_rank_{r:02d}/" if layout.tp > 1 else ""


def saved(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def pack(path: Path, members: dict[str, bytes], layout: Layout) -> Path:
    if layout.container == "folder":
        for name, content in members.items():
            file = path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        return path
    with tarfile.open(path, "w:gz" if layout.container == "gzip" else "w") as archive:
        if layout.dots:
            top = tarfile.TarInfo("./")
            top.type = tarfile.DIRTYPE
            archive.addfile(top)
        for name, content in members.items():
            entry = tarfile.TarInfo(f"./{name}" if layout.dots else name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def state_dict(whole: Whole, layout: Layout, r: int, stage: int) -> OrderedDict[str, torch.Tensor]:
    """The flat state_dict of rank r of a stage; layers count from 0 in every stage."""
    each = len(whole.layers) // layout.pp
    layers = whole.layers[stage * each : (stage + 1) * each]
    first, last = stage == 0, stage == layout.pp - 1
    tree = core if layout.tree == "core" else classic
    prefix = "model.module." if layout.tree == "O2" else "model."
    found = tree(whole, layers, layout, r, (first, last))
    return OrderedDict((prefix + name, tensor.clone()) for name, tensor in found.items())


def classic(
    whole: Whole, layers: list[Tensors], layout: Layout, r: int, ends: tuple[bool, bool]
) -> dict[str, torch.Tensor]:
    """Names of NeMo's own transformer."""
    tp = layout.tp
    word = rows(padded_table(whole.word, tp), tp, r)
    out: dict[str, torch.Tensor] = {}
    if ends[0]:
        out["language_model.embedding.word_embeddings.weight"] = word
        if whole.position is not None:
            out["language_model.embedding.position_embeddings.weight"] = whole.position
    for number, layer in enumerate(layers):
        at = f"language_model.encoder.layers.{number}"
        for kind in ("weight", "bias"):
            if f"norm1.{kind}" in layer:
                out[f"{at}.input_layernorm.{kind}"] = layer[f"norm1.{kind}"]
                out[f"{at}.post_attention_layernorm.{kind}"] = layer[f"norm2.{kind}"]
            if f"q.{kind}" not in layer:
                continue
            out[f"{at}.self_attention.query_key_value.{kind}"] = query_key_value(whole, layer, kind, 3, tp, r)
            if layout.tree == "gates apart":
                out[f"{at}.mlp.dense_h_to_4h.{kind}"] = rows(layer[f"gate.{kind}"], tp, r)
                out[f"{at}.mlp.dense_h_to_4h_2.{kind}"] = rows(layer[f"up.{kind}"], tp, r)
            else:
                out[f"{at}.mlp.dense_h_to_4h.{kind}"] = first_linear(layer, kind, tp, r)
        out[f"{at}.self_attention.dense.weight"] = columns(layer["proj.weight"], tp, r)
        out[f"{at}.mlp.dense_4h_to_h.weight"] = columns(layer["down.weight"], tp, r)
        if "proj.bias" in layer:
            out[f"{at}.self_attention.dense.bias"] = layer["proj.bias"]
            out[f"{at}.mlp.dense_4h_to_h.bias"] = layer["down.bias"]
    if ends[1]:
        for kind, tensor in whole.final_norm.items():
            out[f"language_model.encoder.final_layernorm.{kind}"] = tensor
        if whole.output is not None:
            out["language_model.output_layer.weight"] = rows(padded_table(whole.output, tp), tp, r)
        elif not ends[0]:
            out["word_embeddings.weight"] = word
    return out


def core(
    whole: Whole, layers: list[Tensors], layout: Layout, r: int, ends: tuple[bool, bool]
) -> dict[str, torch.Tensor]:
    """Names of megatron-core's GPTModel, as NeMo 1.20 has it with `mcore_gpt`."""
    tp = layout.tp
    word = rows(padded_table(whole.word, tp), tp, r)
    out: dict[str, torch.Tensor] = {}
    if ends[0]:
        out["embedding.word_embeddings.weight"] = word
        if whole.position is not None:
            out["embedding.position_embeddings.weight"] = whole.position
    for number, layer in enumerate(layers):
        at = f"decoder.layers.{number}"
        for kind in ("weight", "bias"):
            if f"norm1.{kind}" in layer:
                out[f"{at}.self_attention.linear_qkv.layer_norm_{kind}"] = layer[f"norm1.{kind}"]
                out[f"{at}.mlp.linear_fc1.layer_norm_{kind}"] = layer[f"norm2.{kind}"]
            if f"q.{kind}" in layer:
                out[f"{at}.self_attention.linear_qkv.{kind}"] = query_key_value(whole, layer, kind, 3, tp, r)
                out[f"{at}.mlp.linear_fc1.{kind}"] = first_linear(layer, kind, tp, r)
        out[f"{at}.self_attention.linear_proj.weight"] = columns(layer["proj.weight"], tp, r)
        out[f"{at}.mlp.linear_fc2.weight"] = columns(layer["down.weight"], tp, r)
        if "proj.bias" in layer:
            out[f"{at}.self_attention.linear_proj.bias"] = layer["proj.bias"]
            out[f"{at}.mlp.linear_fc2.bias"] = layer["down.bias"]
    if ends[1]:
        for kind, tensor in whole.final_norm.items():
            out[f"decoder.final_layernorm.{kind}"] = tensor
        if whole.output is not None:
            out["output_layer.weight"] = rows(padded_table(whole.output, tp), tp, r)
        elif not ends[0]:
            out["output_layer.weight"] = word
    return out
