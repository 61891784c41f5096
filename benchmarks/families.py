"""A training step of a BERT and of a T5 against `transformers`: same shape, batch, precision and compile setting.

    python benchmarks/families.py [--rounds 7] [--only bert t5] [--output benchmarks/results/families.json]

BERT: 6 layers of 512, 8 rows of 256 tokens, vocabulary 30592, 15 % of the tokens to be guessed and the order of the halves,
every fourth row padded. T5 1.1: 6 + 6 layers of 512, 8 rows of 256 and 64 tokens, vocabulary 32128. Both sides are once as
they come (nothing compiled) and once compiled block by block with freed memory kept (mallopt); bf16 products, fp32 weights,
no dropout, clipping and fused AdamW everywhere. Exit code 1 when a floor is missed in either setting: BERT 1.25, T5 1.1 ×.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peers import Shape, Step, autocast_step, make_engine
from torch import nn
from turns import Side, answer, machine, row, take_turns

from megalith.models.bert_config import BertConfig
from megalith.models.encdec_config import EncoderDecoderConfig
from megalith.topology.memory_allocator import tune_allocator

SHAPES = {
    "bert": Shape(length=256, vocabulary=30592, batch=8),
    "t5": Shape(length=256, vocabulary=32128, batch=8),
}
DECODER = 64
"""Tokens of a T5 row that the decoder reads."""
FLOORS = {"bert": 1.25, "t5": 1.1}
SETTINGS = {"plain": ("megalith", "transformers"), "tuned": ("megalith tuned", "transformers tuned")}
Batch = dict[str, torch.Tensor]


def make_batch(family: str, shape: Shape) -> Batch:
    """Random rows in the form of our datasets."""
    generator = torch.Generator().manual_seed(0)

    def ids(*size: int) -> torch.Tensor:
        return torch.randint(5, shape.vocabulary, size, generator=generator)

    rows, numbers = shape.batch, torch.arange(shape.batch)
    lengths = torch.where(numbers % 4 == 3, shape.length * 3 // 4, shape.length)
    if family == "t5":
        return {
            "encoder_tokens": ids(rows, shape.length),
            "encoder_lengths": lengths,
            "tokens": ids(rows, DECODER),
            "targets": ids(rows, DECODER),
            "sample": numbers,
        }
    place, tokens = torch.arange(shape.length), ids(rows, shape.length)
    guessed = (torch.rand(rows, shape.length, generator=generator) < 0.15) & (place < lengths[:, None])
    return {
        "tokens": tokens,
        "types": (place >= shape.length // 2).long().expand(rows, -1).contiguous(),
        "lengths": lengths,
        "targets": torch.where(guessed, tokens, -1),
        "order": numbers % 2,
        "sample": numbers,
    }


def make_step(family: str, side: str, shape: Shape) -> Step:
    tuned = side.endswith("tuned")
    torch.manual_seed(1)
    if tuned and shape.device == "cpu":
        tune_allocator()
    shape, batch = replace(shape, compile=tuned), make_batch(family, shape)
    if side.startswith("megalith"):
        engine = make_engine(OURS[family](shape), shape)
        return lambda: engine.train_step(batch).loss
    model, loss = THEIRS[family](shape)
    model = model.to(shape.device).train()
    if tuned:
        for block in blocks(model):
            block.forward = torch.compile(block.forward)
    there = {name: tensor.to(shape.device) for name, tensor in batch.items()}
    return autocast_step(model, loss, [there])


def blocks(model: nn.Module) -> list[nn.Module]:
    """Of any model in transformers: the elements of its lists of layers, not those inside of them."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    outer = [m for name, m in lists if not any(name.startswith(other + ".") for other, _ in lists)]
    return [block for each in outer for block in each]


def common(shape: Shape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocabulary,
        "num_layers": shape.layers,
        "hidden_size": shape.width,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": shape.length,
        "hidden_dropout": 0.0,
    }


def our_bert(shape: Shape) -> BertConfig:
    return BertConfig(
        **common(shape), transformer_block_type="post_ln", activation="gelu_erf", layernorm_epsilon=1e-12
    )


def our_t5(shape: Shape) -> EncoderDecoderConfig:
    return EncoderDecoderConfig(
        **common(shape),
        ffn_hidden_size=2 * shape.width,
        position_embedding_type="relative",
        normalization="rmsnorm",
        layernorm_epsilon=1e-6,
        activation="geglu",
        bias=False,
        attention_scale=1.0,
        share_embeddings_and_output_weights=False,
    )


def their_bert(shape: Shape) -> tuple[nn.Module, Callable[[Batch], torch.Tensor]]:
    from transformers import BertConfig as TheirConfig
    from transformers import BertForPreTraining

    model = BertForPreTraining(
        TheirConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=4 * shape.width,
            max_position_embeddings=shape.length,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="sdpa",
        )
    )
    return (
        model,
        lambda batch: (
            model(
                input_ids=batch["tokens"],
                token_type_ids=batch["types"],
                attention_mask=mask(batch["lengths"], shape.length),
                labels=batch["targets"].masked_fill(batch["targets"] < 0, -100),
                next_sentence_label=batch["order"],
            ).loss
        ),
    )


def their_t5(shape: Shape) -> tuple[nn.Module, Callable[[Batch], torch.Tensor]]:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=shape.vocabulary,
            d_model=shape.width,
            d_kv=shape.width // shape.heads,
            d_ff=2 * shape.width,
            num_layers=shape.layers,
            num_heads=shape.heads,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            use_cache=False,
        )
    )
    return (
        model,
        lambda batch: (
            model(
                input_ids=batch["encoder_tokens"],
                attention_mask=mask(batch["encoder_lengths"], shape.length),
                decoder_input_ids=batch["tokens"],
                labels=batch["targets"],
            ).loss
        ),
    )


def mask(lengths: torch.Tensor, keys: int) -> torch.Tensor:
    return (torch.arange(keys, device=lengths.device) < lengths[:, None]).long()


OURS = {"bert": our_bert, "t5": our_t5}
THEIRS = {"bert": their_bert, "t5": their_t5}


def compare(families: list[str], rounds: int, output: Path | None) -> int:
    results: dict[str, Any] = {"rounds": rounds, "machine": machine()}
    missed = []
    for family in families:
        for setting, names in SETTINGS.items():
            sides = {name: Side(__file__, [family, name]) for name in names}
            times = take_turns(sides, rounds)
            peaks = {name: each.stop() for name, each in sides.items()}
            found = {name: row(times, name, names[0], peaks) for name in names}
            results.setdefault(family, {})[setting] = found
            for name, each in found.items():
                print(f"{family:5s} {name:20s}", *(f"{k} {v:.3f}" for k, v in each.items()), sep="  ")
            if found[names[1]]["paired_ratio"] < FLOORS[family]:
                missed.append(f"{family} {setting}: {found[names[1]]['paired_ratio']:.3f} < {FLOORS[family]}")
    if output:
        output.write_text(json.dumps(results, indent=2) + "\n")
    print(*missed, sep="\n")
    return 1 if missed else 0


def main() -> int:
    if sys.argv[1:2] == ["worker"]:
        family, side = sys.argv[2:4]
        answer(make_step(family, side, SHAPES[family]), steps=2)
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    return compare(chosen.only, chosen.rounds, chosen.output)


if __name__ == "__main__":
    sys.exit(main())
