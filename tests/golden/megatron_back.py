"""Reads a Megatron-LM root with torch alone and puts it together in straight lines: what exports are held to.

Shares nothing with the rule tables. Every file must load under `weights_only=True`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tests.golden.whole import Tensors, Whole


def read_back(root: Path, heads: int, groups: int, vocabulary: int) -> Whole:
    """The whole model of a root with any number of ranks, stages and chunks, written by checkpoint_version 0 to 3."""
    said = (root / "latest_checkpointed_iteration.txt").read_text()
    step = root / (said if said == "release" else f"iter_{int(said):07d}")
    files = {}
    for folder in step.iterdir():
        _, _, tensor, *stage = folder.name.split("_")
        files[int(stage[0]) if stage else 0, int(tensor)] = torch.load(
            folder / "model_optim_rng.pt", weights_only=True
        )
    stages = 1 + max(stage for stage, _ in files)
    ranks = 1 + max(rank for _, rank in files)
    chunks = len([key for key in files[0, 0] if key.startswith("model") and key != "model"]) or 1
    version = files[0, 0]["checkpoint_version"]
    layers: list[Tensors] = []
    word = position = output = None
    for chunk in range(chunks):
        for stage in range(stages):
            key = "model" if chunks == 1 else f"model{chunk}"
            trees = [files[stage, rank][key] for rank in range(ranks)]
            models = [tree["language_model"] for tree in trees]
            if "embedding" in models[0]:
                tables = [model["embedding"] for model in models]
                word = torch.cat([table["word_embeddings"]["weight"] for table in tables])
                if "position_embeddings" in tables[0]:
                    position = tables[0]["position_embeddings"]["weight"]
                    assert all(torch.equal(position, t["position_embeddings"]["weight"]) for t in tables)
            if "output_layer" in models[0]:
                output = torch.cat([model["output_layer"]["weight"] for model in models])
            if "word_embeddings_for_head" in trees[0]:
                copy = torch.cat([tree["word_embeddings_for_head"]["weight"] for tree in trees])
                assert torch.equal(copy, word)
            bodies = [model.get("encoder", model.get("transformer")) for model in models]
            count = 1 + max(int(name.split(".")[1]) for name in bodies[0] if name.startswith("layers."))
            layers += [layer(bodies, number, version, heads, groups) for number in range(count)]
            final = {name: tensor for name, tensor in bodies[0].items() if name.startswith("final_layernorm")}
    return Whole(
        heads,
        groups,
        word[:vocabulary],
        position,
        None if output is None else output[:vocabulary],
        {name.rpartition(".")[2]: tensor for name, tensor in final.items()},
        layers,
    )


def layer(bodies: list[Tensors], number: int, version: float, heads: int, groups: int) -> Tensors:
    """One layer under plain names."""
    at, ranks = f"layers.{number}", len(bodies)
    attention = "attention" if f"{at}.attention.dense.weight" in bodies[0] else "self_attention"
    found: Tensors = {}
    for theirs, ours in (("input_layernorm", "norm1"), ("post_attention_layernorm", "norm2")):
        for kind in ("weight", "bias"):
            if f"{at}.{theirs}.{kind}" in bodies[0]:
                found[f"{ours}.{kind}"] = bodies[0][f"{at}.{theirs}.{kind}"]
    for theirs, ours in ((f"{attention}.dense", "proj"), ("mlp.dense_4h_to_h", "down")):
        found[f"{ours}.weight"] = torch.cat([body[f"{at}.{theirs}.weight"] for body in bodies], 1)
        if f"{at}.{theirs}.bias" in bodies[0]:
            found[f"{ours}.bias"] = bodies[0][f"{at}.{theirs}.bias"]
    for kind in ("weight", "bias"):
        if f"{at}.mlp.dense_h_to_4h.{kind}" not in bodies[0]:
            continue
        ups = [body[f"{at}.mlp.dense_h_to_4h.{kind}"] for body in bodies]
        inner = found["down.weight"].shape[1] // ranks
        if len(ups[0]) == 2 * inner:
            found[f"gate.{kind}"] = torch.cat([up[:inner] for up in ups])
        found[f"up.{kind}"] = torch.cat([up[-inner:] for up in ups])
        fused = [body[f"{at}.{attention}.query_key_value.{kind}"] for body in bodies]
        parts = [split(rows, version, heads // ranks, groups // ranks) for rows in fused]
        for name, each in zip("qkv", zip(*parts, strict=True), strict=True):
            found[f"{name}.{kind}"] = torch.cat(each)
    return found


def split(rows: torch.Tensor, version: float, heads: int, groups: int) -> list[torch.Tensor]:
    """One rank's queries, keys and values, each head by head."""
    dim, inner = len(rows) // (heads + 2 * groups), rows.shape[1:]
    if version == 0:
        return list(rows.chunk(3))
    if version == 1:
        return [rows.view(heads, dim, 3, *inner)[:, :, i].reshape(heads * dim, *inner) for i in range(3)]
    per = heads // groups
    apart = rows.view(groups, per + 2, dim, *inner)
    q, k, v = apart[:, :per], apart[:, per], apart[:, per + 1]
    return [q.reshape(heads * dim, *inner), k.reshape(groups * dim, *inner), v.reshape(groups * dim, *inner)]
