"""PEFT's files of LoRA, written by hand: names and rows told apart, and everything refused that is more than A and B.

That `peft` computes the same is a reference test.
"""

from __future__ import annotations

import json

import pytest
import torch

from megalith.adapt.adapter import LORA, Adapter
from megalith.adapt.lora import LoRA
from megalith.adapt.peft_lora import read_peft_lora, write_peft_lora
from megalith.checkpoint.tensor_files import open_tensors, write_tensors
from megalith.errors import CheckpointError
from megalith.models.config import ModelConfig
from tests.adapt.test_lora import CONFIGS, LLAMA, SHAPE

SAID = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 6, "target_modules": ["c_attn"], "bias": "none"}  # fmt: skip
ATTENTION = "base_model.model.model.layers.0.self_attn"


def written(folder, tensors, **said):
    folder.mkdir()
    write_tensors(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps({**SAID, **said}))
    return folder


def of_module(name, rows, rank=2, width=16):
    return {
        f"{name}.lora_A.weight": torch.randn(rank, width),
        f"{name}.lora_B.weight": torch.randn(rows, rank),
    }


def c_attn():
    return of_module("base_model.model.transformer.h.1.attn.c_attn", 48)


def test_gpt2s_rows_head_by_head(tmp_path):
    tensors = c_attn()
    adapter = read_peft_lora(written(tmp_path / "a", tensors, lora_dropout=0.25), CONFIGS["gpt2"])
    a, b = tensors.values()
    assert set(adapter.tensors) == {"blocks.1.attention.qkv.lora_a", "blocks.1.attention.qkv.lora_b"}
    assert torch.equal(adapter.tensors["blocks.1.attention.qkv.lora_a"], a)
    # theirs: queries of 4 heads of 4 channels, keys, values; ours: a head's queries, its keys, its values
    expected = torch.cat([b[16 * kind + 4 * head :][:4] for head in range(4) for kind in range(3)])
    assert torch.equal(adapter.tensors["blocks.1.attention.qkv.lora_b"], expected)
    method = LoRA.understand(adapter.settings)
    assert (method.rank, method.alpha, method.dropout) == (2, 6.0, 0.25)
    assert method.targets == ("blocks.1.attention.qkv",)


def test_llamas_queries_and_values_alone_become_blocks(tmp_path):
    q, v = of_module(f"{ATTENTION}.q_proj", 16), of_module(f"{ATTENTION}.v_proj", 8, rank=3)
    adapter = read_peft_lora(written(tmp_path / "a", q | v, rank_pattern={"v_proj": 3}), CONFIGS["llama"])
    a, b = (adapter.tensors[f"blocks.0.attention.qkv.lora_{half}"] for half in "ab")
    (a_q, b_q), (a_v, b_v) = q.values(), v.values()
    assert torch.equal(a, torch.cat((a_q, a_v)))
    groups = b.unflatten(0, (2, 4, 4))  # 2 groups of two query heads, a key and a value, 4 channels each
    assert torch.equal(groups[:, :2, :, :2].flatten(0, 2), b_q)
    # PEFT's alpha is the same for another rank, so its scale is 6/3 in place of 6/2
    torch.testing.assert_close(groups[:, 3, :, 2:].flatten(0, 1), b_v * (2 / 3))
    assert not groups[:, 2].any()
    assert not groups[:, :3, :, 2:].any()
    assert LoRA.understand(adapter.settings).ranks == {"blocks.0.attention.qkv": 5}


def test_llamas_parts_out(tmp_path):
    method = LoRA(rank=2, targets=("qkv", "out"))
    tensors = {
        "blocks.0.attention.qkv.lora_a": torch.randn(2, 16), "blocks.0.attention.qkv.lora_b": torch.randn(32, 2),
        "blocks.1.attention.out.lora_a": torch.randn(2, 16), "blocks.1.attention.out.lora_b": torch.randn(16, 2),
    }  # fmt: skip
    (tmp_path / "a").mkdir()
    write_peft_lora(
        Adapter(LORA, "gpt", tensors, settings=method.describe()), tmp_path / "a", CONFIGS["llama"]
    )
    found = {lazy.name: lazy.read() for lazy in open_tensors(tmp_path / "a" / "adapter_model.safetensors")}
    modules = [f"{ATTENTION}.{letter}_proj" for letter in "qkv"]
    modules.append("base_model.model.model.layers.1.self_attn.o_proj")
    assert set(found) == {f"{module}.lora_{half}.weight" for module in modules for half in "AB"}
    groups = tensors["blocks.0.attention.qkv.lora_b"].unflatten(0, (2, 4, 4))
    assert torch.equal(found[f"{modules[1]}.lora_B.weight"], groups[:, 2].flatten(0, 1))
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["fan_in_fan_out"]) == (2, 16, False)
    # an end of names would mean the other layer, too
    assert said["target_modules"] == [module.removeprefix("base_model.model.") for module in modules]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True, "modules_to_save": ["lm_head"]}, "modules_to_save.*use_dora"),
        ({"bias": "all"}, "bias 'all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base"),
        ({"r": 0}, "its r is 0"),
        ({"lora_alpha": "much"}, "lora_alpha is 'much'"),
        ({"alpha_pattern": {"((": 3}}, "alpha_pattern"),
    ],
)  # fmt: skip
def test_what_is_more_than_a_and_b_is_refused(tmp_path, said, words):
    folder = written(tmp_path / "a", c_attn(), **said)
    with pytest.raises(CheckpointError, match=words):
        read_peft_lora(folder, CONFIGS["gpt2"])


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (of_module("base_model.model.lm_head", 40), "lm_head, which is no product"),
        (of_module("base_model.model.transformer.h.7.attn.c_attn", 48), "h.7.attn.c_attn"),
        ({"base_model.model.transformer.wte.lora_embedding_A": torch.zeros(2, 40)}, "no A or B"),
        ({k: t for k, t in c_attn().items() if "lora_A" in k}, "has lora_A"),
    ],
)
def test_other_tensors_are_refused(tmp_path, tensors, words):
    with pytest.raises(CheckpointError, match=words):
        read_peft_lora(written(tmp_path / "a", tensors), CONFIGS["gpt2"])


def test_rows_of_another_model_are_refused(tmp_path):
    tensors = of_module("base_model.model.transformer.h.1.attn.c_attn", 60)
    with pytest.raises(CheckpointError, match="from 16 to 60, this model's from 16 to 48"):
        read_peft_lora(written(tmp_path / "a", tensors), CONFIGS["gpt2"])


def test_a_model_that_transformers_has_not(tmp_path):
    config = ModelConfig(**{**SHAPE, **LLAMA, "position_embedding_type": "learned_absolute"})
    with pytest.raises(CheckpointError, match="for models of transformers"):
        read_peft_lora(written(tmp_path / "a", c_attn()), config)
