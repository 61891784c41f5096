"""The saved adapter: what comes back, every damage in one message, several as one, and which base they fit."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch

from megalith.adapt.adapter import Adapter, Base, check_base, joined
from megalith.adapt.artefact import install, open_adapter, save
from megalith.adapt.method import Tag
from megalith.adapt.soft_prompt import SoftPrompts
from megalith.errors import CheckpointError, ConfigError, UnsupportedError
from megalith.models.bert import Bert
from megalith.models.bert_config import BertConfig
from tests.generate.tiny import tiny_model

WIDTH = 32


def prompts(*tags, positions=True, seed=0, base=None, dtype=torch.float32, width=WIDTH):
    """An adapter with tags of 2, 3, … virtual tokens."""
    draw = torch.Generator().manual_seed(seed)
    found, tensors = [], {}
    for number, name in enumerate(tags):
        found.append(Tag(name, 2 + number, positions))
        for part in ("tokens", *["positions"] * positions):
            tensors[f"prompts.{number}.{part}"] = torch.randn(2 + number, width, generator=draw, dtype=dtype)
    settings = SoftPrompts(earlier=found).describe()
    return Adapter(
        "soft-prompt", "gpt", tensors, tuple(found), settings, base or Base("a1", "gpt.nemo", "t1")
    )


def lora(**more):
    tensors = {"blocks.0.mlp.up.lora_a": torch.ones(2, WIDTH), "blocks.0.mlp.up.lora_b": torch.ones(64, 2)}
    return Adapter("lora", "gpt", {**tensors, **more}, settings={"rank": 2}, base=Base("a1"))


def same(left, right):
    assert left.tensors.keys() == right.tensors.keys()
    assert all(
        torch.equal(left.tensors[n], right.tensors[n]) and left.tensors[n].dtype == right.tensors[n].dtype
        for n in left.tensors
    )


@pytest.mark.parametrize(
    "adapter",
    [
        prompts("SST", "Wino grande.2"),
        prompts("ä/b", positions=False, dtype=torch.bfloat16),
        prompts("f64", dtype=torch.float64),
        lora(),
    ],
    ids=["two", "model positions", "float64", "lora"],
)
def test_comes_back_bit_by_bit(tmp_path, adapter):
    folder = save(adapter, tmp_path / "new" / "sst")
    back = open_adapter(folder)
    same(back, adapter)
    assert (back.method, back.family, back.tags, back.settings, back.base) == (
        adapter.method, adapter.family, adapter.tags, adapter.settings, adapter.base,
    )  # fmt: skip
    assert sorted(os.listdir(folder)) == ["adapter.json", "adapter.safetensors"]
    assert os.listdir(tmp_path / "new") == ["sst"]  # nothing else is left beside it
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8192
    if back.tags:
        assert SoftPrompts.understand(back.settings).tags == back.tags


def test_read_by_its_library(tmp_path):
    from safetensors.torch import load_file

    adapter = prompts("a")
    found = load_file(save(adapter, tmp_path / "a") / "adapter.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in adapter.tensors.items())


def test_found_by_a_run_or_a_file(tmp_path):
    save(prompts("a"), tmp_path / "run" / "adapter")
    for path in ("run", "run/adapter", "run/adapter/adapter.json", "run/adapter/adapter.safetensors"):
        assert open_adapter(tmp_path / path).names == ("a",)


def test_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = save(prompts("a"), tmp_path / "a")
    save(prompts("b"), folder)
    assert open_adapter(folder).names == ("b",)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(CheckpointError, match="No space left"):
            save(prompts("c"), folder)
    assert open_adapter(folder).names == ("b",)
    assert os.listdir(tmp_path) == ["a"]


def test_nothing_else_is_overwritten(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "final.tex").write_text("years")
    with pytest.raises(CheckpointError, match="something else lies there"):
        save(prompts("a"), tmp_path / "thesis")
    assert (tmp_path / "thesis" / "final.tex").read_text() == "years"


def cut(folder, name, size):
    path = folder / name
    path.write_bytes(path.read_bytes()[:size])


def flip(folder, name, place):
    content = bytearray((folder / name).read_bytes())
    content[place] ^= 1
    (folder / name).write_bytes(content)


def change(folder, **fields):
    content = json.loads((folder / "adapter.json").read_text())
    (folder / "adapter.json").write_text(json.dumps({**content, **fields}))


TAG = {"name": "a", "length": 2, "positions": True}
DAMAGES = {
    "cut": (lambda f: cut(f, "adapter.safetensors", 300), "adapter.safetensors is damaged"),
    "empty": (lambda f: cut(f, "adapter.safetensors", 0), "adapter.safetensors is damaged"),
    "flipped": (lambda f: flip(f, "adapter.safetensors", -1), "adapter.safetensors is damaged"),
    "gone": (lambda f: (f / "adapter.safetensors").unlink(), "adapter.safetensors cannot be read (No such file"),
    "half json": (lambda f: cut(f, "adapter.json", 100), "adapter.json is not JSON"),
    "a list": (lambda f: (f / "adapter.json").write_text("[1]"), "is not a JSON object"),
    "nothing said": (lambda f: (f / "adapter.json").write_text("{}"), "lacks what every adapter says"),
    "future": (lambda f: change(f, format_version=2), "of version 2, this Megalith reads up to 1"),
    "no version": (lambda f: change(f, format_version="1"), "of version '1'"),
    "longer": (lambda f: change(f, tags=[{**TAG, "length": 5}]), "prompts.0.tokens is [2, 32], its tag wants [5, 32]"),
    "more tags": (lambda f: change(f, tags=[TAG, {**TAG, "name": "b"}]), "prompts.1.tokens is missing"),
    "same tags": (lambda f: change(f, tags=[TAG, TAG]), "the tag 'a' comes twice"),
    "fewer tags": (lambda f: change(f, tags=[]), "there is no tag in it"),
    "no positions": (lambda f: change(f, tags=[{**TAG, "positions": False}]), "prompts.0.positions belongs to no tag"),
    "tags of text": (lambda f: change(f, tags="a"), "lacks what every adapter says"),
    "tasks of text": (lambda f: change(f, tasks={"a": {"before": "x"}}), "lacks what every adapter says"),
    "tasks of nothing": (lambda f: change(f, tasks={"a": {"behind": None}}), "lacks what every adapter says"),
    "no name": (lambda f: change(f, tags=[{**TAG, "name": ""}]), "a tag in it has no name"),
    "no method": (lambda f: change(f, method="ia3"), "its method is 'ia3', none of soft-prompt, p-tuning, lora"),
    "another method": (lambda f: change(f, method="lora"), "prompts.0.tokens is neither a lora_a nor a lora_b"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_clear_message(tmp_path, damage):
    folder = save(prompts("a"), tmp_path / "a")
    make, words = DAMAGES[damage]
    make(folder)
    with pytest.raises(CheckpointError) as caught:
        open_adapter(folder)
    assert words in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (
            lora(**{"blocks.0.mlp.up.lora_b": torch.ones(64, 3)}),
            "lora_a [2, 32] and lora_b [64, 3] do not multiply",
        ),
        (lora(**{"blocks.1.mlp.up.lora_a": torch.ones(2, 2)}), "blocks.1.mlp.up.lora_a has no other half"),
        (lora(**{"blocks.0.mlp.up.lora_b": torch.full((64, 2), torch.nan)}), "not finite"),
        (lora(**{"blocks.0.mlp.up.lora_b": torch.ones(64, 2).int()}), "holds int32"),
    ],
)
def test_what_is_no_adapter_is_not_written(tmp_path, adapter, words):
    with pytest.raises(CheckpointError) as caught:
        save(adapter, tmp_path / "a")
    assert words in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_what_is_no_adapter_is_told_with_what_is_there(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="there is no adapter in it; it holds manifest"):
        open_adapter(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_adapter(tmp_path / "nowhere")


def test_several_are_one_table():
    first, second = prompts("a", "b"), prompts("c", seed=1)
    both = joined([first, second])
    assert both.names == ("a", "b", "c")
    assert torch.equal(both.tensors["prompts.2.tokens"], second.tensors["prompts.0.tokens"])
    assert torch.equal(both.tensors["prompts.1.positions"], first.tensors["prompts.1.positions"])
    assert SoftPrompts.understand(both.settings).tags == both.tags
    assert joined([first]) is first


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (prompts("b", "a"), "the tag 'a' is in"),
        (lora(), "LoRA changes every row"),
        (prompts("b", base=Base("a2")), "it is for another base model"),
    ],
)
def test_what_cannot_be_one_table(other, words):
    with pytest.raises(ConfigError) as caught:
        joined([prompts("a"), other])
    assert words in str(caught.value)


def test_each_is_compared_with_the_first_that_knows():
    """PEFT's say nothing of their base: two that stand behind one of those may still be strangers."""
    silent = prompts("a", base=Base(name="gpt2"))
    for other, what in ((Base("a2", "", "t1"), "base model"), (Base("a1", "", "t2"), "tokenizer")):
        given = [silent, prompts("b"), prompts("c", base=other)]
        with pytest.raises(ConfigError, match=f"it is for another {what}"):
            joined(given)
        assert joined(given, force=True).base == Base("a1", "gpt.nemo", "t1")
    families = [replace(silent, family=name) for name in ("", "t5", "bart")]
    with pytest.raises(ConfigError, match="it is for another family"):
        joined([replace(each, tags=(), tensors={}) for each in families], force=True)
    assert joined([families[0], replace(prompts("b"), family="t5")]).family == "t5"


def test_another_base_or_tokenizer_is_refused_unless_forced():
    adapter = prompts("a")
    assert check_base(adapter, "gpt", Base("a1", "elsewhere", "t1")) == []
    assert check_base(adapter, "gpt", Base("", "", "")) == []  # what nobody knows is not compared
    for base, words in (
        (Base("a2", "", "t1"), "another base model: gpt.nemo"),
        (Base("a1", "", "t2"), "another tokenizer"),
        (Base("a2", "", "t2"), "another base model and another tokenizer"),
    ):
        with pytest.raises(CheckpointError, match="--force") as caught:
            check_base(adapter, "gpt", base)
        assert words in str(caught.value)
        (said,) = check_base(adapter, "gpt", base, force=True)
        assert words in said
    with pytest.raises(CheckpointError, match="made for a GPT, the base model is a T5"):
        check_base(adapter, "t5", Base(), force=True)


def test_only_models_of_its_width_take_it():
    model = tiny_model()
    with pytest.raises(CheckpointError, match="are 16 wide, the model 32"):
        install(model, prompts("a", width=16))
    with pytest.raises(CheckpointError, match="merged"):
        install(model, lora())
    config = BertConfig(vocab_size=50, num_layers=1, hidden_size=32, num_attention_heads=4)
    with pytest.raises(UnsupportedError, match="no place for virtual tokens"):
        install(Bert(config), prompts("a"))
    assert model.prompts is None
