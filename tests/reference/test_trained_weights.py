"""Weights that others trained: every stored activation of a sorter, and the story that a storyteller tells.

Both files are read by straight-line code here. nano-sort is minGPT's (GPT-2 architecture, untied head) with all
intermediate activations of one batch of three; stories260K is in llama2.c's v0 format (rotary pairs of neighbours,
grouped queries, RMSNorm, SwiGLU, tied head).
"""

from __future__ import annotations

import base64
import json
import struct

import pytest
import torch

from megalith.models.config import ModelConfig
from megalith.models.gpt import GPT

# B 3 rows, T 11 positions, D 48 channels, H 3 heads, K 16


def decoded(folder, name):
    table = json.loads((folder / f"gpt-nano-sort-{name}.json").read_text())
    return {
        key: torch.frombuffer(
            bytearray(base64.b64decode(value["data"])), dtype=getattr(torch, value["dtype"][6:])
        ).view(value["shape"])
        for key, value in table.items()
        if key != "config"
    }


@pytest.fixture
def sorter(real_data):
    w = decoded(real_data("weights-gpt-nano-sort"), "model")
    config = ModelConfig(
        vocab_size=3,
        make_vocab_size_divisible_by=1,
        num_layers=3,
        hidden_size=48,
        num_attention_heads=3,
        max_position_embeddings=11,
        share_embeddings_and_output_weights=False,
        attention_core="eager",
    )
    model = GPT(config)
    new = {
        "token_embedding.weight": w["transformer.wte.weight"],
        "position_embedding.weight": w["transformer.wpe.weight"],
        "head.weight": w["lm_head.weight"],
    }
    names = {
        "norm_attention": "ln_1",
        "attention.out": "attn.c_proj",
        "norm_mlp": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    for kind in ("weight", "bias"):
        new[f"final_norm.{kind}"] = w[f"transformer.ln_f.{kind}"]
        for i in range(3):
            for mine, theirs in names.items():
                new[f"blocks.{i}.{mine}.{kind}"] = w[f"transformer.h.{i}.{theirs}.{kind}"]
            fused = w[f"transformer.h.{i}.attn.c_attn.{kind}"]  # q, k, v of all heads → head by head
            rows = fused.view(3, 3, 16, *fused.shape[1:]).transpose(0, 1)
            new[f"blocks.{i}.attention.qkv.{kind}"] = rows.reshape(fused.shape)
    model.load_state_dict(new)
    return model.eval()


def watch(model, *names):
    """Records (input, output) of submodules at the next forward."""
    seen = {}
    for name in names:
        hook = lambda _, inputs, output, name=name: seen.__setitem__(name, (inputs[0], output))  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    return seen


def test_sorter_activations(sorter, real_data):
    stored = decoded(real_data("weights-gpt-nano-sort"), "t0-partials")
    block = "blocks.0"
    seen = watch(
        sorter,
        "token_embedding",
        "position_embedding",
        f"{block}.norm_attention",
        f"{block}.attention.qkv",
        f"{block}.attention.core",
        f"{block}.attention.core.drop",
        f"{block}.attention.out",
        f"{block}.norm_mlp",
        f"{block}.mlp.up",
        f"{block}.mlp.down",
        *(f"blocks.{i}" for i in range(3)),
        "final_norm",
    )
    with torch.no_grad():
        hidden = sorter(stored["idx"].long())
        logits = sorter.logits(hidden)
        q, k, v = sorter.blocks["0"].attention.project(seen[f"{block}.norm_attention"][1])
    fused = seen[f"{block}.attention.qkv"][1].view(3, 11, 3, 3, 16)  # B, T, H, (q k v), K
    found = {
        "tok_emb": seen["token_embedding"][1],
        "pos_emb": seen["position_embedding"][1][None],
        "x": seen[block][0],
        "ln1": seen[f"{block}.norm_attention"][1],
        "qkv": fused.transpose(2, 3).flatten(2),
        "q": q,
        "k": k,
        "v": v,
        "attSm": seen[f"{block}.attention.core.drop"][0],
        "y": seen[f"{block}.attention.core"][1].transpose(1, 2).flatten(2),
        "yProj": seen[f"{block}.attention.out"][1],
        "attnResid": seen[f"{block}.norm_mlp"][0],
        "ln2": seen[f"{block}.norm_mlp"][1],
        "fc": seen[f"{block}.mlp.up"][1],
        "gelu": seen[f"{block}.mlp.down"][0],
        "mlp": seen[f"{block}.mlp.down"][1],
        "mlpResid": seen[block][1],
        "block0": seen["blocks.0"][1],
        "block1": seen["blocks.1"][1],
        "block2": seen["blocks.2"][1],
        "ln_f": hidden,
        "lm_head": logits,
        "probs": logits.softmax(-1),
    }
    assert set(found) | {"idx", "att"} == set(stored)
    for name, tensor in found.items():
        assert tensor.shape == stored[name].shape, name
        worst = (tensor - stored[name]).abs().max().item()
        assert worst <= 5e-6 * stored[name].abs().max().clamp(min=1), f"{name}: {worst}"
    masked = stored["att"].isinf()
    assert torch.equal(seen[f"{block}.attention.core.drop"][0] == 0, masked)


def test_sorter_sorts(sorter):
    """200 random rows of six digits; the model writes them in order, with and without a cache."""
    digits = torch.randint(3, (200, 6), generator=torch.Generator().manual_seed(0))
    for cached in (False, True):
        tokens = digits
        cache = sorter.new_cache(200, 12) if cached else None
        with torch.inference_mode():
            for _ in range(6):
                window = tokens[:, cache.length :] if cached else tokens
                chosen = sorter.logits(sorter(window, cache=cache)[:, -1:]).argmax(-1)
                tokens = torch.cat((tokens, chosen), 1)
        assert torch.equal(tokens[:, 6:], digits.sort(1).values)


def read_llama2c(path):
    """llama2.c v0: seven int32, then float32 tensors in a fixed order, each stacked over layers."""
    data = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocabulary, length = struct.unpack("7i", data[:28])
    numbers = torch.frombuffer(bytearray(data[28:]), dtype=torch.float32)
    size = dim // heads
    shapes = {
        "tokens": (abs(vocabulary), dim),
        "norm1": (layers, dim),
        "q": (layers, heads * size, dim),
        "k": (layers, kv_heads * size, dim),
        "v": (layers, kv_heads * size, dim),
        "o": (layers, dim, heads * size),
        "norm2": (layers, dim),
        "gate": (layers, hidden, dim),
        "down": (layers, dim, hidden),
        "up": (layers, hidden, dim),
        "norm": (dim,),
        "cos": (length, size // 2),
        "sin": (length, size // 2),
    }
    found, at = {}, 0
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        found[name] = numbers[at : at + count].view(shape)
        at += count
    assert vocabulary > 0  # the sign says: the head is tied
    assert at == len(numbers)
    config = ModelConfig(
        vocab_size=vocabulary,
        make_vocab_size_divisible_by=128,
        num_layers=layers,
        hidden_size=dim,
        ffn_hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=kv_heads,
        max_position_embeddings=length,
        position_embedding_type="rope",
        rotary_interleaved=True,
        normalization="rmsnorm",
        activation="swiglu",
        bias=False,
    )
    return config, found


def read_tok(path):
    """llama2.c's tokenizer: longest length, then (score, length, bytes) a token."""
    data, at, pieces = path.read_bytes(), 4, []
    while at < len(data):
        _, length = struct.unpack("fi", data[at : at + 8])
        pieces.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    return pieces


@pytest.fixture
def storyteller(real_data):
    config, w = read_llama2c(real_data("weights-stories260K") / "stories260K.bin")
    model = GPT(config)
    new = {"token_embedding.weight": w["tokens"], "final_norm.weight": w["norm"]}
    groups, each, size = config.kv_heads, config.num_attention_heads // config.kv_heads, config.head_dim
    for i in range(config.num_layers):
        q = w["q"][i].view(groups, each * size, -1)
        k, v = (w[x][i].view(groups, size, -1) for x in "kv")
        new[f"blocks.{i}.attention.qkv.weight"] = torch.cat((q, k, v), 1).flatten(0, 1)
        new[f"blocks.{i}.attention.out.weight"] = w["o"][i]
        for mine, theirs in (("norm_attention", "norm1"), ("norm_mlp", "norm2")):
            new[f"blocks.{i}.{mine}.weight"] = w[theirs][i]
        for name in ("gate", "up", "down"):
            new[f"blocks.{i}.mlp.{name}.weight"] = w[name][i]
    model.load_state_dict(new)
    angles = model.rotary.angles(torch.arange(config.max_position_embeddings), torch.float32)
    for mine, stored in zip(angles, (w["cos"], w["sin"]), strict=True):
        assert (mine[0, 0] - stored).abs().max() < 1e-4  # theirs are fp32 angles
    return model.eval()


STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high.<0x0A>Lily's mom said, \"Lily, let's go to the park.\""
)


def test_storyteller_tells_its_story(storyteller, real_data):
    """Greedy from <s>: the same coherent text with the cache and without."""
    pieces = read_tok(real_data("weights-stories260K") / "tok512.bin")
    tokens, cached = [1], [1]
    cache = storyteller.new_cache(1, 200)
    with torch.inference_mode():
        for _ in range(199):
            hidden = storyteller(torch.tensor([tokens]))
            tokens.append(storyteller.logits(hidden[:, -1:]).argmax().item())
            hidden = storyteller(torch.tensor([cached[cache.length :]]), cache=cache)
            cached.append(storyteller.logits(hidden[:, -1:]).argmax().item())
    assert tokens == cached
    text = b"".join(pieces[t] for t in tokens[1:]).decode().strip()
    assert text.startswith(STORY), text
