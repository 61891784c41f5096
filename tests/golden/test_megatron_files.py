"""The writers of goldens, read back by torch alone and put together without them."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from tests.golden import tiny
from tests.golden.foreign_classes import megatron_installed
from tests.golden.megatron_facts import gpt2_facts, llama_facts
from tests.golden.megatron_files import Layout, write
from tests.golden.whole import Whole, from_gpt2, from_llama

HEAD_DIM = tiny.WIDTH // tiny.HEADS


@pytest.fixture(scope="module")
def gpt2() -> Whole:
    return from_gpt2(tiny.gpt2())


@pytest.fixture(scope="module")
def llama() -> Whole:
    return from_llama(tiny.llama())


def read(path: Path) -> dict:
    with megatron_installed():
        return torch.load(path, weights_only=False)


def by_version(rows: torch.Tensor, version: float) -> tuple[torch.Tensor, ...]:
    """(heads, head dim, …) query, key and value of one rank's fused rows, by the views of Megatron's own repair."""
    inner = rows.shape[1:]
    if version == 0:
        return rows.view(3, -1, HEAD_DIM, *inner).unbind(0)
    if version == 1:
        return rows.view(-1, HEAD_DIM, 3, *inner).unbind(2)
    return rows.view(-1, 3, HEAD_DIM, *inner).unbind(1)


@pytest.mark.parametrize("version", [None, 0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_every_version_holds_the_same_queries_keys_and_values(tmp_path, gpt2, version, kind):
    root = write(tmp_path, gpt2, Layout(version=version, tree="V1", tp=2, pp=2, args="absent"), gpt2_facts())
    for number, layer in enumerate(gpt2.layers):
        stage, local = divmod(number, 2)
        parts = []
        for r in range(2):
            content = read(root / f"iter_0000010/mp_rank_{r:02d}_{stage:03d}/model_optim_rng.pt")
            assert content.get("checkpoint_version") == version
            body = content["model"]["language_model"]["transformer"]
            fused = body[f"layers.{local}.attention.query_key_value.{kind}"]
            parts.append(by_version(fused, version or 0))
        for name, halves in zip("qkv", zip(*parts, strict=True), strict=True):
            whole = torch.cat(halves).reshape(layer[f"{name}.{kind}"].shape)
            assert torch.equal(whole, layer[f"{name}.{kind}"])


def test_a_version_1_root_of_two_by_two_is_the_model_again(tmp_path, gpt2):
    root = write(tmp_path, gpt2, Layout(version=1.0, tree="V1", tp=2, pp=2), gpt2_facts())
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "10"
    ranks = [
        [read(root / f"iter_0000010/mp_rank_{r:02d}_{stage:03d}/model_optim_rng.pt")["model"] for r in (0, 1)]
        for stage in (0, 1)
    ]
    tables = [model["language_model"]["embedding"]["word_embeddings"]["weight"] for model in ranks[0]]
    assert torch.equal(torch.cat(tables)[: tiny.VOCABULARY], gpt2.word)
    assert len(torch.cat(tables)) == 256
    heads = [model["word_embeddings_for_head"]["weight"] for model in ranks[1]]
    assert all(torch.equal(head, table) for head, table in zip(heads, tables, strict=True))
    assert "embedding" not in ranks[1][0]["language_model"]
    for number, layer in enumerate(gpt2.layers):
        stage, local = divmod(number, 2)
        a, b = (model["language_model"]["transformer"] for model in ranks[stage])
        for theirs, ours, dim in (
            ("attention.dense.weight", "proj.weight", 1),
            ("mlp.dense_h_to_4h.weight", "up.weight", 0),
            ("mlp.dense_h_to_4h.bias", "up.bias", 0),
            ("mlp.dense_4h_to_h.weight", "down.weight", 1),
        ):
            name = f"layers.{local}.{theirs}"
            assert torch.equal(torch.cat([a[name], b[name]], dim), layer[ours])
        for theirs, ours in (
            ("attention.dense.bias", "proj.bias"),
            ("input_layernorm.bias", "norm1.bias"),
            ("post_attention_layernorm.weight", "norm2.weight"),
        ):
            assert torch.equal(a[f"layers.{local}.{theirs}"], layer[ours])
            assert torch.equal(b[f"layers.{local}.{theirs}"], layer[ours])
    last = ranks[1][1]["language_model"]["transformer"]
    assert torch.equal(last["final_layernorm.bias"], gpt2.final_norm["bias"])


def test_interleaved_stages_hold_every_other_layer(tmp_path, gpt2):
    root = write(tmp_path, gpt2, Layout(pp=2, chunks=2), gpt2_facts())
    for stage, chunk, number in ((0, 0, 0), (1, 0, 1), (0, 1, 2), (1, 1, 3)):
        content = read(root / f"iter_0000010/mp_rank_00_{stage:03d}/model_optim_rng.pt")
        body = content[f"model{chunk}"]["language_model"]["encoder"]
        assert torch.equal(body["layers.0.mlp.dense_4h_to_h.bias"], gpt2.layers[number]["down.bias"])
        assert "layers.1.mlp.dense_4h_to_h.bias" not in body
        assert content["args"].virtual_pipeline_model_parallel_size == 2


@pytest.mark.parametrize("tree", ["V2.5", "core local", "core TE"])
def test_grouped_queries_and_gates_lie_per_rank(tmp_path, llama, tree):
    root = write(tmp_path, llama, Layout(tree=tree, tp=2), llama_facts(2, tied=False))
    qkv = "linear_qkv" if tree.startswith("core") else "query_key_value"
    first = "linear_fc1" if tree.startswith("core") else "dense_h_to_4h"
    layer = llama.layers[1]
    for r in (0, 1):
        model = read(root / f"iter_0000010/mp_rank_{r:02d}/model_optim_rng.pt")["model"]
        body = model if tree.startswith("core") else model["language_model"]["encoder"]
        at = "decoder.layers.1" if tree.startswith("core") else "layers.1"
        *queries, k, v = body[f"{at}.self_attention.{qkv}.weight"].split(HEAD_DIM)
        assert torch.equal(torch.cat(queries), layer["q.weight"][16 * r : 16 * r + 16])
        assert torch.equal(k, layer["k.weight"][HEAD_DIM * r : HEAD_DIM * (r + 1)])
        assert torch.equal(v, layer["v.weight"][HEAD_DIM * r : HEAD_DIM * (r + 1)])
        gate, up = body[f"{at}.mlp.{first}.weight"].chunk(2)
        assert torch.equal(gate, layer["gate.weight"][24 * r : 24 * r + 24])
        assert torch.equal(up, layer["up.weight"][24 * r : 24 * r + 24])


def test_arguments_need_modules_that_are_gone(tmp_path, gpt2):
    path = write(tmp_path, gpt2, Layout(place="bare", training=True), gpt2_facts())
    with pytest.raises(ModuleNotFoundError, match="megatron"):
        torch.load(path, weights_only=False)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    content = read(path)
    assert content["args"].attn_mask_type.name == "causal"
    assert {"optimizer", "opt_param_scheduler", "rng_state"} <= set(content)


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (Layout(place="number", tp=2), "iter_0000010/mp_rank_01/model_optim_rng.pt"),
        (Layout(place="number", suffix=True), "iter_0000010/mp_rank_00_000/model_optim_rng.pt"),
        (Layout(place="release"), "release/mp_rank_00/model_optim_rng.pt"),
        (Layout(place="iteration", pp=2), "mp_rank_00_001/model_optim_rng.pt"),
        (Layout(place="rank"), "model_optim_rng.pt"),
        (Layout(place="bare"), "."),
        (Layout(place="bare", zipped=False), "."),
    ],
)
def test_places(tmp_path, gpt2, layout, name):
    written = write(tmp_path, gpt2, layout, gpt2_facts()) / name
    assert (written.read_bytes()[:2] == b"PK") == layout.zipped
    assert "model" in read(written)


def test_dtypes_and_flat_trees(tmp_path, gpt2):
    flat = Layout(tree="flat model", place="bare", dtype=torch.bfloat16, version=0, args="v1")
    model = read(write(tmp_path / "a", gpt2, flat, gpt2_facts(era="v1")))["model"]
    assert model["embedding.word_embeddings.weight"].dtype == torch.bfloat16
    assert "transformer.layers.3.attention.dense.weight" in model
    nested = replace(flat, tree="flat language model")
    tree = read(write(tmp_path / "b", gpt2, nested, gpt2_facts(era="v1")))["model"]["language_model"]
    assert set(tree) == set(model)
