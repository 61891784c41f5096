"""Every table there and back: what is exported and imported again is what it was, for every family, version, TP and PP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megalith.checkpoint.exported import foreigns
from megalith.checkpoint.formats.huggingface_tables import GPT2, LLAMA, NEOX
from megalith.checkpoint.formats.megatron_stages import divide, join
from megalith.checkpoint.formats.megatron_tables import CORE, legacy
from megalith.checkpoint.mapped import natives
from megalith.checkpoint.mapping import Halves, HeadOrder, Heads, Transposed, Woven
from megalith.checkpoint.tensor_files import open_tensors, write_tensors
from megalith.errors import CheckpointError
from megalith.models.config import ModelConfig
from megalith.models.gpt import GPT
from tests.checkpoint.foreign_files import Kept

SHAPE = {
    "vocab_size": 29,
    "make_vocab_size_divisible_by": 8,
    "num_layers": 4,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
}
GPT_LIKE = {
    "tied": {},
    "untied": {"share_embeddings_and_output_weights": False},
    "no-bias": {"bias": False, "ffn_hidden_size": 24},
}
LLAMA_LIKE = {
    "llama": {"share_embeddings_and_output_weights": False},
    "grouped": {"num_query_groups": 4, "num_attention_heads": 8, "kv_channels": 4},
    "qwen2": {"qkv_bias": True},
    "biases": {"bias": True},
}
LLAMA_BASE = {
    "position_embedding_type": "rope",
    "normalization": "rmsnorm",
    "activation": "swiglu",
    "bias": False,
    "ffn_hidden_size": 24,
}
CONFIGS = {name: SHAPE | more for name, more in GPT_LIKE.items()} | {
    name: SHAPE | LLAMA_BASE | more for name, more in LLAMA_LIKE.items()
}
MEGATRON = {f"v{version}": legacy(version) for version in range(4)} | {"core": CORE}


CASES = [
    (form, name) for form in MEGATRON for name in CONFIGS if form not in ("v0", "v1") or name != "grouped"
]
"""Grouped queries came later than version 1."""


def model_tensors(config: ModelConfig) -> dict[str, Kept]:
    """Random numbers; zero in the rows that pad the vocabulary."""
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}
    draw = torch.Generator().manual_seed(0)
    found = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    for name in ("token_embedding.weight", "head.weight"):
        if name in found:
            found[name][config.vocab_size :] = 0
    return {name: Kept(name, tensor) for name, tensor in found.items()}


def heads(config: ModelConfig) -> Heads:
    return Heads(config.head_dim, config.num_attention_heads // config.kv_heads)


def shapes(tensors):
    return {name: tensor.shape for name, tensor in tensors.items()}


def same(found, tensors):
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = found[name].read()
        assert torch.equal(read, tensor.tensor), name
        stop = min(3, len(tensor.tensor))
        assert torch.equal(found[name].rows(1, stop), tensor.tensor[1:stop]), name


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("form", "name"), CASES)
def test_megatron_there_and_back(form, name, ranks, stages):
    config, table = ModelConfig(**CONFIGS[name]), MEGATRON[form]
    tensors = model_tensors(config)
    cuts = foreigns(table, tensors, heads(config), tensor_parallel=ranks, vocabulary_rows=40)
    assert all(len(parts) == ranks for parts in cuts.values())
    files = divide(table, list(cuts), stages)
    assert sum(len(stage) for stage in files) >= len(cuts)
    chunks = [[{local: cuts[whole] for local, whole in stage.items()}] for stage in files]
    if stages == 2:
        assert not any("layers.2." in local for stage in files for local in stage)
    back = natives(table, shapes(tensors), join(chunks), heads(config), where="here")
    same(back, tensors)


NEOX_LIKE = SHAPE | {"position_embedding_type": "rope", "activation": "gelu_erf"}
HUGGING_FACE = {
    **{f"gpt2-{name}": (GPT2, CONFIGS[name]) for name in GPT_LIKE},
    **{f"llama-{name}": (LLAMA, CONFIGS[name]) for name in LLAMA_LIKE},
    "neox-tied": (NEOX, NEOX_LIKE),
    "neox-untied": (NEOX, NEOX_LIKE | {"share_embeddings_and_output_weights": False}),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_there_and_back(name):
    table, fields = HUGGING_FACE[name]
    config = ModelConfig(**fields)
    tensors = model_tensors(config)
    cuts = foreigns(table, tensors, heads(config), vocabulary_rows=config.vocab_size)
    same(natives(table, shapes(tensors), cuts, heads(config), where="here"), tensors)


def test_a_format_that_lacks_a_tensor_names_it():
    tensors = model_tensors(ModelConfig(**CONFIGS["tied"]))
    with pytest.raises(CheckpointError, match=r"Llama has no place for position_embedding\.weight"):
        foreigns(LLAMA, tensors, Heads(4, 1))


def foreign(table=GPT2, name="tied", **changes):
    config = ModelConfig(**CONFIGS[name])
    tensors = model_tensors(config)
    found = foreigns(table, tensors, heads(config), vocabulary_rows=29)
    return found | changes, shapes(tensors), heads(config)


def refusal(*args):
    with pytest.raises(CheckpointError) as caught:
        natives(*args, where="here")
    return str(caught.value)


def test_what_is_missing_and_what_is_left_over_stand_side_by_side():
    found, wanted, each = foreign()
    found["transformer.h.1.ln1.weight"] = found.pop("transformer.h.1.ln_1.weight")
    found["vision.weight"] = found["transformer.ln_f.weight"]
    said = refusal(GPT2, wanted, found, each)
    assert "missing: transformer.h.1.ln_1.weight (there is transformer.h.1.ln1.weight)" in said
    assert "not known: transformer.h.1.ln1.weight (as transformer.h.1.ln_1.weight?)" in said
    assert "not known: vision.weight" in said
    assert "here" in said


def test_layers_that_the_configuration_does_not_have_are_left_over():
    found, wanted, each = foreign()
    fewer = {name: shape for name, shape in wanted.items() if not name.startswith("blocks.3.")}
    assert "not known: transformer.h.3.ln_1.weight" in refusal(GPT2, fewer, found, each)


def test_a_wrong_shape_is_told_before_anything_is_read():
    found, wanted, each = foreign()
    wanted["blocks.0.mlp.up.weight"] = (65, 16)
    said = refusal(GPT2, wanted, found, each)
    assert "transformer.h.0.mlp.c_fc.weight: makes blocks.0.mlp.up.weight [64, 16]" in said
    assert "[65, 16]" in said
    assert not any(cut.sources[0].reads for parts in found.values() for cut in parts)


def test_known_extras_and_old_spellings_are_taken():
    found, wanted, each = foreign()
    found = {name.removeprefix("transformer."): parts for name, parts in found.items()}
    found["h.0.attn.bias"] = found["h.0.attn.masked_bias"] = found["lm_head.weight"] = found["wte.weight"]
    assert natives(GPT2, wanted, found, each, where="here").keys() == wanted.keys()


def test_grouped_queries_have_no_old_order():
    found, wanted, each = foreign(legacy(2), "grouped")
    assert "makes blocks.0.attention.qkv.weight nothing that fits" in refusal(legacy(0), wanted, found, each)


def test_orders_of_fused_rows():
    """Two heads of two channels: the rows of each order written out."""
    ours = torch.tensor(
        [[10 * head + 100 * kind + channel] for head in (0, 1) for kind in (0, 1, 2) for channel in (0, 1)]
    )
    version0 = [[0], [1], [10], [11], [100], [101], [110], [111], [200], [201], [210], [211]]
    version1 = [[0], [100], [200], [1], [101], [201], [10], [110], [210], [11], [111], [211]]
    each = Heads(2, 1)
    for stored, order in ((version0, "3hd"), (version1, "hd3")):
        step = HeadOrder(order)
        (made,) = step.inward([torch.tensor(stored)], each)
        assert torch.equal(made, ours)
        assert step.outward([made], each)[0].tolist() == stored


def test_queries_of_a_group_come_before_its_key_and_value():
    q, k, v = torch.arange(4), torch.tensor([10, 11]), torch.tensor([20, 21])
    step, each = Woven(), Heads(1, 2)
    (fused,) = step.inward([q, k, v], each)
    assert fused.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert [part.tolist() for part in step.outward([fused], each)] == [q.tolist(), k.tolist(), v.tolist()]


def test_a_gate_lies_above_the_values():
    gate, up = Halves().inward([torch.arange(6)[:, None]], Heads(1, 1))
    assert (gate[:, 0].tolist(), up[:, 0].tolist()) == ([0, 1, 2], [3, 4, 5])
    assert Transposed().inward([torch.arange(6).view(2, 3)], Heads(1, 1))[0].tolist() == [
        [0, 3],
        [1, 4],
        [2, 5],
    ]


@pytest.fixture
def in_files(tmp_path: Path):
    """Tensor-parallel parts of an export, each rank's in a safetensors file."""
    _, wanted, each = foreign(CORE, "llama")
    config = ModelConfig(**CONFIGS["llama"])
    tensors = model_tensors(config)
    cuts = foreigns(CORE, tensors, each, tensor_parallel=2, vocabulary_rows=40)
    ranks = []
    for rank in range(2):
        path = tmp_path / f"{rank}.safetensors"
        write_tensors(path, {name: parts[rank].read() for name, parts in cuts.items()})
        ranks.append({lazy.name: lazy for lazy in open_tensors(path)})
    parts = {name: (ranks[0][name], ranks[1][name]) for name in cuts}
    return natives(CORE, wanted, parts, each, where="here"), tensors


def test_parts_in_files_join_and_a_table_is_padded_as_the_model_is(in_files):
    found, tensors = in_files
    same(found, tensors)


def test_tensors_are_filled_in_the_dtype_that_waits_for_them(in_files):
    found, tensors = in_files
    for name in ("token_embedding.weight", "blocks.1.attention.out.weight", "blocks.2.mlp.gate.weight"):
        target = torch.empty(tensors[name].shape, dtype=torch.float64)
        found[name].read_into(target)
        assert torch.equal(target, tensors[name].tensor.double()), name


def test_a_table_is_cut_to_the_rows_that_the_model_has():
    wide = foreigns(GPT2, model_tensors(ModelConfig(**CONFIGS["tied"])), Heads(4, 1), vocabulary_rows=64)
    wanted = shapes(model_tensors(ModelConfig(**CONFIGS["tied"])))
    assert wide["transformer.wte.weight"][0].shape == (64, 16)
    assert natives(GPT2, wanted, wide, Heads(4, 1), where="here")["token_embedding.weight"].read().shape == (
        32,
        16,
    )
