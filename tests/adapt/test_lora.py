"""LoRA as a method: targets in all their spellings, errors that teach, artefacts on any layout, and merging."""

from __future__ import annotations

import math

import pytest
import torch

from megalith.adapt.lora import LoRA, chosen
from megalith.adapt.merge import Folded, fold, folded, merge, probe
from megalith.errors import CheckpointError, ConfigError
from megalith.models.bert_config import BertConfig
from megalith.models.config import ModelConfig
from megalith.models.encdec_config import EncoderDecoderConfig
from megalith.models.family import class_of
from megalith.parallel.apply import build
from megalith.testing.parity import layouts
from megalith.topology.topology import Topology

SHAPE = {
    "vocab_size": 40,
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "max_position_embeddings": 8,
    "hidden_dropout": 0.0,
    "make_vocab_size_divisible_by": 8,
}
LLAMA = {
    "position_embedding_type": "rope", "normalization": "rmsnorm", "activation": "swiglu", "bias": False,
    "num_query_groups": 2, "share_embeddings_and_output_weights": False,
}  # fmt: skip
CONFIGS = {
    "gpt2": ModelConfig(**SHAPE),
    "llama": ModelConfig(**SHAPE, **LLAMA),
    "t5": EncoderDecoderConfig(
        **SHAPE, position_embedding_type="relative", normalization="rmsnorm", bias=False
    ),
    "bart": EncoderDecoderConfig(
        **SHAPE, transformer_block_type="post_ln", share_position_embeddings=False, output_bias=True
    ),
    "bert": BertConfig(**SHAPE),
}


class Warm(LoRA):
    """B begins with numbers, too."""

    def install(self, model):
        return [(r"\.lora_b$", ("normal", 0.2)), *super().install(model)]


def whole(config):
    with torch.device("meta"):
        return class_of(config)(config)


def names(config, *targets):
    """Of the chosen products, without the number of their layer."""
    found = chosen(whole(config), targets)
    return {".".join(part for part in name.split(".") if not part.isdigit()) for name in found}


def one_process(config, method, precision="64", seed=5):
    (model,) = build(
        class_of(config), config, Topology.single("cpu"), seed=seed, precision=precision, adapt=method.install
    )
    return model.eval()


def logits(model, seed=0):
    """Of a model of any family."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(40, (2, 8), generator=generator)
    more = {"tokens": tokens.flip(1)} if isinstance(model.config, EncoderDecoderConfig) else {}
    return model.logits(model(tokens, **more))


# -- targets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "targets", "expected"),
    [
        ("gpt2", ["qkv"], {"blocks.attention.qkv"}),
        ("gpt2", ["out", "mlp.up"], {"blocks.attention.out", "blocks.mlp.up"}),
        ("gpt2", ["c_attn"], {"blocks.attention.qkv"}),
        ("gpt2", ["c_proj"], {"blocks.attention.out", "blocks.mlp.down"}),
        ("gpt2", ["mlp.c_proj"], {"blocks.mlp.down"}),
        ("gpt2", ["embed->mlp"], {"blocks.mlp.up"}),
        ("gpt2", ["heads → embed"], {"blocks.attention.out"}),
        ("llama", ["q_proj", "k_proj", "v_proj"], {"blocks.attention.qkv"}),
        ("llama", ["q_proj", "qkv"], {"blocks.attention.qkv"}),
        ("llama", ["gate_proj", "up"], {"blocks.mlp.gate", "blocks.mlp.up"}),
        ("llama", ["embed->mlp"], {"blocks.mlp.gate", "blocks.mlp.up"}),
        ("t5", ["cross.q", "kv"], {"decoder.blocks.cross.q", "decoder.blocks.cross.kv"}),
        ("t5", [r"^encoder\..*mlp"], {"encoder.blocks.mlp.up", "encoder.blocks.mlp.down"}),
        ("t5", ["wo"], {"encoder.blocks.mlp.down", "decoder.blocks.mlp.down"}),
        ("bart", ["fc1"], {"encoder.blocks.mlp.up", "decoder.blocks.mlp.up"}),
        ("bert", ["intermediate.dense"], {"blocks.mlp.up"}),
    ],
)  # fmt: skip
def test_targets(family, targets, expected):
    assert names(CONFIGS[family], *targets) == expected


@pytest.mark.parametrize("family", CONFIGS)
def test_all_linear_is_every_product_of_every_block_and_nothing_else(family):
    found = chosen(whole(CONFIGS[family]), ["all-linear"])
    assert len(found) == {"gpt2": 8, "llama": 10, "t5": 8 + 14, "bart": 8 + 14, "bert": 8}[family]
    assert all("blocks" in name for name in found)


def test_a_pattern_chooses_layers():
    assert list(chosen(whole(CONFIGS["gpt2"]), [r"blocks\.1\..*qkv"])) == ["blocks.1.attention.qkv"]


@pytest.mark.parametrize(
    ("family", "targets", "words"),
    [
        ("gpt2", ["gate"], ["'gate'", "qkv", "embed->mlp", "blocks.0.attention.qkv"]),
        (
            "gpt2",
            ["q_proj", "vocab->embed"],
            ["1 problem", "'q_proj' or 'vocab->embed'", "as in PEFT c_attn, c_proj, c_fc;"],
        ),
        ("gpt2", ["(("], ["'(('"]),
        ("llama", ["q_proj", "v_proj"], ["blocks.*.attention.qkv", "add k_proj", "say qkv"]),
        ("t5", ["q"], []),
    ],
)
def test_unknown_targets(family, targets, words):
    if not words:  # PEFT's usual targets of T5: `q` is a name here, too, of the product across
        assert names(CONFIGS[family], *targets) == {"decoder.blocks.cross.q"}
        return
    with pytest.raises(ConfigError) as error:
        chosen(whole(CONFIGS[family]), targets)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"rank": 0}, "lora.rank"),
        ({"rank": -1, "alpha": 0.0}, "2 problems"),
        ({"dropout": 1.0}, "lora.dropout"),
        ({"targets": ()}, "lora.targets"),
        ({"targets": ("",)}, "lora.targets"),
    ],
)
def test_impossible_settings(fields, word):
    with pytest.raises(ConfigError, match=word):
        LoRA(**fields)


def test_a_rank_beyond_a_products_sizes():
    with pytest.raises(ConfigError, match=r"17 is more than blocks.0.attention.qkv has: 16 → 48"):
        LoRA(rank=17).install(whole(CONFIGS["gpt2"]))


# -- the first numbers -------------------------------------------------------------------------------------------------


def test_begins_as_peft_does():
    config = ModelConfig(**{**SHAPE, "hidden_size": 64, "ffn_hidden_size": 256})
    model = one_process(config, LoRA(rank=16))
    for name, width in (("attention.qkv", 64), ("mlp.down", 256)):
        layer = model.blocks["1"].get_submodule(name)
        std = layer.lora_a.std().item()
        assert math.isclose(std, math.sqrt(1 / (3 * width)), rel_tol=0.06), name
        assert not layer.lora_b.any()
    assert not torch.equal(model.blocks["0"].mlp.up.lora_a, model.blocks["1"].mlp.up.lora_a)


@pytest.mark.parametrize("family", CONFIGS)
def test_at_first_the_model_is_as_it_was(family):
    config = CONFIGS[family]
    (plain,) = build(class_of(config), config, Topology.single("cpu"), seed=5, precision="64")
    assert torch.equal(logits(one_process(config, LoRA(rank=4))), logits(plain.eval()))


# -- artefacts ---------------------------------------------------------------------------------------------------------


def on_a_layout(config, sizes, method, made):
    """On one rank: what a fresh model's tensors are, and after it was filled."""
    topology = Topology.of(sizes, "cpu")
    stages = build(class_of(config), config, topology, seed=5, precision="64", adapt=method.install)
    first = method.tensors(stages, topology)
    method.fill(stages, made)
    return first, method.tensors(stages, topology)


@pytest.mark.parametrize(
    ("family", "layout"), [("gpt2", "tp2+sp×shard_all2"), ("llama", "tp2×pp2"), ("t5", "pp2")]
)
def test_tensors_and_fill_on_any_layout(rank_pool, family, layout):
    config, method = CONFIGS[family], Warm(rank=3)
    single = Topology.single("cpu")
    expected = method.tensors([one_process(config, method)], single)
    made = {name: torch.randn_like(tensor) for name, tensor in expected.items()}
    sizes = layouts()[layout]
    for first, after in rank_pool.run(on_a_layout, sizes.world, config, sizes, method, made):
        assert first.keys() == expected.keys()
        assert all(torch.equal(first[name], tensor) for name, tensor in expected.items())
        assert all(torch.equal(after[name], tensor) for name, tensor in made.items())


def test_an_artefact_of_another_model_is_refused():
    method = LoRA(rank=3)
    tensors = method.tensors([one_process(CONFIGS["gpt2"], method)], Topology.single("cpu"))
    other = one_process(ModelConfig(**SHAPE, ffn_hidden_size=40), method)
    with pytest.raises(CheckpointError, match=r"mlp.up.lora_b: \[64, 3\], the model takes \[40, 3\]"):
        method.fill([other], tensors)
    with pytest.raises(CheckpointError, match="the model takes none"):
        method.fill([one_process(CONFIGS["gpt2"], method)], {"prompts.0.tokens": torch.zeros(3, 16)})


def test_described_and_understood():
    method = LoRA(3, 5.0, 0.1, ("qkv",), {"blocks.0.attention.qkv": 9})
    assert LoRA.understand(method.describe()) == method
    with pytest.raises(CheckpointError, match=r"^runs/a: .* cannot be understood: rank 3\n"):
        LoRA.understand({"rank": 3}, where="runs/a")


# -- merging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_merged_logits_are_the_same(family):
    model = one_process(CONFIGS[family], Warm(rank=3))
    before = logits(model)
    merged = merge(model, lambda: logits(model))
    assert merged.layers == len(chosen(whole(CONFIGS[family]), ["all-linear"]))
    assert merged.error <= 1e-10 * merged.largest
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-10)
    plain = one_process(CONFIGS[family], LoRA(targets=("down",)))
    assert model.state_dict().keys() == {n for n in plain.state_dict() if "lora" not in n}
    assert "LoRA" not in repr(model)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_narrower_weights_round(dtype, allowed):
    model = one_process(CONFIGS["gpt2"], Warm(rank=3)).to(dtype)
    merged = merge(model, lambda: logits(model))
    assert 0 < merged.error < allowed * merged.largest


def test_a_stage_without_lora_has_nothing_to_merge():
    model = one_process(CONFIGS["gpt2"], Warm(rank=3))
    fold(model)
    assert merge(model, probe(model)) == (0, 0.0, 0.0)


def test_beyond_its_tolerance_a_merge_is_refused():
    model = one_process(CONFIGS["gpt2"], Warm(rank=3))
    model.blocks["0"].attention.qkv.scale = 3.0
    stolen = iter([logits(model), 2 * logits(model)])
    with pytest.raises(CheckpointError, match="other logits"):
        merge(model, lambda: next(stolen))


@pytest.mark.parametrize("family", CONFIGS)
def test_a_probe_sees_what_a_model_makes(family):
    model = one_process(CONFIGS[family], Warm(rank=3)).train()
    made = probe(model)()
    assert (made.shape[0], made.shape[2]) == (2, 40)
    assert model.training
    assert not torch.equal(made[0], made[1])


def merged_rank(config, sizes, method):
    topology = Topology.of(sizes, "cpu")
    (stage,) = build(class_of(config), config, topology, seed=5, precision="64", adapt=method.install)
    stage.eval()
    before = logits(stage).detach() if sizes.pipeline == 1 else None
    found = merge(stage, probe(stage))
    return before, found, repr(stage)


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_pipeline_stages_merge_what_they_hold(rank_pool, family):
    for _, found, text in rank_pool.run(merged_rank, 2, CONFIGS[family], layouts()["pp2"], Warm(rank=3)):
        assert 0 < found.error <= 1e-10 * found.largest
        assert "LoRA" not in text


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_tensor_ranks_merge_what_they_hold(rank_pool, family):
    config, method = CONFIGS[family], Warm(rank=3)
    expected = logits(one_process(config, method))
    for before, found, text in rank_pool.run(merged_rank, 2, config, layouts()["tp2"], method):
        torch.testing.assert_close(before, expected, rtol=0, atol=1e-10)
        assert found.error <= 1e-10 * found.largest
        assert "LoRA" not in text
        assert "tensor=2" in text


class InFiles:
    """A tensor that is read when asked."""

    def __init__(self, name, tensor):
        self.name, self.tensor, self.dtype, self.shape = name, tensor, tensor.dtype, tuple(tensor.shape)
        self.nbytes = tensor.nbytes

    def read(self):
        return self.tensor

    def rows(self, start, stop):
        return self.tensor[start:stop]


def test_weights_in_files_are_merged_when_they_are_read():
    method = Warm(rank=3, targets=("qkv", "down"))
    model = one_process(CONFIGS["gpt2"], method)
    tensors = method.tensors([model], Topology.single("cpu"))
    stored = [
        InFiles(f"model.{n}", p.detach().clone()) for n, p in model.named_parameters() if "lora" not in n
    ]
    fold(model)
    made = list(folded(stored, tensors, method.scale, prefix="model."))
    assert sum(isinstance(each, Folded) for each in made) == 4
    for lazy, (name, parameter) in zip(made, model.named_parameters(), strict=True):
        assert lazy.name == f"model.{name}"
        assert lazy.shape == parameter.shape
        assert torch.equal(lazy.read(), parameter)
        torch.testing.assert_close(lazy.rows(2, 5), parameter[2:5].detach(), rtol=1e-14, atol=1e-14)
    with pytest.raises(CheckpointError, match="no weight that fits"):
        list(folded(stored[:3], tensors, method.scale, prefix="model."))
