"""Megatron-LM's checkpoints in every layout that it ever wrote, from the weights of a tiny model.

Straight-line on purpose: the golden that the rule tables of `megalith.checkpoint` are held to must not share them.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.golden.cuts import columns, first_linear, key_value, padded_table, query_key_value, rows
from tests.golden.foreign_classes import arguments, megatron_installed, training_state
from tests.golden.sides import Sides
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
    """One way to write a checkpoint. `version` None: the key is absent. `chunks` > 1: interleaved stages. `split`: a decoder's first stage."""

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
    split: int = 1


def write(folder: Path, whole: Whole | Sides, layout: Layout, facts: dict[str, object]) -> Path:
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


def padded_rows(whole: Whole | Sides, layout: Layout) -> int:
    """Rows of the word table in the files of all ranks together."""
    return len(padded_table(whole.word, layout.tp))


def models(whole: Whole | Sides, layout: Layout, r: int, stage: int) -> dict[str, object]:
    """`model`, or `model0`, `model1` … of an interleaved stage. Chunk v of stage p starts at v·(L/V) + p·(L/(V·P))."""
    if isinstance(whole, Sides):
        core = layout.tree.startswith("core")
        return {"model": (sided_core_model if core else sided_model)(whole, layout, r, stage)}
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
    body_name, _ = BODIES[layout.tree]
    late = layout.tree == "norms"
    tp = layout.tp
    body: Tensors = {}
    for local, number in enumerate(numbers):
        for name, tensor in classic_layer(whole, whole.layers[number], layout, r).items():
            body[f"layers.{local}.{name}"] = tensor
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


def classic_layer(whole: Whole | Sides, layer: Tensors, layout: Layout, r: int) -> Tensors:
    """Rank r's part of one layer; a decoder's has the norm before its second attention where others have that of the feed-forward."""
    _, attention = BODIES[layout.tree]
    late = layout.tree == "norms"
    tp, version = layout.tp, layout.version or 0
    norm1, norm2, norm3 = (
        ("input_norm", "post_attention_norm", "post_inter_attention_norm")
        if late
        else ("input_layernorm", "post_attention_layernorm", "post_inter_attention_layernorm")
    )
    out: Tensors = {}
    for kind in ("weight", "bias"):
        if f"norm1.{kind}" in layer:
            out[f"{norm1}.{kind}"] = layer[f"norm1.{kind}"]
            if "cross_q.weight" in layer:
                out[f"{norm2}.{kind}"] = layer[f"norm_cross.{kind}"]
                out[f"{norm3}.{kind}"] = layer[f"norm2.{kind}"]
            else:
                out[f"{norm2}.{kind}"] = layer[f"norm2.{kind}"]
        if f"q.{kind}" in layer:
            out[f"{attention}.query_key_value.{kind}"] = query_key_value(whole, layer, kind, version, tp, r)
            out[f"mlp.dense_h_to_4h.{kind}"] = first_linear(layer, kind, tp, r)
        if f"cross_q.{kind}" in layer:
            out[f"inter_attention.query.{kind}"] = rows(layer[f"cross_q.{kind}"], tp, r)
            out[f"inter_attention.key_value.{kind}"] = key_value(whole, layer, kind, version, tp, r)
    out[f"{attention}.dense.weight"] = columns(layer["proj.weight"], tp, r)
    out["mlp.dense_4h_to_h.weight"] = columns(layer["down.weight"], tp, r)
    if "cross_q.weight" in layer:
        out["inter_attention.dense.weight"] = columns(layer["cross_proj.weight"], tp, r)
        out["inter_attention.dense.bias"] = layer["cross_proj.bias"]
    if "proj.bias" in layer:
        out[f"{attention}.dense.bias"] = layer["proj.bias"]
        out["mlp.dense_4h_to_h.bias"] = layer["down.bias"]
    return out


def sided_model(whole: Sides, layout: Layout, r: int, stage: int) -> dict[str, object]:
    """A stage of BERT, or of T5: its encoder on the stages before `layout.split`, its decoder on those from there on."""
    tp, pp = layout.tp, layout.pp
    body_name, _ = BODIES[layout.tree]
    final = "final_norm" if layout.tree == "norms" else "final_layernorm"
    split = layout.split if whole.decoder and pp > 1 else pp
    last = stage == pp - 1
    language_model: dict[str, object] = {}
    word = rows(padded_table(whole.word, tp), tp, r)
    begins = stage == 0 or stage == split
    if begins:
        tables = {"word_embeddings": {"weight": word.clone()}}
        tables["position_embeddings"] = {"weight": whole.position}
        if whole.types is not None:
            tables["tokentype_embeddings"] = {"weight": whole.types}
        language_model["embedding"] = tables
    if stage < split:
        body: Tensors = {}
        count = len(whole.layers) // split
        for local in range(count):
            layer = whole.layers[stage * count + local]
            for name, tensor in classic_layer(whole, layer, layout, r).items():
                body[f"layers.{local}.{name}"] = tensor
        if stage == split - 1:
            for kind, tensor in whole.final_norm.items():
                body[f"{final}.{kind}"] = tensor
        language_model[body_name] = body
    if whole.decoder and (stage >= split or pp == 1):
        body = {}
        count = len(whole.decoder) // (pp - split) if pp > 1 else len(whole.decoder)
        for local in range(count):
            layer = whole.decoder[(stage - split) * count + local if pp > 1 else local]
            for name, tensor in classic_layer(whole, layer, layout, r).items():
                body[f"layers.{local}.{name}"] = tensor
        if last:
            for kind, tensor in whole.decoder_norm.items():
                body[f"{final}.{kind}"] = tensor
        language_model["decoder"] = body
    tree: dict[str, object] = {"language_model": language_model}
    if not last:
        return tree
    ends = whole.ends
    if not begins:
        tree["word_embeddings_for_head"] = {"weight": word.clone()}
    if "pooler.weight" in ends:
        language_model["pooler"] = {f"dense.{kind}": ends[f"pooler.{kind}"] for kind in ("weight", "bias")}
    if "bias" in ends:
        tree["lm_head"] = {"bias": rows(padded_table(ends["bias"][:, None], tp), tp, r)[:, 0]}
    if "lm_dense.weight" in ends:
        norm = "norm" if layout.tree == "norms" else "layernorm"
        for kind in ("weight", "bias"):
            tree["lm_head"] |= {
                f"dense.{kind}": ends[f"lm_dense.{kind}"],
                f"{norm}.{kind}": ends[f"lm_norm.{kind}"],
            }
    if "binary.weight" in ends:
        tree["binary_head"] = {kind: ends[f"binary.{kind}"] for kind in ("weight", "bias")}
    return tree


def sided_core_model(whole: Sides, layout: Layout, r: int, stage: int) -> dict[str, object]:
    """megatron-core's BERT, in stages, or its T5, in one. T5's head lies under two names, for two modules have it."""
    tp, fused = layout.tp, layout.tree == "core TE"
    first, last = stage == 0, stage == layout.pp - 1
    assert not whole.decoder or layout.pp == 1
    out: dict[str, object] = {}
    word = rows(padded_table(whole.word, tp), tp, r)
    if first:
        out["embedding.word_embeddings.weight"] = word
        out["embedding.position_embeddings.weight"] = whole.position
        if whole.types is not None:
            out["embedding.tokentype_embeddings.weight"] = whole.types
    count = len(whole.layers) // layout.pp
    mine = whole.layers[stage * count : (stage + 1) * count]
    for side, layers, final in (
        ("encoder", mine, whole.final_norm),
        ("decoder", whole.decoder, whole.decoder_norm),
    ):
        for local, layer in enumerate(layers):
            at = f"{side}.layers.{local}"
            for kind in ("weight", "bias"):
                if fused:
                    out[f"{at}.self_attention.linear_qkv.layer_norm_{kind}"] = layer[f"norm1.{kind}"]
                    out[f"{at}.mlp.linear_fc1.layer_norm_{kind}"] = layer[f"norm2.{kind}"]
                else:
                    out[f"{at}.input_layernorm.{kind}"] = layer[f"norm1.{kind}"]
                    out[f"{at}.pre_mlp_layernorm.{kind}"] = layer[f"norm2.{kind}"]
                out[f"{at}.self_attention.linear_qkv.{kind}"] = query_key_value(
                    whole, layer, kind, 3.0, tp, r
                )
                out[f"{at}.mlp.linear_fc1.{kind}"] = first_linear(layer, kind, tp, r)
                if side == "decoder":
                    out[f"{at}.pre_cross_attn_layernorm.{kind}"] = layer[f"norm_cross.{kind}"]
                    out[f"{at}.cross_attention.linear_q.{kind}"] = rows(layer[f"cross_q.{kind}"], tp, r)
                    out[f"{at}.cross_attention.linear_kv.{kind}"] = key_value(whole, layer, kind, 3.0, tp, r)
            out[f"{at}.self_attention.linear_proj.weight"] = columns(layer["proj.weight"], tp, r)
            out[f"{at}.self_attention.linear_proj.bias"] = layer["proj.bias"]
            out[f"{at}.mlp.linear_fc2.weight"] = columns(layer["down.weight"], tp, r)
            out[f"{at}.mlp.linear_fc2.bias"] = layer["down.bias"]
            out[f"{at}.self_attention.linear_qkv._extra_state"] = extra_state(layout.extra_state)
            if side == "decoder":
                out[f"{at}.cross_attention.linear_proj.weight"] = columns(layer["cross_proj.weight"], tp, r)
                out[f"{at}.cross_attention.linear_proj.bias"] = layer["cross_proj.bias"]
        if last and layers:
            for kind, tensor in final.items():
                out[f"{side}.final_layernorm.{kind}"] = tensor
    if not last:
        return out
    bias = rows(padded_table(whole.ends["bias"][:, None], tp), tp, r)[:, 0].contiguous()
    out["output_layer.bias"] = bias
    if whole.decoder:
        out["lm_head.output_layer.bias"] = bias
        return out
    if not first:
        out["output_layer.weight"] = word
    for theirs, ours in (
        ("lm_head.dense", "lm_dense"),
        ("lm_head.layer_norm", "lm_norm"),
        ("binary_head", "binary"),
        ("pooler.dense", "pooler"),
    ):
        for kind in ("weight", "bias"):
            if f"{ours}.{kind}" in whole.ends:
                out[f"{theirs}.{kind}"] = whole.ends[f"{ours}.{kind}"]
    return out


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
