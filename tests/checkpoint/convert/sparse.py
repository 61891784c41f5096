"""Megatron checkpoints of any size whose tensors are holes in the file: only a head is written, all the rest reads as zeros."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megalith.checkpoint.exported import foreigns
from megalith.checkpoint.files import CHUNK
from megalith.checkpoint.formats.foreign import heads_of, shapes_of
from megalith.checkpoint.formats.megatron_export import padded_rows, write_arguments
from megalith.checkpoint.formats.megatron_tables import legacy
from megalith.checkpoint.pickles.writer import torch_chunks
from megalith.checkpoint.tensor_files import LazyTensor
from megalith.models.config import ModelConfig

ZEROS = bytes(CHUNK)


class Hole:
    """A tensor of zeros that shares one piece of memory."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    def read(self) -> torch.Tensor:
        return torch.zeros(self.shape, dtype=self.dtype)


def write_sparse(root: Path, config: ModelConfig, ranks: int, dtype: torch.dtype) -> Path:
    """A root with a tracker, for `ranks` tensor-parallel ranks."""
    tensors = {name: LazyTensor(name, dtype, shape, ()) for name, shape in shapes_of("gpt", config).items()}
    rows = padded_rows(config.vocab_size, ranks)
    cuts = foreigns(legacy(3), tensors, heads_of(config), tensor_parallel=ranks, vocabulary_rows=rows)
    for rank in range(ranks):
        model: dict[str, Any] = {}
        for name, parts in cuts.items():
            _, part, rest = name.split(".", 2)
            tree = model.setdefault(part, {})
            if part == "embedding":
                table, _, rest = rest.partition(".")
                tree = tree.setdefault(table, {})
            tree[rest] = Hole(parts[rank].shape, dtype)
        content = {
            "iteration": 1,
            "checkpoint_version": 3.0,
            "arguments": write_arguments(config, (ranks, 1, 1)),
            "model": {"language_model": model},
        }
        path = root / "release" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        _write(path, torch_chunks(content))
    (root / "latest_checkpointed_iteration.txt").write_text("release")
    return root


def _write(path: Path, chunks: Iterator[Any]) -> None:
    with path.open("wb", buffering=0) as file:
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            if len(view) == CHUNK and view == ZEROS:
                file.seek(CHUNK, os.SEEK_CUR)
            else:
                file.write(view)


SHAPES = {
    "0.5B": {
        "vocab_size": 32000, "num_layers": 8, "hidden_size": 2048, "num_attention_heads": 16, "ffn_hidden_size": 5632,
        "max_position_embeddings": 2048,
    },
    "7B": {
        "vocab_size": 32000, "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "ffn_hidden_size": 11008,
        "max_position_embeddings": 4096,
    },
}  # fmt: skip
LLAMA = {
    "position_embedding_type": "rope", "normalization": "rmsnorm", "activation": "swiglu", "bias": False,
    "share_embeddings_and_output_weights": False, "hidden_dropout": 0.0,
}  # fmt: skip


def config_of(name: str) -> ModelConfig:
    """Llama's architecture in a size."""
    return ModelConfig(**SHAPES[name], **LLAMA)


def peak(work: str) -> str:
    """Python that does `work` and prints how many bytes of memory it took beyond what its imports do."""
    return f"""
import json, re
def memory(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
from megalith.checkpoint.convert.convert import Plan, convert
from megalith.checkpoint.convert.to_megatron import Sizes
from megalith.generate.loading import load_model
before = memory("VmRSS")
{work}
print(json.dumps({{"grown": memory("VmHWM") - before}}))
"""
