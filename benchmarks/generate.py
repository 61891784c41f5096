"""Greedy generation of a small GPT-2 beside `transformers.generate`: the same weights, the same prompts, in turns.

    python benchmarks/generate.py [--rounds 9] [--batch 1 8] [--tokens 128] [--threads N]

Model: 6 layers of 512, 8 heads, vocabulary 50304, bf16; prompts of 64 tokens. First both sides make the same tokens in fp32,
or the benchmark fails. Then every round times each side once, one after the other in one process, so that other load on the
machine hits both alike; reported are medians and the median of the paired ratios, of wall time and of processor time. In
bf16 the sides round at other places (the residual stream is fp32 here, bf16 there), so random weights soon part their
texts: where, is in the JSON. Ends with exit code 1 when a ratio of wall times misses its floor.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import sys
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
FLOORS = {1: 1.3, 8: 1.15}
RESULTS = Path(__file__).parent / "results" / "generate.json"


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


def our_model(theirs: transformers.GPT2LMHeadModel, positions: int, dtype: torch.dtype) -> GPT:
    """The same weights under our names, ready for reading in `dtype`."""
    model = GPT(our_config(positions))
    model.load_state_dict(our_weights(theirs))
    return prepare_for_reading(model, dtype)


def our_config(positions: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCABULARY,
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        max_position_embeddings=positions,
    )


def our_weights(theirs: transformers.GPT2LMHeadModel) -> dict[str, torch.Tensor]:
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
            qkv = transposed(w[f"{old}.attn.c_attn.{kind}"])  # (3·width, width), or (3·width,)
            by_head = qkv.unflatten(0, (3, HEADS, WIDTH // HEADS)).transpose(0, 1)
            new[f"{block}.attention.qkv.{kind}"] = by_head.flatten(0, 2)
            new[f"{block}.attention.out.{kind}"] = transposed(w[f"{old}.attn.c_proj.{kind}"])
            new[f"{block}.mlp.up.{kind}"] = transposed(w[f"{old}.mlp.c_fc.{kind}"])
            new[f"{block}.mlp.down.{kind}"] = transposed(w[f"{old}.mlp.c_proj.{kind}"])
    return {name: tensor.clone() for name, tensor in new.items()}


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """GPT-2 keeps matrices (in, out); a bias has nothing to turn."""
    return tensor.T if tensor.ndim == 2 else tensor


def make_prompts(batch: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, PROMPT), generator=torch.Generator().manual_seed(1))


def generate_ours(model: GPT, prompts: torch.Tensor, tokens: int) -> list[list[int]]:
    *_, rows = decode(model, prompts.tolist(), Sampling(tokens_to_generate=tokens), eod=None)
    return [row.continuation for row in rows]


def generate_theirs(
    model: transformers.GPT2LMHeadModel, prompts: torch.Tensor, tokens: int
) -> list[list[int]]:
    out = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return out[:, PROMPT:].tolist()


def compare(sides: dict[str, Callable[[], list[list[int]]]], rounds: int, count: int) -> dict:
    """Times both sides in turns; `count` tokens a call."""
    wall: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    made: dict[str, list[list[int]]] = {}
    for call in sides.values():
        call()
    for _ in range(rounds):
        for name, call in sides.items():
            start = time.perf_counter(), time.process_time()
            made[name] = call()
            wall[name].append(time.perf_counter() - start[0])
            processor[name].append(time.process_time() - start[1])
    return {
        "tokens_per_second": {name: round(count / statistics.median(t), 1) for name, t in wall.items()},
        "best_tokens_per_second": {name: round(count / min(t), 1) for name, t in wall.items()},
        "ratio": round(statistics.median(ratios(wall)), 3),
        "ratios": [round(r, 3) for r in sorted(ratios(wall))],
        "processor_ratio": round(statistics.median(ratios(processor)), 3),
        "first_difference": [first_difference(a, b) for a, b in zip(*made.values(), strict=True)],
    }


def ratios(times: dict[str, list[float]]) -> list[float]:
    """Their time in ours, round by round."""
    return [t / m for m, t in zip(times["megalith"], times["transformers"], strict=True)]


def first_difference(a: list[int], b: list[int]) -> int | None:
    """Where two rows of tokens part; None when they are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    theirs = their_model(PROMPT + options.tokens)
    exact = our_model(theirs, PROMPT + options.tokens, torch.float32)
    four = make_prompts(4)
    if generate_ours(exact, four, 32) != generate_theirs(theirs, four, 32):
        print("the two sides make different tokens in fp32", file=sys.stderr)
        return 1
    ours = our_model(theirs, PROMPT + options.tokens, torch.bfloat16)
    theirs = theirs.to(torch.bfloat16)
    results: dict = {
        "machine": f"{processor_name()}, {torch.get_num_threads()} threads",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "prompt": PROMPT,
        "tokens": options.tokens,
    }
    print(f"{results['machine']}, {results['versions']}: {PROMPT} + {options.tokens} tokens", flush=True)
    missed = False
    for batch in options.batch:
        prompts = make_prompts(batch)
        sides = {
            "megalith": functools.partial(generate_ours, ours, prompts, options.tokens),
            "transformers": functools.partial(generate_theirs, theirs, prompts, options.tokens),
        }
        found = results[f"batch {batch}"] = compare(sides, options.rounds, batch * options.tokens)
        speeds = ", ".join(f"{name} {speed:.0f}" for name, speed in found["tokens_per_second"].items())
        print(f"batch {batch}: tokens/s {speeds}; ratio {found['ratio']} of {found['ratios']}, ", end="")
        print(f"of processor times {found['processor_ratio']}", flush=True)
        missed |= found["ratio"] < FLOORS.get(batch, 0)
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(missed)


def processor_name() -> str:
    """The processor's model where Linux says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
