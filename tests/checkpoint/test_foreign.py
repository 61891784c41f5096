"""What other programs saved, found and opened: every place that a person may name, what files do not say, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from megalith.checkpoint.foreign import find, load, open_foreign, recognise
from megalith.checkpoint.formats.foreign import padding
from megalith.checkpoint.formats.huggingface_config import read_config
from megalith.checkpoint.formats.huggingface_export import write_config
from megalith.checkpoint.formats.megatron_args import Facts, settle
from megalith.checkpoint.formats.megatron_shapes import Seen
from megalith.checkpoint.tensor_files import open_tensors, write_tensors
from megalith.errors import CheckpointError
from megalith.models.config import ModelConfig, effective
from megalith.models.presets import get
from tests.checkpoint.foreign_files import (
    GPT2_LIKE,
    LLAMA_LIKE,
    arguments,
    hugging_face,
    megatron,
    random_model,
)


@pytest.fixture(scope="module")
def gpt2():
    return random_model(ModelConfig(**GPT2_LIKE))


@pytest.fixture(scope="module")
def llama():
    return random_model(ModelConfig(**LLAMA_LIKE))


def same(foreign, model):
    """Every tensor of the model, in the rows of the true vocabulary where the rest is another format's padding."""
    assert foreign.tensors.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        found = foreign.tensors[name].read()[: len(parameter)]
        assert torch.equal(found, parameter[: len(found)]), name


def refusal(path, **told):
    with pytest.raises(CheckpointError) as caught:
        list(open_foreign(path, **told).tensors)
    return str(caught.value)


# -- where ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "named", ["", "latest_checkpointed_iteration.txt", "iter_0000007", "iter_0000007/mp_rank_01_000",
              "iter_0000007/mp_rank_01_000/model_optim_rng.pt"],
)  # fmt: skip
def test_a_part_of_a_megatron_checkpoint_stands_for_all_of_it(tmp_path, gpt2, named):
    megatron(tmp_path, gpt2, sizes=(2, 2))
    found = find(tmp_path / named)
    assert (found.kind, found.folder) == ("megatron", tmp_path / "iter_0000007")
    foreign = open_foreign(tmp_path / named, vocab_size=29)
    same(foreign, gpt2)
    assert foreign.state == {"step": 7, "consumed_samples": 56}
    assert foreign.provenance["tensor_model_parallel_size"] == 2
    assert foreign.config.padded_vocab_size == 32


@pytest.mark.parametrize("named", ["", "config.json", "model.safetensors"])
def test_a_folder_of_transformers_or_a_file_in_it(tmp_path, llama, named):
    hugging_face(tmp_path, llama)
    assert recognise(tmp_path / named) == "huggingface"
    same(open_foreign(tmp_path / named), llama)


def test_a_bare_file_and_a_link(tmp_path, gpt2):
    megatron(tmp_path / "run", gpt2)
    shutil.copy(tmp_path / "run/iter_0000007/mp_rank_00/model_optim_rng.pt", tmp_path / "gpt.pt")
    (tmp_path / "link.pt").symlink_to("gpt.pt")
    same(open_foreign(tmp_path / "link.pt"), gpt2)


def test_other_folders_are_nobodys(tmp_path):
    assert recognise(tmp_path) is None
    (tmp_path / "config.json").write_text('{"name": "an experiment"}')
    assert recognise(tmp_path) is None
    with pytest.raises(
        CheckpointError, match=r"config\.json \(Hugging Face\), latest_checkpointed_iteration\.txt"
    ):
        find(tmp_path)


def test_a_mistyped_path_has_near_names(tmp_path, gpt2):
    megatron(tmp_path / "gpt", gpt2)
    with pytest.raises(CheckpointError, match=r"did you mean .*gpt"):
        find(tmp_path / "gptt")


# -- Megatron ---------------------------------------------------------------------------------------------------------


def test_the_stored_vocabulary_is_kept_and_said(tmp_path, gpt2):
    foreign = open_foreign(megatron(tmp_path, gpt2))
    assert foreign.config.vocab_size == 32
    assert any("the true vocabulary is not known" in notice for notice in foreign.notices)
    assert open_foreign(tmp_path, vocab_size=29).notices == ()


def test_a_vocabulary_larger_than_the_table_is_refused(tmp_path, gpt2):
    assert "33 tokens, its table 32 rows" in refusal(megatron(tmp_path, gpt2), vocab_size=33)


def test_heads_must_be_told_where_shapes_do_not(tmp_path, gpt2):
    megatron(tmp_path, gpt2, args={})
    said = refusal(tmp_path)
    assert "num_attention_heads" in said
    assert "--config-file" in said
    (tmp_path / "sizes.yaml").write_text("model:\n  num-attention-heads: 4\n  bias-gelu-fusion: false\n")
    foreign = open_foreign(tmp_path, config_file=tmp_path / "sizes.yaml", vocab_size=29)
    same(foreign, gpt2)
    assert foreign.config.activation == "gelu_erf"
    assert "rows of queries, keys and values" in refusal(
        tmp_path, config_file={"num_attention_heads": 4, "kv_channels": 8}
    )
    assert "num_layers: 5 by num_layers (the model's keys), 4 by the tensors' shapes" in refusal(
        tmp_path, config_file={"num_attention_heads": 4, "num_layers": 5}
    )


def test_a_file_that_says_otherwise_wins_over_nobody(tmp_path, gpt2):
    megatron(tmp_path, gpt2)
    said = refusal(tmp_path, config_file={"num_attention_heads": 2})
    assert "num_attention_heads: 4 in the file's args, 2 in the model's keys" in said


@pytest.mark.parametrize(
    ("name", "value"), [("num_experts", 8), ("apply_layernorm_1p", True), ("multi_latent_attention", True)]
)
def test_other_models_are_refused_by_the_name_of_their_argument(tmp_path, gpt2, name, value):
    megatron(tmp_path, gpt2, args=arguments(gpt2.config, 1, 1) | {name: value})
    assert f"{name}={value}" in refusal(tmp_path)


def test_a_position_type_that_ours_lacks_is_refused(tmp_path, gpt2):
    megatron(tmp_path, gpt2, args=arguments(gpt2.config, 1, 1) | {"position_embedding_type": "alibi"})
    assert "position_embedding_type='alibi'" in refusal(tmp_path)


def test_missing_ranks_are_named(tmp_path, gpt2):
    megatron(tmp_path, gpt2, sizes=(2, 2))
    shutil.rmtree(tmp_path / "iter_0000007/mp_rank_00_001")
    assert "mp_rank_00_001" in refusal(tmp_path)
    shutil.rmtree(tmp_path / "iter_0000007/mp_rank_01_001")
    said = refusal(tmp_path)
    assert "2 tensor-parallel ranks and 2 pipeline stages by its args, there are files of 2 and 1" in said


def test_a_tracker_that_leads_nowhere(tmp_path, gpt2):
    megatron(tmp_path, gpt2)
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("9")
    assert "it says 9, but there is no iter_0000009" in refusal(tmp_path)
    tracker.write_text("soon")
    assert "it says 'soon', not a number or release" in refusal(tmp_path)
    tracker.unlink()
    assert "which says which iteration is complete" in refusal(tmp_path)


def test_an_unknown_version_is_refused(tmp_path, gpt2):
    megatron(tmp_path, gpt2)
    file = tmp_path / "iter_0000007/mp_rank_00/model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    torch.save(content | {"checkpoint_version": 4.0}, file)
    assert "its checkpoint_version is 4.0; 0 to 3 are known" in refusal(tmp_path)
    content["model"]["lm_head"] = {"bias": torch.zeros(32)}
    torch.save(content, file)
    assert "missing: lm_head.layernorm.bias" in refusal(tmp_path)  # a BERT, but half of one
    torch.save({"weights": torch.zeros(3)}, file)
    assert "there is no `model` in it; it holds weights" in refusal(tmp_path)


# -- transformers -----------------------------------------------------------------------------------------------------

CONFIGS = {
    "gpt2": GPT2_LIKE | {"activation": "gelu_erf", "share_embeddings_and_output_weights": False},
    "gpt2-scale": GPT2_LIKE | {"attention_scale": 1.0, "hidden_dropout": 0.1, "ffn_hidden_size": 40},
    "llama": LLAMA_LIKE,
    "llama-biases": LLAMA_LIKE | {"bias": True, "kv_channels": 8, "activation": "geglu"},
    "llama-3.1": LLAMA_LIKE
    | {"rotary_base": 500000.0, "rotary_scaling": {"type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8}},
    "qwen2": LLAMA_LIKE | {"qkv_bias": True},
    "neox": GPT2_LIKE | {"position_embedding_type": "rope", "rotary_percentage": 0.5, "share_embeddings_and_output_weights": False},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_there_and_back(name):
    config = ModelConfig(**CONFIGS[name])
    values = write_config(config, dtype="float32", ids={})
    kind, back, notices = read_config(json.loads(json.dumps(values)), where="config.json")
    assert kind == name.partition("-")[0].replace("neox", "gpt_neox")
    ours, theirs = effective(config), effective(back)
    unsaid = ("make_vocab_size_divisible_by", "init_method_std", "use_scaled_init_method")
    assert {k: v for k, v in ours.items() if k not in unsaid} == {
        k: v for k, v in theirs.items() if k not in unsaid
    }
    assert notices == ()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"transformer_block_type": "post_ln"}, "model.transformer_block_type: post_ln"),
        ({"position_embedding_type": "none"}, "model.position_embedding_type: none"),
        ({"activation": "squared_relu"}, "model.activation: squared_relu"),
        ({"position_embedding_type": "rope", "rotary_interleaved": True}, "model.rotary_interleaved: True"),
        ({"num_query_groups": 2}, "model.num_query_groups: 2"),
        ({"bias": False}, "model.bias: False"),
    ],
)
def test_what_transformers_has_nothing_like_is_named(fields, said):
    with pytest.raises(CheckpointError) as caught:
        write_config(ModelConfig(**GPT2_LIKE | fields), dtype="float32", ids={})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mamba"}, "its model_type is 'mamba'"),
        ({"hidden_act": "quick_gelu"}, "hidden_act: 'quick_gelu' is none of"),
        ({"attention_bias": True}, "attention_bias: True with mlp_bias False"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling: rope_type 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling: rope_type"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: ours has nothing like it"),
        ({"num_hidden_layers": None}, "num_hidden_layers: is missing"),
        ({"model_type": "mistral", "sliding_window": 4}, "sliding_window: 4, fewer than the 12 positions"),
        ({"model_type": "mistral", "max_position_embeddings": 8192}, "sliding_window: 4096, fewer than"),
        ({"model_type": "gpt_neox"}, "use_parallel_residual: True; ours is like False only"),
    ],
)  # fmt: skip
def test_what_ours_cannot_be_is_refused_by_its_key(changes, said):
    values = write_config(ModelConfig(**LLAMA_LIKE), dtype="float32", ids={}) | changes
    if "rope_scaling" in changes:
        del values["rope_parameters"]
    with pytest.raises(CheckpointError) as caught:
        read_config(values, where="config.json")
    assert said in str(caught.value)


def test_harmless_windows_and_unknown_keys():
    values = write_config(ModelConfig(**LLAMA_LIKE), dtype="float32", ids={})
    mistral = values | {"model_type": "mistral", "sliding_window": 12}
    assert read_config(mistral, where="config.json")[0] == "mistral"
    qwen = values | {"model_type": "qwen2", "sliding_window": 4, "use_sliding_window": False}
    assert read_config(qwen, where="config.json")[1].qkv_bias
    notices = read_config(values | {"vision": 3}, where="config.json")[2]
    assert notices == ("config.json has keys that are taken to change nothing: vision",)


def test_shards_by_an_index(tmp_path, llama):
    hugging_face(tmp_path, llama)
    whole = {lazy.name: lazy.read() for lazy in open_tensors(tmp_path / "model.safetensors")}
    (tmp_path / "model.safetensors").unlink()
    names = sorted(whole)
    where = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        write_tensors(tmp_path / file, {name: whole[name] for name in names if where[name] == file})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    same(open_foreign(tmp_path), llama)
    index.write_text(json.dumps({"weight_map": where | {names[0]: "part-1.safetensors"}}))
    assert f"part-1.safetensors does not hold {names[0]}, as model.safetensors.index.json says" in refusal(
        tmp_path
    )
    index.write_text(json.dumps({"weight_map": where | {names[0]: "../part-0.safetensors"}}))
    assert "which is no file of its folder" in refusal(tmp_path)
    index.write_text(json.dumps({"weight_map": where | {names[0]: "part-9.safetensors"}}))
    assert "it names part-9.safetensors: not there" in refusal(tmp_path)
    index.write_text("{}")
    assert "it has no weight_map" in refusal(tmp_path)


# -- loading ----------------------------------------------------------------------------------------------------------


def test_a_model_of_another_shape_is_refused_before_anything_is_read(tmp_path, gpt2):
    foreign = open_foreign(hugging_face(tmp_path, gpt2))
    tensors = {f"model.{name}": torch.full_like(p, 7.0) for name, p in gpt2.named_parameters()}
    tensors["model.final_norm.weight"] = torch.full((17,), 7.0)
    with pytest.raises(CheckpointError, match=r"final_norm\.weight: \[16\] in the checkpoint, \[17\] here"):
        load(foreign.as_model(gpt2.config), tensors)
    assert all((tensor == 7.0).all() for tensor in tensors.values())


def test_weights_are_cast_to_what_waits_for_them(tmp_path, llama):
    foreign = open_foreign(hugging_face(tmp_path, llama)).as_model(llama.config)
    tensors = {f"model.{name}": torch.empty(p.shape) for name, p in llama.named_parameters()}
    load(foreign, tensors)
    for name, parameter in llama.named_parameters():
        assert torch.equal(tensors[f"model.{name}"], parameter.float()), name


def test_heads_of_the_released_345m_are_known():
    """Its file says nothing of itself; 24 layers of width 1024 with 1024 positions were published with 16 heads."""
    seen = Seen(
        layers=24, width=1024, rows=50304, positions=1024, ffn=4096, query_key_value=3072,
        gated=False, bias=True, qkv_bias=True, norm_bias=True, output=False,
    )  # fmt: skip
    facts = settle(Facts({}, ""), seen, where="here")
    config = ModelConfig(**facts.fields, vocab_size=50257, make_vocab_size_divisible_by=padding(50257, 50304))
    assert effective(config) == effective(get("gpt2-345m"))
    assert facts.origins["num_attention_heads"] == "the released 345M model of this shape"


@pytest.mark.parametrize(
    ("args", "activation"),
    [
        ({}, "gelu_tanh"),
        ({"bias_gelu_fusion": True, "onnx_safe": True}, "gelu_tanh"),
        ({"bias_gelu_fusion": False, "openai_gelu": True}, "gelu_tanh"),
        ({"bias_gelu_fusion": False, "onnx_safe": True}, "gelu_erf"),
        ({"bias_gelu_fusion": False}, "gelu_erf"),
        ({"openai_gelu": False}, "gelu_erf"),
        ({"squared_relu": True}, "squared_relu"),
    ],
)
def test_the_form_of_gelu_is_what_the_arguments_ran(tmp_path, gpt2, args, activation):
    said = {k: v for k, v in arguments(gpt2.config, 1, 1).items() if k not in ("bias_gelu_fusion", "swiglu")}
    foreign = open_foreign(megatron(tmp_path, gpt2, args=said | args))
    assert foreign.config.activation == activation


def test_a_tokenizer_that_the_table_was_not_padded_for_is_doubted(tmp_path):
    megatron(tmp_path, random_model(ModelConfig(**GPT2_LIKE | {"vocab_size": 200})))
    (notice,) = open_foreign(tmp_path, vocab_size=29).notices
    assert "its table of 200 rows is not what 29 tokens are padded to" in notice
    assert open_foreign(tmp_path, vocab_size=199).notices == ()
    assert (padding(50257, 50304), padding(50257, 51200), padding(32000, 50304)) == (128, 1024, None)


def test_padding_for_three_ranks_is_not_doubted(tmp_path):
    fields = GPT2_LIKE | {"vocab_size": 25, "hidden_size": 24, "num_attention_heads": 6}
    model = random_model(ModelConfig(**fields))
    said = arguments(model.config, 3, 1) | {"make_vocab_size_divisible_by": 8}
    megatron(tmp_path, model, sizes=(3, 1), args=said)
    foreign = open_foreign(tmp_path, vocab_size=25)
    assert foreign.notices == ()
    assert foreign.config.padded_vocab_size == 48
