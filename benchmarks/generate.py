"""Greedy generation of a small GPT-2 beside `transformers.generate`: the same weights, the same prompts, in turns.

    python benchmarks/generate.py [--rounds 8] [--batch 1 8] [--tokens 128] [--threads N] [--json FILE]

Model: 6 layers of 512, 8 heads, vocabulary 50304, bf16; prompts of 64 tokens. Every round times each side once, one after
the other, so that other load on the machine hits both alike; reported are medians and the median of the paired ratios.
The tokens of both sides are compared too: bf16 logits have ties and near-ties, so they may part at one of them, and
where they first do is printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from megalith.generate.engine import decode
from megalith.generate.reading import prepare_for_reading
from megalith.generate.sampling import Sampling
from megalith.models.config import ModelConfig
from megalith.models.gpt import GPT

LAYERS, WIDTH, HEADS, VOCABULARY, PROMPT = 6, 512, 8, 50304, 64


def their_model(positions: int) -> transformers.GPT2LMHeadModel:
    """A random GPT-2, fp32. Its weights are those of a start of training, five times as large, to have opinions."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=positions,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ".h." in name:
                parameter.mul_(5)
    return model


def our_model(theirs: transformers.GPT2LMHeadModel, positions: int) -> GPT:
    """The same weights under our names, ready for reading in bf16."""
    config = ModelConfig(
        vocab_size=VOCABULARY,
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        max_position_embeddings=positions,
    )
    w = theirs.state_dict()
    new = {
        "token_embedding.weight": w["transformer.wte.weight"],
        "position_embedding.weight": w["transformer.wpe.weight"],
    }
    for kind in ("weight", "bias"):
        new[f"final_norm.{kind}"] = w[f"transformer.ln_f.{kind}"]
        for i in range(LAYERS):
            old, block = f"transformer.h.{i}", f"blocks.{i}"
            new[f"{block}.norm_attention.{kind}"] = w[f"{old}.ln_1.{kind}"]
            new[f"{block}.norm_mlp.{kind}"] = w[f"{old}.ln_2.{kind}"]
            qkv = w[f"{old}.attn.c_attn.{kind}"].T  # (3·width, width), or (3·width,)
            by_head = qkv.unflatten(0, (3, HEADS, WIDTH // HEADS)).transpose(0, 1)
            new[f"{block}.attention.qkv.{kind}"] = by_head.flatten(0, 2)
            new[f"{block}.attention.out.{kind}"] = w[f"{old}.attn.c_proj.{kind}"].T
            new[f"{block}.mlp.up.{kind}"] = w[f"{old}.mlp.c_fc.{kind}"].T
            new[f"{block}.mlp.down.{kind}"] = w[f"{old}.mlp.c_proj.{kind}"].T
    model = GPT(config)
    model.load_state_dict({name: tensor.clone() for name, tensor in new.items()})
    return prepare_for_reading(model, torch.bfloat16)


def timed(call: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    start = time.perf_counter()
    tokens = call()
    return time.perf_counter() - start, tokens


def compare(ours: GPT, theirs: transformers.GPT2LMHeadModel, batch: int, tokens: int, rounds: int) -> dict:
    prompts = torch.randint(
        VOCABULARY, (batch, PROMPT), generator=torch.Generator().manual_seed(1)
    )
    sampling = Sampling(tokens_to_generate=tokens)

    def generate_ours() -> list[list[int]]:
        *_, rows = decode(ours, prompts.tolist(), sampling, eod=None)
        return [row.continuation for row in rows]

    def generate_theirs(cache: str | None = None) -> list[list[int]]:
        out = theirs.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            **({"cache_implementation": cache} if cache else {}),
        )
        return out[:, PROMPT:].tolist()

    sides = {
        "megalith": generate_ours,
        "transformers": generate_theirs,
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    made: dict[str, list[list[int]]] = {}
    for call in sides.values():
        call()
    for _ in range(rounds):
        for name, call in sides.items():
            seconds, made[name] = timed(call)
            times[name].append(seconds)
    return summary(times, made, batch * tokens)


def summary(times: dict[str, list[float]], made: dict[str, list[list[int]]], count: int) -> dict:
    ratios = [t / m for m, t in zip(times["megalith"], times["transformers"], strict=True)]
    pairs = list(zip(made["megalith"], made["transformers"], strict=True))
    return {
        "tokens_per_second": {name: count / statistics.median(t) for name, t in times.items()},
        "best_tokens_per_second": {name: count / min(t) for name, t in times.items()},
        "ratio": statistics.median(ratios),
        "ratios": [round(r, 3) for r in sorted(ratios)],
        "ratio_of_bests": min(times["transformers"]) / min(times["megalith"]),
        "first_difference": [first_difference(a, b) for a, b in pairs],
    }


def first_difference(a: list[int], b: list[int]) -> int | None:
    """Where two rows of tokens part; None when they are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    theirs = their_model(PROMPT + options.tokens)
    ours = our_model(theirs, PROMPT + options.tokens)
    theirs = theirs.to(torch.bfloat16)
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{machine}, {versions}; {PROMPT} + {options.tokens} tokens, {options.rounds} rounds")
    results = {}
    for batch in options.batch:
        found = results[f"batch {batch}"] = compare(ours, theirs, batch, options.tokens, options.rounds)
        medians = ", ".join(f"{name} {speed:.0f}" for name, speed in found["tokens_per_second"].items())
        print(
            f"batch {batch}: tokens/s {medians}; ratio {found['ratio']:.2f} (pairs {found['ratios']}, "
            f"bests {found['ratio_of_bests']:.2f}); first difference {found['first_difference']}",
            flush=True,
        )
    if options.json:
        head = {"machine": machine, "versions": versions, "prompt": PROMPT, "tokens": options.tokens}
        options.json.write_text(json.dumps({**head, **results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
