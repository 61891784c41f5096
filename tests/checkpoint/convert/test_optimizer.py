"""Optimizer state between our step folders and Megatron's files, both ways, and what is refused."""

from __future__ import annotations

import pytest
import torch

from megalith.checkpoint.convert.convert import Plan, convert
from megalith.checkpoint.convert.to_megatron import Sizes
from megalith.checkpoint.manifest import verify
from megalith.checkpoint.native import Checkpointer
from megalith.checkpoint.reading import read_state, read_tensors
from megalith.errors import CheckpointError
from megalith.models.config import ModelConfig
from megalith.models.family import FAMILIES, describe
from megalith.topology.topology import Topology
from tests.checkpoint.foreign_files import (
    BERT_LIKE,
    GPT2_LIKE,
    LLAMA_LIKE,
    SIDED_LIKE,
    hugging_face,
    random_model,
)

PADDED = ("token_embedding.weight", "head.weight", "output_bias.bias")
CONFIG = "model: {optim: {lr: 3e-4, betas: [0.9, 0.95], eps: 1.0e-7, weight_decay: 0.1}}\n"


def native(root, fields, *, family="gpt"):
    """A step folder with random weights and moments in fp32."""
    config = FAMILIES[family][1](**fields)
    draw = torch.Generator().manual_seed(4)
    tensors = {f"model.{n}": p.detach() for n, p in random_model(config, torch.float32).named_parameters()}
    for name, weight in list(tensors.items()):
        for kind in ("exp_avg", "exp_avg_sq"):
            moment = torch.rand(weight.shape, generator=draw)
            if name.removeprefix("model.") in PADDED:
                moment[config.vocab_size :] = 0
            tensors[f"optim.{name.removeprefix('model.')}.{kind}"] = moment
    state = describe(family, config) | {
        "consumed_samples": 640,
        "consumed_tokens": 7680,
        "updates": {"step": 78, "samples": 620, "tokens": 7440},
        "scaler": {"scale": 4096.0},
        "skipped": 2,
        "skipped_in_a_row": 0,
        "seed": 7,
    }
    return Checkpointer(root, Topology.single()).save(80, tensors, state, config_yaml=CONFIG)


def tensors_of(folder):
    return {
        lazy.name: lazy.read() for prefix in ("model.", "optim.") for lazy in read_tensors(folder, prefix)
    }


@pytest.mark.parametrize(
    ("fields", "sizes", "dtype", "version"),
    [
        (GPT2_LIKE, (1, 1, 1), "fp32", 3),
        (GPT2_LIKE, (2, 2, 2), "fp16", 3),
        (GPT2_LIKE, (4, 2, 1), "bf16", 0),
        (LLAMA_LIKE, (2, 2, 1), "bf16", 3),
        (LLAMA_LIKE, (1, 2, 2), "fp32", 2),
        (BERT_LIKE, (2, 2, 1), "fp16", 3),
        (BERT_LIKE, (1, 1, 1), "fp32", 1),
        (SIDED_LIKE, (2, 3, 1), "bf16", 3),
        (SIDED_LIKE, (1, 2, 1), "fp32", 0),
    ],
)
def test_there_and_back_nothing_changes(tmp_path, fields, sizes, dtype, version):
    families = {str(BERT_LIKE): "bert", str(SIDED_LIKE): "t5"}
    start = native(tmp_path / "run", fields, family=families.get(str(fields), "gpt"))
    plan = Plan("megatron", Sizes(*sizes), dtype=dtype, megatron_version=version)
    there = convert(start, tmp_path / "megatron", plan).folder
    assert (there / "latest_checkpointed_iteration.txt").read_text() == "80"
    back = convert(there, tmp_path / "back", Plan("native", optimizer=True)).folder
    assert verify(back) == []
    one, other = tensors_of(start), tensors_of(back)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        rows = fields["vocab_size"] if tensor.shape[0] != other[name].shape[0] else len(tensor)
        assert torch.equal(tensor[:rows], other[name][:rows]), name
    state = read_state(back)
    assert (state["step"], state["updates"]["step"]) == (80, 78)
    assert (state["consumed_samples"], state["consumed_tokens"]) == (640, 7680)
    assert state["scaler"]["scale"] == (4096.0 if dtype != "fp32" else 1.0)


ORDER = [
    "embedding.word_embeddings.weight", "embedding.position_embeddings.weight",
    *(
        f"encoder.layers.{i}.{name}.{kind}"
        for i in range(4)
        for name in (
            "input_layernorm", "self_attention.query_key_value", "self_attention.dense",
            "post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h",
        )
        for kind in ("weight", "bias")
    ),
    "encoder.final_layernorm.weight", "encoder.final_layernorm.bias",
]  # fmt: skip
"""Parameters as Megatron's modules have them: GPTModel's language_model, without what is not there."""


def test_megatron_finds_its_numbers_in_the_order_of_its_modules(tmp_path):
    """By torch alone: groups, numbers, fp32 weights that round to the model's, the settings of the run."""
    start = native(tmp_path / "run", GPT2_LIKE)
    there = convert(start, tmp_path / "megatron", Plan("megatron", dtype="fp16")).folder
    content = torch.load(there / "iter_0000080/mp_rank_00/model_optim_rng.pt", weights_only=True)
    language = content["model"]["language_model"]
    flat = {f"encoder.{name}": tensor for name, tensor in language["encoder"].items()}
    for name in ("word_embeddings", "position_embeddings"):
        flat[f"embedding.{name}.weight"] = language["embedding"][name]["weight"]
    assert flat.keys() == set(ORDER)
    groups = [[name for name in ORDER if (flat[name].ndim > 1) is matrix] for matrix in (True, False)]
    adam = content["optimizer"]["optimizer"]
    assert [group["params"] for group in adam["param_groups"]] == [
        list(range(len(groups[0]))),
        list(range(len(groups[0]), len(ORDER))),
    ]
    assert [group["weight_decay"] for group in adam["param_groups"]] == [0.1, 0.0]
    assert {group["betas"] for group in adam["param_groups"]} == {(0.9, 0.95)}
    assert {group["step"] for group in adam["param_groups"]} == {78}
    for names, masters in zip(groups, content["optimizer"]["fp32_from_fp16_params"], strict=True):
        for name, master in zip(names, masters, strict=True):
            assert master.dtype == torch.float32
            assert torch.equal(master.half(), flat[name]), name
    ours = tensors_of(start)
    number = [name for group in groups for name in group].index("encoder.layers.2.mlp.dense_4h_to_h.weight")
    for moment in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(adam["state"][number][moment], ours[f"optim.blocks.2.mlp.down.weight.{moment}"])
    assert float(content["optimizer"]["grad_scaler"]["scale"]) == 4096.0


SIDED_MATRICES = [
    "embedding.word_embeddings", "embedding.position_embeddings",
    *(
        f"{side}.layers.{i}.{name}"
        for side, layers in (("encoder", 2), ("decoder", 4))
        for i in range(layers)
        for name in (
            "self_attention.query_key_value", "self_attention.dense",
            *(("inter_attention.query", "inter_attention.key_value", "inter_attention.dense") if side == "decoder" else ()),
            "mlp.dense_h_to_4h", "mlp.dense_4h_to_h",
        )
    ),
]  # fmt: skip
"""Matrices as the modules of Megatron's T5 have them; its head has a bias alone."""


def test_an_encoder_decoder_has_its_numbers_tower_by_tower(tmp_path):
    start = native(tmp_path / "run", SIDED_LIKE, family="t5")
    there = convert(start, tmp_path / "megatron", Plan("megatron", dtype="fp16")).folder
    content = torch.load(there / "iter_0000080/mp_rank_00/model_optim_rng.pt", weights_only=True)
    language = content["model"]["language_model"]
    masters = content["optimizer"]["fp32_from_fp16_params"][0]
    assert len(masters) == len(SIDED_MATRICES)
    for name, master in zip(SIDED_MATRICES, masters, strict=True):
        side, _, rest = name.partition(".")
        weight = language[side][f"{rest}.weight"] if "layers" in rest else language[side][rest]["weight"]
        assert torch.equal(master.half(), weight), name


def test_the_copy_of_berts_table_is_numbered_before_its_heads(tmp_path):
    """On the last of several stages: Megatron makes the copy when the language model is there, then the heads."""
    start = native(tmp_path / "run", BERT_LIKE, family="bert")
    there = convert(start, tmp_path / "megatron", Plan("megatron", Sizes(1, 2), dtype="fp16")).folder
    content = torch.load(there / "iter_0000080/mp_rank_00_001/model_optim_rng.pt", weights_only=True)
    model, masters = content["model"], content["optimizer"]["fp32_from_fp16_params"][0]
    last = [
        model["language_model"]["pooler"]["dense.weight"],
        model["word_embeddings_for_head"]["weight"],
        model["lm_head"]["dense.weight"],
        model["binary_head"]["weight"],
    ]
    for master, weight in zip(masters[-4:], last, strict=True):
        assert torch.equal(master.half(), weight)


def test_torch_goes_on_with_it(tmp_path):
    """torch.optim.AdamW takes the state of an fp32 model and counts its steps on."""
    there = convert(native(tmp_path / "run", GPT2_LIKE), tmp_path / "megatron", Plan("megatron")).folder
    content = torch.load(there / "iter_0000080/mp_rank_00/model_optim_rng.pt", weights_only=True)
    adam = content["optimizer"]
    shapes = [adam["state"][number]["exp_avg"].shape for number in range(len(adam["state"]))]
    live = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    first = len(adam["param_groups"][0]["params"])
    optimizer = torch.optim.AdamW([{"params": live[:first]}, {"params": live[first:]}])
    optimizer.load_state_dict(adam)
    for parameter in live:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(int(state["step"]) == 79 for state in optimizer.state.values())


def test_what_cannot_go_along_is_said(tmp_path):
    start = native(tmp_path / "run", GPT2_LIKE)
    with pytest.raises(CheckpointError, match="no place for optimizer state"):
        convert(start, tmp_path / "x", Plan("huggingface", optimizer=True))
    with pytest.raises(CheckpointError, match="belongs to fp32 weights"):
        convert(start, tmp_path / "x", Plan("native", dtype="bf16"))
    weights = convert(start, tmp_path / "weights", Plan("megatron", optimizer=False)).folder
    assert (weights / "latest_checkpointed_iteration.txt").read_text() == "release"
    with pytest.raises(CheckpointError, match="no optimizer state"):
        convert(weights, tmp_path / "x", Plan("native", optimizer=True))
    folder = hugging_face(tmp_path / "hf", random_model(ModelConfig(**GPT2_LIKE)))
    with pytest.raises(CheckpointError, match="optimizer state of huggingface is not read"):
        convert(folder, tmp_path / "x", Plan("native", optimizer=True))
    assert not (tmp_path / "x").exists()


def test_files_of_the_distributed_optimizer_stay_behind_by_name(tmp_path):
    start = native(tmp_path / "run", GPT2_LIKE)
    there = convert(start, tmp_path / "megatron", Plan("megatron", optimizer=False)).folder
    (there / "release/mp_rank_00/distrib_optim.pt").write_bytes(b"")
    done = convert(there, tmp_path / "weights", Plan("native"))
    assert any("distributed optimizer, which is left behind" in notice for notice in done.notices)
    with pytest.raises(CheckpointError, match="files of the distributed optimizer"):
        convert(there, tmp_path / "x", Plan("native", optimizer=True))


def test_another_numbering_is_noticed(tmp_path):
    """Two fp32 weights of one shape that changed places no longer round to the model's own."""
    start = native(tmp_path / "run", GPT2_LIKE)
    there = convert(start, tmp_path / "megatron", Plan("megatron", dtype="bf16")).folder
    file = there / "iter_0000080/mp_rank_00/model_optim_rng.pt"
    content = torch.load(file, weights_only=True)
    masters = content["optimizer"]["fp32_from_fp16_params"][0]
    same = [i for i, tensor in enumerate(masters) if tensor.shape == masters[2].shape]
    masters[same[0]], masters[same[1]] = masters[same[1]], masters[same[0]]
    torch.save(content, file)
    with pytest.raises(CheckpointError, match="numbered in an unknown order"):
        convert(there, tmp_path / "x", Plan("native"))
    done = convert(there, tmp_path / "weights", Plan("native", optimizer=False))
    assert done.certificate["max_abs_logit_error"] == 0
