"""NeMo's archives of every layout compute what `transformers` does, to 1e-10 in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megalith.generate.loading import load_model
from tests.golden import tiny
from tests.golden.nemo_files import GPT, Layout, gpt_keys, write
from tests.golden.whole import Whole, from_gpt2, from_llama

TOLERANCE = 1e-10
LLAMA_KEYS = {
    "ffn_hidden_size": 48,
    "encoder_seq_length": tiny.POSITIONS,
    "bias": False,
    "normalization": "rmsnorm",
    "position_embedding_type": "rope",
    "rotary_percentage": 1.0,
    "share_embeddings_and_output_weights": False,
    "nemo_version": "1.20.0",
}


def llama_keys(activation: str, groups: int = tiny.HEADS) -> dict[str, object]:
    return gpt_keys(**LLAMA_KEYS, activation=activation, num_query_groups=groups)


@pytest.fixture(scope="module")
def gpt2() -> dict[str, tuple[Whole, torch.Tensor]]:
    models = {activation: tiny.gpt2(activation) for activation in ("gelu_new", "gelu")}
    return {name: (from_gpt2(model), tiny.logits(model)) for name, model in models.items()}


def assert_same(path: Path, theirs: torch.Tensor) -> None:
    loaded = load_model(path, device="cpu", precision="64")
    with torch.no_grad():
        ours = loaded.model.logits(loaded.model(tiny.tokens()))
    assert (ours[..., : tiny.VOCABULARY] - theirs).abs().max() <= TOLERANCE


@pytest.mark.parametrize("container", ["tar", "gzip", "folder"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_gpt(tmp_path, gpt2, container, tp, pp):
    whole, theirs = gpt2["gelu_new"]
    layout = Layout(tp, pp, container, dots=tp == 1)
    assert_same(write(tmp_path / "megatron_gpt.nemo", whole, layout, gpt_keys()), theirs)


@pytest.mark.parametrize(
    ("keys", "activation"),
    [
        ({"bias_gelu_fusion": True}, "gelu_new"),
        ({"bias_gelu_fusion": False}, "gelu"),
        ({"bias_activation_fusion": False, "activation": "gelu"}, "gelu"),
        ({"bias_gelu_fusion": False, "openai_gelu": True}, "gelu_new"),
        ({"bias_gelu_fusion": False, "onnx_safe": True}, "gelu"),
    ],
)
def test_forms_of_gelu(tmp_path, gpt2, keys, activation):
    whole, theirs = gpt2[activation]
    assert_same(write(tmp_path / "a.nemo", whole, Layout(), gpt_keys(**keys)), theirs)


@pytest.mark.parametrize(("tree", "tp", "pp"), [("O2", 2, 1), ("core", 2, 1), ("core", 1, 2)])
def test_other_trees_of_gpt(tmp_path, gpt2, tree, tp, pp):
    whole, theirs = gpt2["gelu_new"]
    assert_same(write(tmp_path / "a.nemo", whole, Layout(tp, pp, tree=tree), gpt_keys()), theirs)


@pytest.mark.parametrize(
    ("tree", "activation", "groups"),
    [("gates apart", "swiglu", 8), ("V2.5", "fast-swiglu", 8), ("core", "fast-swiglu", 2)],
)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_llama(tmp_path, tree, activation, groups, tp, pp):
    model = tiny.llama(groups)
    path = write(
        tmp_path / "a.nemo", from_llama(model), Layout(tp, pp, tree=tree), llama_keys(activation, groups)
    )
    assert_same(path, tiny.logits(model))


def test_a_member_of_a_folder_stands_for_all_of_it(tmp_path, gpt2):
    whole, theirs = gpt2["gelu_new"]
    folder = write(tmp_path / "unpacked", whole, Layout(2, container="folder"), gpt_keys())
    for path in (
        folder / "model_config.yaml",
        folder / "mp_rank_01",
        folder / "mp_rank_01/model_weights.ckpt",
    ):
        assert_same(path, theirs)


def test_a_whole_run_configuration(tmp_path, gpt2):
    """Some archives keep the model's keys below `model`, behind other sections."""
    whole, theirs = gpt2["gelu_new"]
    keys = {"name": "megatron_gpt", "trainer": {"devices": 1}, "model": gpt_keys(), "target": GPT}
    assert_same(write(tmp_path / "a.nemo", whole, Layout(), keys), theirs)
