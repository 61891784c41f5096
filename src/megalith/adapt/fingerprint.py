"""Which model is it? A hash that is the same for a model in every format, at every layout, and told without loading it.

    architecture (what a model computes, not how it was trained) ─┐
    a few rows of its tensors, by our names, rounded to bf16 ─────┴─ SHA-256

Rows are rounded so that a copy in bf16 is the same model. Of a vocabulary the first rows are looked at and its size is not, for
formats pad it differently, and some do not say where it ends.
Of matrices the first, the middle and the last layer's are looked at: some must be made whole to be read. Of vectors all are.

Knows configs and lazy tensors. Knows no format.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from megalith.checkpoint.convert.source import open_source
from megalith.checkpoint.lazy import Lazy
from megalith.checkpoint.tensor_files import raw_bytes
from megalith.models.config import ModelConfig, effective

TRAINING = (
    "hidden_dropout", "attention_dropout", "attention_core", "init_method_std", "use_scaled_init_method",
    "make_vocab_size_divisible_by", "vocab_size",
)  # fmt: skip
"""Fields that change how a model is trained or stored, not what it computes."""
VOCABULARY = ("token_embedding.weight", "head.weight", "output_bias.bias")
"""Tensors with a row a token, which may be padded."""
ROWS, TOKENS = 4, 16
"""Neighbouring rows of a matrix, and first rows of a vocabulary, that are looked at."""
_LAYER = re.compile(r"^(.*blocks)\.(\d+)\.")


def fingerprint(family: str, config: ModelConfig, tensors: Mapping[str, Lazy]) -> str:
    """64 hexadecimal digits. `tensors`: the model's by our names, without "model."; prompts among them do not count."""
    architecture = {name: value for name, value in effective(config).items() if name not in TRAINING}
    if config.max_positions is None:
        del architecture["max_position_embeddings"]  # the length trained on: a habit
    digest = hashlib.sha256(json.dumps([family, architecture], sort_keys=True).encode())
    depths: dict[str, int] = {}
    for name in tensors:
        if match := _LAYER.match(name):
            depths[match[1]] = max(depths.get(match[1], 0), int(match[2]) + 1)
    for name in sorted(tensors):
        if name.startswith("prompts.") or not _looked_at(name, tensors[name], depths):
            continue
        digest.update(f"\n{name}\n".encode())
        sample = _sample(name, tensors[name]).to(torch.float32).to(torch.bfloat16)
        digest.update(raw_bytes(sample.contiguous()))
    return digest.hexdigest()


def fingerprint_of(
    path: str | Path, *, config_file: str | Path | None = None, tokenizer: str | Path | None = None
) -> str:
    """That of a checkpoint of any format. Errors: as `open_source`."""
    source = open_source(path, config_file=config_file, tokenizer=tokenizer)
    return fingerprint(source.family, source.config, source.tensors)


def _looked_at(name: str, lazy: Lazy, depths: Mapping[str, int]) -> bool:
    match = _LAYER.match(name)
    if match is None or len(lazy.shape) < 2:
        return True
    depth = depths[match[1]]
    return int(match[2]) in (0, depth // 2, depth - 1)


def _sample(name: str, lazy: Lazy) -> torch.Tensor:
    rows = lazy.shape[0]
    if name in VOCABULARY:
        return lazy.rows(0, min(TOKENS, rows))
    if len(lazy.shape) < 2:
        return lazy.rows(0, rows)
    start = max(0, rows // 2 - ROWS // 2)
    return lazy.rows(start, min(start + ROWS, rows))
