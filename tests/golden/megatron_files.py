"""Megatron-LM's checkpoints in every layout that it ever wrote, from the weights of a tiny model.

Straight-line on purpose: the golden that the rule tables of `megalith.checkpoint` are held to must not share them.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.golden.cuts import columns, first_linear, padded_table, query_key_value, rows
from tests.golden.foreign_classes import arguments, megatron_installed, training_state
from tests.golden.whole import Tensors, Whole

BODIES = {
    "V1": ("transformer", "attention"),
    "MDO": ("encoder", "attention"),
    "V2.5": ("encoder", "self_attention"),
    "norms": ("encoder", "self_attention"),  # late V23: input_norm, post_attention_norm, final_norm
    "core local": ("", ""),
    "core TE": ("", ""),
    "flat model": ("transformer", "attention"),
    "flat language model": ("transformer", "attention"),
}
"""Key trees: names of the body and of its attention."""


@dataclass(frozen=True)
class Layout:
    """One way to write a checkpoint. `version` None: the key is absent. `chunks` > 1: interleaved stages."""

    version: float | None = 3.0
    tree: str = "V2.5"
    tp: int = 1
    pp: int = 1
    chunks: int = 1
    place: str = "number"
    suffix: bool = False
    zipped: bool = True
    dtype: torch.dtype = torch.float64
    args: str = "v3"
    training: bool = False
    extra_state: str = "none"


def write(folder: Path, whole: Whole, layout: Layout, facts: dict[str, object]) -> Path:
    """Writes it and returns what a user would name: the root, an iteration, an mp_rank folder or a bare file.

    `facts`: arguments that say what the model is (none of sizes of parallelism, which are added in the era's names).
    """
    whole = whole.to(layout.dtype)
    step = "release" if layout.place == "release" else "iter_0000010"
    with megatron_installed() as classes:
        for r in range(layout.tp):
            for stage in range(layout.pp):
                name = f"mp_rank_{r:02d}"
                if layout.pp > 1 or layout.suffix:
                    name += f"_{stage:03d}"
                content: dict[str, object] = {"iteration": 0 if step == "release" else 10}
                if layout.version is not None:
                    content["checkpoint_version"] = layout.version
                if layout.args != "absent":
                    named = facts | parallel_sizes(layout) | {"padded_vocab_size": padded_rows(whole, layout)}
                    content["args"] = arguments(classes, layout.dtype, named)
                content |= models(whole, layout, r, stage)
                if layout.training:
                    era = "v2" if layout.args == "absent" else layout.args
                    content |= training_state(classes, whole.layers[0]["norm1.weight"], era)
                path = folder / step / name / "model_optim_rng.pt"
                path.parent.mkdir(parents=True)
                torch.save(content, path, _use_new_zipfile_serialization=layout.zipped)
    if layout.place in ("number", "release"):
        tracker = "release" if step == "release" else "10"
        (folder / "latest_checkpointed_iteration.txt").write_text(tracker)
        return folder
    if layout.place == "iteration":
        return folder / step
    if layout.place == "rank":
        return path.parent
    assert layout.tp == layout.pp == 1
    bare = folder / "gpt2.pt"
    path.rename(bare)
    return bare


def parallel_sizes(layout: Layout) -> dict[str, object]:
    """The sizes of parallelism as the era's arguments name them."""
    if layout.args in ("v1", "v2"):
        return {"model_parallel_size": layout.tp}
    sizes: dict[str, object] = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": None,
    }
    if layout.chunks > 1:
        sizes["virtual_pipeline_model_parallel_size"] = layout.chunks
    return sizes


def padded_rows(whole: Whole, layout: Layout) -> int:
    """Rows of the word table in the files of all ranks together."""
    return len(padded_table(whole.word, layout.tp))


def models(whole: Whole, layout: Layout, r: int, stage: int) -> dict[str, object]:
    """`model`, or `model0`, `model1` … of an interleaved stage. Chunk v of stage p starts at v·(L/V) + p·(L/(V·P))."""
    per_chunk = len(whole.layers) // (layout.chunks * layout.pp)
    out: dict[str, object] = {}
    for chunk in range(layout.chunks):
        start = chunk * (len(whole.layers) // layout.chunks) + stage * per_chunk
        numbers = range(start, start + per_chunk)
        first = stage == 0 and chunk == 0
        last = stage == layout.pp - 1 and chunk == layout.chunks - 1
        core = layout.tree.startswith("core")
        make = core_model if core else classic_model
        out["model" if layout.chunks == 1 else f"model{chunk}"] = make(
            whole, layout, r, (numbers, first, last)
        )
    return out


Part = tuple[range, bool, bool]
"""The layers of a chunk, and whether it is the model's first and its last."""


def classic_model(whole: Whole, layout: Layout, r: int, part: Part) -> dict[str, object]:
    """The nested tree of megatron.model, later megatron.legacy.model; layers count from 0 in every chunk."""
    numbers, first, last = part
    body_name, attention = BODIES[layout.tree]
    late = layout.tree == "norms"
    tp, version = layout.tp, layout.version or 0
    body: Tensors = {}
    for local, number in enumerate(numbers):
        layer, at = whole.layers[number], f"layers.{local}"
        norm1, norm2 = (
            ("input_norm", "post_attention_norm") if late else ("input_layernorm", "post_attention_layernorm")
        )
        for kind in ("weight", "bias"):
            if f"norm1.{kind}" in layer:
                body[f"{at}.{norm1}.{kind}"] = layer[f"norm1.{kind}"]
                body[f"{at}.{norm2}.{kind}"] = layer[f"norm2.{kind}"]
            if f"q.{kind}" in layer:
                body[f"{at}.{attention}.query_key_value.{kind}"] = query_key_value(
                    whole, layer, kind, version, tp, r
                )
                body[f"{at}.mlp.dense_h_to_4h.{kind}"] = first_linear(layer, kind, tp, r)
        body[f"{at}.{attention}.dense.weight"] = columns(layer["proj.weight"], tp, r)
        body[f"{at}.mlp.dense_4h_to_h.weight"] = columns(layer["down.weight"], tp, r)
        if "proj.bias" in layer:
            body[f"{at}.{attention}.dense.bias"] = layer["proj.bias"]
            body[f"{at}.mlp.dense_4h_to_h.bias"] = layer["down.bias"]
    if last:
        for kind, tensor in whole.final_norm.items():
            body[f"{'final_norm' if late else 'final_layernorm'}.{kind}"] = tensor

    word = rows(padded_table(whole.word, tp), tp, r)
    embedding: dict[str, Tensors] = {"word_embeddings": {"weight": word}}
    if whole.position is not None:
        embedding["position_embeddings"] = {"weight": whole.position}
    if layout.tree.startswith("flat"):
        flat = {f"{body_name}.{name}": tensor for name, tensor in body.items()}
        if first:
            flat |= {f"embedding.{table}.weight": content["weight"] for table, content in embedding.items()}
        tree: dict[str, object] = dict(flat) if layout.tree == "flat model" else {"language_model": flat}
    else:
        language_model: dict[str, object] = {"embedding": embedding} if first else {}
        language_model[body_name] = body
        if last and whole.output is not None:
            output = rows(padded_table(whole.output, tp), tp, r)
            language_model["output_layer"] = {"weight": output}
        tree = {"language_model": language_model}
    if last and not first and whole.output is None:
        tree["word_embeddings_for_head"] = {"weight": word.clone()}
    return tree


def core_model(whole: Whole, layout: Layout, r: int, part: Part) -> dict[str, object]:
    """The flat state dict of megatron.core's GPTModel, of either layer specification; layers count from 0 in every chunk.

    Transformer Engine's specification fuses each norm into the linear behind it and has states of its own.
    """
    numbers, first, last = part
    tp, fused = layout.tp, layout.tree == "core TE"
    out: dict[str, object] = {}
    if first:
        out["embedding.word_embeddings.weight"] = rows(padded_table(whole.word, tp), tp, r)
        if whole.position is not None:
            out["embedding.position_embeddings.weight"] = whole.position
    for local, number in enumerate(numbers):
        layer, at = whole.layers[number], f"decoder.layers.{local}"
        for kind in ("weight", "bias"):
            if f"norm1.{kind}" in layer:
                if fused:
                    out[f"{at}.self_attention.linear_qkv.layer_norm_{kind}"] = layer[f"norm1.{kind}"]
                    out[f"{at}.mlp.linear_fc1.layer_norm_{kind}"] = layer[f"norm2.{kind}"]
                else:
                    out[f"{at}.input_layernorm.{kind}"] = layer[f"norm1.{kind}"]
                    out[f"{at}.pre_mlp_layernorm.{kind}"] = layer[f"norm2.{kind}"]
            if f"q.{kind}" in layer:
                qkv = query_key_value(whole, layer, kind, 3.0, tp, r)
                out[f"{at}.self_attention.linear_qkv.{kind}"] = qkv
                out[f"{at}.mlp.linear_fc1.{kind}"] = first_linear(layer, kind, tp, r)
        out[f"{at}.self_attention.linear_proj.weight"] = columns(layer["proj.weight"], tp, r)
        out[f"{at}.mlp.linear_fc2.weight"] = columns(layer["down.weight"], tp, r)
        if "proj.bias" in layer:
            out[f"{at}.self_attention.linear_proj.bias"] = layer["proj.bias"]
            out[f"{at}.mlp.linear_fc2.bias"] = layer["down.bias"]
        for linear in ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1"):
            out[f"{at}.{linear}._extra_state"] = extra_state(layout.extra_state)
        if fused:
            out[f"{at}.self_attention.core_attention._extra_state"] = extra_state(layout.extra_state)
    if last:
        for kind, tensor in whole.final_norm.items():
            out[f"decoder.final_layernorm.{kind}"] = tensor
        out["output_layer._extra_state"] = None
        if whole.output is not None:
            out["output_layer.weight"] = rows(padded_table(whole.output, tp), tp, r)
        elif not first:
            out["output_layer.weight"] = rows(padded_table(whole.word, tp), tp, r)
    return out


def extra_state(form: str) -> object:
    """What a linear of Transformer Engine keeps beside its weights: nothing, a stream of bytes, or bytes as a tensor."""
    if form == "stream":
        return io.BytesIO(pickle.dumps({"scale_fwd": [1.0]}))
    if form == "tensor":
        return torch.frombuffer(bytearray(pickle.dumps({"scale_fwd": [1.0]})), dtype=torch.uint8)
    return None
