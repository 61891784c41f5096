"""What `checkpoint convert` writes, read by others: Megatron's files by torch alone, Hugging Face's folders by transformers.

Sources are folders that transformers saved itself, in float64; every number must come back as it is.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM

from megalith.checkpoint.convert.convert import Plan, convert
from megalith.checkpoint.convert.to_megatron import Sizes
from megalith.generate.loading import load_model
from tests.golden import tiny
from tests.golden.megatron_back import read_back
from tests.golden.whole import Whole, from_gpt2, from_llama

FAMILIES = {
    "gpt2": (tiny.gpt2, from_gpt2, tiny.HEADS),
    "llama": (tiny.llama, from_llama, 2),
    "tied": (lambda: tiny.llama(4, True), from_llama, 4),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Family → (folder of transformers, the model, its weights)."""
    found = {}
    for name, (make, whole, _) in FAMILIES.items():
        model, folder = make(), tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        found[name] = folder, model, whole(model)
    return found


def assert_equal(one: Whole, other: Whole) -> None:
    assert torch.equal(one.word, other.word)
    for a, b in ((one.position, other.position), (one.output, other.output)):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    assert one.final_norm.keys() == other.final_norm.keys()
    for mine, theirs in zip([one.final_norm, *one.layers], [other.final_norm, *other.layers], strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert torch.equal(mine[name], theirs[name]), name


@pytest.mark.parametrize(
    ("family", "version", "sizes"),
    [
        ("gpt2", 3, (1, 1, 1)),
        ("gpt2", 3, (4, 2, 1)),
        ("gpt2", 3, (1, 2, 2)),
        ("gpt2", 2, (2, 1, 1)),
        ("gpt2", 1, (2, 1, 1)),
        ("gpt2", 1, (4, 2, 1)),
        ("gpt2", 0, (2, 2, 1)),
        ("gpt2", 0, (4, 1, 1)),
        ("llama", 3, (2, 2, 2)),
        ("llama", 2, (2, 1, 1)),
        ("tied", 3, (4, 4, 1)),
    ],
)
def test_megatron_files_hold_the_weights(tmp_path, saved, family, version, sizes):
    folder, _, whole = saved[family]
    convert(folder, tmp_path / "out", Plan("megatron", Sizes(*sizes), megatron_version=version))
    back = read_back(tmp_path / "out", tiny.HEADS, FAMILIES[family][2], tiny.VOCABULARY)
    assert_equal(back, whole)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_transformers_loads_what_went_through_every_format(tmp_path, saved, family):
    """Hugging Face → Megatron of two ranks → of two stages → native → Hugging Face."""
    folder, model, _ = saved[family]
    steps = [
        Plan("megatron", Sizes(ranks=2)),
        Plan("megatron", Sizes(stages=2)),
        Plan("native"),
        Plan("huggingface", shard=40_000),
    ]
    for number, plan in enumerate(steps):
        folder = convert(folder, tmp_path / str(number), plan).folder
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    back = tiny.widened(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval())
    assert (tiny.logits(back) - tiny.logits(model)).abs().max() <= 1e-10
    ours = load_model(folder, device="cpu").model
    with torch.no_grad():
        mine = ours.logits(ours(tiny.tokens()))
    assert (mine - tiny.logits(model)).abs().max() <= 1e-10


@pytest.mark.parametrize("make", [tiny.mistral, tiny.qwen2, tiny.neox], ids=lambda make: make.__name__)
def test_other_families_come_back(tmp_path, make):
    model = make()
    model.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "native", Plan("native"))
    folder = convert(tmp_path / "native", tmp_path / "back", Plan("huggingface")).folder
    back = tiny.widened(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval())
    assert (tiny.logits(back) - tiny.logits(model)).abs().max() <= 1e-10
