"""LoRA as `peft` computes it: logits and the gradients of A and B in float64 on tiny random models, and its files both ways."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

from megalith.adapt.adapter import LORA, Adapter
from megalith.adapt.lora import LoRA
from megalith.adapt.merge import merge
from megalith.adapt.peft_lora import read_peft_lora, write_peft_lora
from megalith.checkpoint.foreign import load, open_foreign
from megalith.models.family import class_of
from megalith.parallel.apply import build
from megalith.topology.topology import Topology
from tests.reference.common import assert_close
from tests.reference.test_encoder_decoder import rms
from tests.reference.test_transformers import widen

peft = pytest.importorskip("peft")
logging.getLogger("transformers").setLevel(logging.ERROR)

VOCABULARY = 24
TOKENS = torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
SOURCE = torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(1))
SIZES = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GATED = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}  # fmt: skip
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
MODELS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**SIZES, n_embd=16, n_head=4, n_layer=2, n_positions=16)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **GATED)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, **GATED)),
    "neox": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            **SIZES, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=16, use_parallel_residual=False,
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**SIZES, **T5)),
    "t5 1.1": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(**SIZES, **T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            **SIZES, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=16,
        )
    ),
}  # fmt: skip


@pytest.fixture
def theirs(request):
    """A random model of transformers in float64: biases and norms, too."""
    torch.manual_seed(0)
    model = MODELS[request.param]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def ours(theirs, folder, method):
    """The same model here, with LoRA installed; and its config."""
    theirs.save_pretrained(folder)
    foreign = open_foreign(folder)
    (model,) = build(
        class_of(foreign.config),
        foreign.config,
        Topology.single("cpu"),
        seed=3,
        precision="64",
        adapt=method.install,
    )
    base = {f"model.{n}": p.detach() for n, p in model.named_parameters() if "lora" not in n}
    load(foreign, base)
    in_float64(theirs, foreign.config)
    return model.eval(), foreign.config


def in_float64(theirs, config):
    widen(theirs, config)
    for module in theirs.modules():
        if type(module).__name__ == "T5LayerNorm":
            module.forward = rms(module)


def answers(model, there):
    """Logits of the same text here or there."""
    sided = getattr(model.config, "is_encoder_decoder", False) or hasattr(model.config, "encoder_layers")
    if there:
        given = {"input_ids": SOURCE, "decoder_input_ids": TOKENS} if sided else {"input_ids": TOKENS}
        return model(**given).logits
    return model.logits(model(SOURCE, tokens=TOKENS) if sided else model(TOKENS))


def loss(logits):
    return F.cross_entropy(logits.flatten(0, 1), TOKENS.roll(-1, 1).flatten())


def shaken(model):
    """B gets numbers, and A others, so that none has a gradient of zero."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def adapter_of(model, method):
    tensors = method.tensors([model], Topology.single("cpu"))
    return Adapter(LORA, "", tensors, settings=method.describe())


def loaded_there(theirs, folder):
    return peft.PeftModel.from_pretrained(theirs, str(folder), is_trainable=True).eval()


METHODS = {
    "all": LoRA(rank=3, alpha=6.0),
    "qkv": LoRA(rank=2, alpha=5.0, dropout=0.1, targets=("qkv",)),
    "one layer": LoRA(rank=2, alpha=4.0, targets=(r"blocks\.1\..*(qkv|down)",)),
}


@pytest.mark.parametrize(
    ("theirs", "which"),
    [
        *((name, "all") for name in MODELS), ("gpt2", "qkv"), ("llama", "qkv"), ("t5", "qkv"), ("bart", "one layer"),
        ("gpt2", "one layer"),
    ],
    indirect=["theirs"],
)  # fmt: skip
def test_out_and_in_again(tmp_path, theirs, which):
    method = METHODS[which]
    model, config = ours(theirs, tmp_path / "base", method)
    adapter = adapter_of(shaken(model), method)
    for folder in ("adapter", "again"):
        (tmp_path / folder).mkdir()
    write_peft_lora(adapter, tmp_path / "adapter", config)
    expected = answers(model, False)
    assert (answers(loaded_there(theirs, tmp_path / "adapter"), True) - expected).abs().max() <= 1e-10
    back = read_peft_lora(tmp_path / "adapter", config)
    assert back.tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in adapter.tensors.items())
    again = LoRA.understand(back.settings)
    assert (again.rank, again.scale, again.dropout, again.ranks) == (
        method.rank, method.scale, method.dropout, {},
    )  # fmt: skip
    write_peft_lora(back, tmp_path / "again", config)
    both = [
        json.loads((tmp_path / folder / "adapter_config.json").read_bytes())
        for folder in ("adapter", "again")
    ]
    assert both[0] == both[1]


@pytest.mark.parametrize("theirs", ["gpt2", "llama", "t5"], indirect=True)
def test_gradients(tmp_path, theirs):
    """A of a fused product is one here and three there: its gradient is the sum of theirs."""
    model, config = ours(theirs, tmp_path / "base", METHODS["all"])
    adapter = adapter_of(shaken(model), METHODS["all"])
    (tmp_path / "adapter").mkdir()
    write_peft_lora(adapter, tmp_path / "adapter", config)
    wrapped = loaded_there(theirs, tmp_path / "adapter")
    both = loss(answers(model, False)), loss(answers(wrapped, True))
    assert abs(both[0].item() - both[1].item()) <= 1e-12
    for value in both:
        value.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if "lora" in n}
    (tmp_path / "gradients").mkdir()
    there = {n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None}
    assert all("lora" in name for name in there)
    write_peft_lora(
        Adapter(LORA, "", gradients, settings=METHODS["all"].describe()), tmp_path / "gradients", config
    )
    mine = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    shared: dict[str, list[str]] = {}
    for name in there:
        module = name.replace(".default", "")
        if ".lora_B." in module:
            assert_close(module, mine[module], there[name])
        else:
            fused = module.replace("q_proj", "*").replace("k_proj", "*").replace("v_proj", "*")
            for letter in "qkv":
                fused = fused.replace(f"Attention.{letter}.", "Attention.*.")
            if "EncDecAttention" in fused and ".q." in name:
                fused = module  # queries across are a product of their own
            shared.setdefault(fused, []).append(name)
    for names in shared.values():
        total = sum(there[name] for name in names)
        assert_close(names[0], mine[names[0].replace(".default", "")], total)


SETTINGS = {
    "gpt2": {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True},
    "llama": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "qwen2": {"target_modules": "all-linear", "use_rslora": True},
    "neox": {"target_modules": ["query_key_value"]},
    "t5": {"target_modules": ["q", "v"]},
    "t5 1.1": {"target_modules": r"decoder\..*\.(q|k|wi_0|o)"},
    "bart": {
        "target_modules": ["k_proj", "v_proj", "fc1"], "rank_pattern": {"k_proj": 3}, "alpha_pattern": {"fc1": 11},
    },
}  # fmt: skip


@pytest.mark.parametrize("theirs", SETTINGS, indirect=True)
def test_in_and_out_again(tmp_path, theirs, request):
    name = request.node.callspec.params["theirs"]
    theirs.save_pretrained(tmp_path / "base")
    config = open_foreign(tmp_path / "base").config
    in_float64(theirs, config)
    (tmp_path / "back").mkdir()
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=2, lora_alpha=5, **SETTINGS[name]))
    shaken(wrapped.double()).eval().save_pretrained(tmp_path / "adapter")
    expected = answers(wrapped, True)
    adapter = read_peft_lora(tmp_path / "adapter", config)
    method = LoRA.understand(adapter.settings)
    model, _ = ours(wrapped.unload(), tmp_path / "base", method)
    method.fill([model], adapter.tensors)
    assert (answers(model, False) - expected).abs().max() <= 1e-10
    write_peft_lora(adapter, tmp_path / "back", config)
    assert (answers(loaded_there(theirs, tmp_path / "back"), True) - expected).abs().max() <= 1e-10
    assert merge(model, lambda: answers(model, False)).error <= 1e-10
