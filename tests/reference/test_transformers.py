"""The same numbers as `transformers`: logits, loss and every gradient in float64, on tiny random models.

GPT-2 and Llama: tables that hold every pair of their options. GPT-1 (norm behind the sum), GPT-NeoX and StableLM (part of
each head turns), GLM (neighbouring pairs turn) and Qwen2 (biases of q, k, v alone) add what these two lack. Weights are
mapped by straight-line code here; as the map is linear, gradients are compared through it too.
"""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F

from megalith.models.config import ModelConfig
from megalith.nn.position import Rotary
from tests.reference import plain
from tests.reference.common import assert_close, mean_loss, missing_pairs, random_model, rows

transformers = pytest.importorskip("transformers")
logging.getLogger("transformers").setLevel(logging.ERROR)

VOCABULARY = 13

GPT2 = {
    "activation": ("gelu_new", "gelu", "relu"),
    "head": ("tied", "untied"),
    "scale": ("default", "one"),
    "inner": ("default", "own"),
    "eps": ("1e-5", "1e-3"),
}
GPT2_TABLE = """
gelu_new  tied    one      default  1e-3
gelu_new  untied  default  own      1e-5
gelu      tied    default  default  1e-5
gelu      untied  one      own      1e-3
relu      tied    default  own      1e-3
relu      untied  one      default  1e-5
"""
LLAMA = {
    "activation": ("silu", "gelu_pytorch_tanh", "gelu", "relu"),
    "scaling": ("none", "linear", "llama3"),
    "head": ("tied", "untied"),
    "bias": ("none", "all"),
    "groups": ("4", "2", "1"),
    "head_dim": ("4", "8"),
    "base": ("10000", "50"),
}
LLAMA_TABLE = """
silu               none    tied    all   2  8  10000
silu               linear  tied    all   4  4  50
silu               llama3  untied  none  1  4  10000
gelu_pytorch_tanh  none    tied    none  4  8  10000
gelu_pytorch_tanh  linear  tied    all   1  8  50
gelu_pytorch_tanh  llama3  untied  all   2  4  50
gelu               none    untied  all   1  8  50
gelu               linear  untied  none  4  8  10000
gelu               llama3  tied    none  2  4  50
relu               none    tied    none  1  4  50
relu               linear  tied    all   2  4  10000
relu               llama3  untied  all   4  4  10000
relu               llama3  untied  all   1  8  10000
"""
LLAMA_ACTIVATION = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu": "geglu_erf", "relu": "reglu"}
LLAMA3 = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 30,
}


def ours(**fields):
    shape = {
        "vocab_size": VOCABULARY,
        "make_vocab_size_divisible_by": 8,
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
        "hidden_dropout": 0.0,
    }
    return ModelConfig(**{**shape, **fields})


def conv1d(w, name):
    return w[f"{name}.weight"].T, w[f"{name}.bias"]


def group_qkv(q, k, v, heads, groups):
    """Separate q, k, v rows → groups of (queries, key, value) rows; weights or biases."""
    rest = q.shape[1:]
    size = q.shape[0] // heads
    q = q.reshape(groups, heads // groups * size, *rest)
    return torch.cat((q, k.reshape(groups, size, *rest), v.reshape(groups, size, *rest)), 1).flatten(0, 1)


def pad(table):
    return torch.cat((table, table.new_zeros(-len(table) % 8, table.shape[1])))


def from_gpt2(w, config):
    """GPT-2's and GPT-1's names → ours. GPT-1 has no final norm and other names of tables."""
    first = "transformer.wte" if "transformer.wte.weight" in w else "transformer.tokens_embed"
    second = "transformer.wpe" if "transformer.wpe.weight" in w else "transformer.positions_embed"
    new = {
        "token_embedding.weight": pad(w[f"{first}.weight"]),
        "position_embedding.weight": w[f"{second}.weight"],
    }
    for kind in ("weight", "bias"):
        if f"transformer.ln_f.{kind}" in w:
            new[f"final_norm.{kind}"] = w[f"transformer.ln_f.{kind}"]
    if not config.share_embeddings_and_output_weights:
        new["head.weight"] = pad(w["lm_head.weight"])
    for i in range(config.num_layers):
        old, block = f"transformer.h.{i}", f"blocks.{i}"
        for kind in ("weight", "bias"):
            new[f"{block}.norm_attention.{kind}"] = w[f"{old}.ln_1.{kind}"]
            new[f"{block}.norm_mlp.{kind}"] = w[f"{old}.ln_2.{kind}"]
        heads = config.num_attention_heads
        for kind, fused in zip(("weight", "bias"), conv1d(w, f"{old}.attn.c_attn"), strict=True):
            new[f"{block}.attention.qkv.{kind}"] = group_qkv(*fused.chunk(3), heads, heads)
        for mine, theirs in (
            ("attention.out", "attn.c_proj"),
            ("mlp.up", "mlp.c_fc"),
            ("mlp.down", "mlp.c_proj"),
        ):
            new[f"{block}.{mine}.weight"], new[f"{block}.{mine}.bias"] = conv1d(w, f"{old}.{theirs}")
    return new


def from_llama(w, config):
    """Llama's names (also StableLM's, Qwen2's and GLM's) → ours."""
    new = {"token_embedding.weight": pad(w["model.embed_tokens.weight"])}
    if not config.share_embeddings_and_output_weights:
        new["head.weight"] = pad(w["lm_head.weight"])
    names = {
        "norm_attention": "input_layernorm",
        "norm_mlp": "post_attention_layernorm",
        "attention.out": "self_attn.o_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.gate": "mlp.gate_proj",
        "mlp.down": "mlp.down_proj",
    }
    for kind in ("weight", "bias"):
        if f"model.norm.{kind}" in w:
            new[f"final_norm.{kind}"] = w[f"model.norm.{kind}"]
        for i in range(config.num_layers):
            old, block = f"model.layers.{i}", f"blocks.{i}"
            for mine, theirs in names.items():
                if f"{old}.{theirs}.{kind}" in w:
                    new[f"{block}.{mine}.{kind}"] = w[f"{old}.{theirs}.{kind}"]
            if f"{old}.mlp.gate_up_proj.{kind}" in w:
                fused = w[f"{old}.mlp.gate_up_proj.{kind}"]
                new[f"{block}.mlp.gate.{kind}"], new[f"{block}.mlp.up.{kind}"] = fused.chunk(2)
            if f"{old}.self_attn.q_proj.{kind}" in w:
                qkv = (w[f"{old}.self_attn.{x}_proj.{kind}"] for x in "qkv")
                grouped = group_qkv(*qkv, config.num_attention_heads, config.kv_heads)
                new[f"{block}.attention.qkv.{kind}"] = grouped
    return new


def from_neox(w, config):
    """GPT-NeoX's names → ours; its fused rows already lie head by head."""
    new = {
        "token_embedding.weight": pad(w["gpt_neox.embed_in.weight"]),
        "head.weight": pad(w["lm_head.weight"]),
    }
    names = {
        "norm_attention": "input_layernorm",
        "norm_mlp": "post_attention_layernorm",
        "attention.qkv": "attention.query_key_value",
        "attention.out": "attention.dense",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    }
    for kind in ("weight", "bias"):
        new[f"final_norm.{kind}"] = w[f"gpt_neox.final_layer_norm.{kind}"]
        for i in range(config.num_layers):
            for mine, theirs in names.items():
                new[f"blocks.{i}.{mine}.{kind}"] = w[f"gpt_neox.layers.{i}.{theirs}.{kind}"]
    return new


def widen(model, config):
    """transformers computes RMSNorm and rotary angles in fp32 whatever the dtype: the same formulas in float64."""

    def rms(module):
        eps = module.variance_epsilon
        return lambda x: module.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))

    def angles(x, position_ids):
        channels = int(config.head_dim * config.rotary_percentage)
        step = [plain.frequency(i, channels, config) for i in range(channels // 2)]
        step = torch.tensor(step, dtype=torch.float64)
        angle = torch.cat((position_ids[..., None] * step,) * 2, -1)
        return angle.cos(), angle.sin()

    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            module.forward = rms(module)
        if kind.endswith("RotaryEmbedding"):
            module.forward = angles
            mine = Rotary(config.rotary_channels, config.rotary_base, scaling=ours_scaling(config))
            frequencies = mine.frequencies(torch.device("cpu"))
            assert_close("frequencies", frequencies, module.inv_freq.double(), 1e-6)


def ours_scaling(config):
    from megalith.models.gpt import rotary

    return rotary(config).scaling


def compare(theirs_config, config, convert):
    """Random numbers in their model; the same in ours by `convert`; then logits, loss and every gradient."""
    torch.manual_seed(0)
    name = theirs_config.architecture
    theirs = getattr(transformers, name)._from_config(
        theirs_config.config, attn_implementation=theirs_config.attention
    )
    theirs = theirs.double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    widen(theirs, config)
    model = random_model(config)
    parameters = dict(theirs.named_parameters())
    weights = convert({n: p.detach() for n, p in parameters.items()}, config)
    model.load_state_dict(weights)  # strict: every name of ours, and no other

    tokens, targets = torch.randint(VOCABULARY, (2, 9)), torch.randint(-1, VOCABULARY, (2, 9))
    logits = theirs(tokens).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    loss.backward()
    assert_close("logits", model.logits(model(tokens)), logits)
    mine = mean_loss(model, tokens, targets)
    assert_close("loss", mine, loss)
    mine.backward()
    gradients = convert({n: p.grad for n, p in parameters.items()}, config)
    for parameter_name, parameter in model.named_parameters():
        assert_close(parameter_name, parameter.grad, gradients[parameter_name])


class Theirs:
    """A configuration of transformers and the class that reads it. Its eager attention of Llama is fp32; sdpa is not."""

    attention = "sdpa"

    def __init__(self, architecture, config_class, **fields):
        self.architecture = architecture
        self.config = getattr(transformers, config_class)(vocab_size=VOCABULARY, **fields)


def test_tables_have_every_pair():
    assert missing_pairs(rows(GPT2_TABLE, GPT2), GPT2) == []
    assert missing_pairs(rows(LLAMA_TABLE, LLAMA), LLAMA) == []


@pytest.mark.parametrize("row", rows(GPT2_TABLE, GPT2), ids=lambda row: "-".join(row.values()))
def test_gpt2(row):
    theirs = Theirs(
        "GPT2LMHeadModel",
        "GPT2Config",
        n_embd=16,
        n_layer=2,
        n_head=4,
        n_positions=16,
        n_inner=None if row["inner"] == "default" else 24,
        activation_function=row["activation"],
        layer_norm_epsilon=float(row["eps"]),
        scale_attn_weights=row["scale"] == "default",
        tie_word_embeddings=row["head"] == "tied",
    )
    config = ours(
        ffn_hidden_size=None if row["inner"] == "default" else 24,
        activation={"gelu_new": "gelu_tanh", "gelu": "gelu_erf", "relu": "relu"}[row["activation"]],
        layernorm_epsilon=float(row["eps"]),
        attention_scale=None if row["scale"] == "default" else 1.0,
        share_embeddings_and_output_weights=row["head"] == "tied",
    )
    compare(theirs, config, from_gpt2)


@pytest.mark.parametrize("row", rows(LLAMA_TABLE, LLAMA), ids=lambda row: "-".join(row.values()))
def test_llama(row):
    scaling = {"none": {}, "linear": {"factor": 2.5}, "llama3": LLAMA3}[row["scaling"]]
    kind = "default" if row["scaling"] == "none" else row["scaling"]
    theirs = Theirs(
        "LlamaForCausalLM",
        "LlamaConfig",
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=int(row["groups"]),
        head_dim=int(row["head_dim"]),
        hidden_act=row["activation"],
        attention_bias=row["bias"] == "all",
        mlp_bias=row["bias"] == "all",
        tie_word_embeddings=row["head"] == "tied",
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": kind, "rope_theta": float(row["base"]), **scaling},
    )
    config = ours(
        ffn_hidden_size=24,
        position_embedding_type="rope",
        normalization="rmsnorm",
        activation=LLAMA_ACTIVATION[row["activation"]],
        num_query_groups=int(row["groups"]),
        kv_channels=int(row["head_dim"]),
        bias=row["bias"] == "all",
        share_embeddings_and_output_weights=row["head"] == "tied",
        rotary_base=float(row["base"]),
        rotary_scaling=None if row["scaling"] == "none" else {"type": row["scaling"], **scaling},
    )
    compare(theirs, config, from_llama)


def test_gpt1_norm_behind_the_sum():
    theirs = Theirs(
        "OpenAIGPTLMHeadModel", "OpenAIGPTConfig", n_embd=16, n_layer=2, n_head=4, n_positions=16, afn="gelu"
    )
    theirs.attention = "eager"  # it has no other, and no cast
    compare(theirs, ours(transformer_block_type="post_ln"), from_gpt2)


@pytest.mark.parametrize("part", [0.25, 0.5, 1.0])
def test_neox_turns_part_of_a_head(part):
    theirs = Theirs(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        use_parallel_residual=False,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": part},
    )
    config = ours(
        hidden_size=32,
        ffn_hidden_size=24,
        position_embedding_type="rope",
        rotary_percentage=part,
        rotary_base=100.0,
        activation="gelu_erf",
        share_embeddings_and_output_weights=False,
    )
    compare(theirs, config, from_neox)


@pytest.mark.parametrize("groups", [4, 2])
def test_stablelm_layernorm_with_gates(groups):
    theirs = Theirs(
        "StableLmForCausalLM",
        "StableLmConfig",
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=groups,
        use_qkv_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )
    config = ours(
        hidden_size=32,
        ffn_hidden_size=24,
        num_query_groups=groups,
        position_embedding_type="rope",
        rotary_percentage=0.5,
        activation="swiglu",
        bias=False,
        qkv_bias=True,
        share_embeddings_and_output_weights=False,
    )
    compare(theirs, config, from_llama)


def test_glm_turns_neighbours():
    theirs = Theirs(
        "GlmForCausalLM",
        "GlmConfig",
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        attention_bias=True,
        pad_token_id=None,
        eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )
    config = ours(
        hidden_size=32,
        ffn_hidden_size=24,
        num_query_groups=2,
        position_embedding_type="rope",
        rotary_percentage=0.5,
        rotary_interleaved=True,
        normalization="rmsnorm",
        activation="swiglu",
        bias=False,
        qkv_bias=True,
        share_embeddings_and_output_weights=False,
    )
    compare(theirs, config, from_llama)


def test_qwen2_biases_of_queries_keys_values_alone():
    theirs = Theirs(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    config = ours(
        ffn_hidden_size=24,
        num_query_groups=2,
        position_embedding_type="rope",
        normalization="rmsnorm",
        activation="swiglu",
        bias=False,
        qkv_bias=True,
    )
    compare(theirs, config, from_llama)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_buckets_equal_t5s(bidirectional):
    """The bucket of every distance, by T5's own function."""
    from transformers.models.t5.modeling_t5 import T5Attention

    from megalith.nn.position import relative_bucket

    distance = torch.arange(-300, 300)
    for buckets, longest in ((32, 128), (8, 20), (16, 250)):
        theirs = T5Attention._relative_position_bucket(distance, bidirectional, buckets, longest)
        assert torch.equal(relative_bucket(distance, buckets, longest, bidirectional), theirs)
