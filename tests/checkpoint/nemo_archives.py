"""One small archive of NeMo's, with parts that a test may replace. That its numbers are right is the golden tests' to say."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import torch
import yaml

SIZES = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "encoder_seq_length": 12}
TARGET = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"


def nemo_state() -> dict[str, torch.Tensor]:
    """The state_dict of a GPT of `SIZES` with 128 rows of tokens."""
    draw = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (128, 16),
        "embedding.position_embeddings.weight": (12, 16),
        "encoder.final_layernorm.weight": (16,),
        "encoder.final_layernorm.bias": (16,),
    }
    for layer in range(SIZES["num_layers"]):
        for name, rows, columns in (
            ("self_attention.query_key_value", 48, 16),
            ("self_attention.dense", 16, 16),
            ("mlp.dense_h_to_4h", 64, 16),
            ("mlp.dense_4h_to_h", 16, 64),
        ):
            at = f"encoder.layers.{layer}.{name}"
            shapes |= {f"{at}.weight": (rows, columns), f"{at}.bias": (rows,)}
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"encoder.layers.{layer}.{name}.{kind}": (16,) for kind in ("weight", "bias")}
    return {
        f"model.language_model.{name}": torch.randn(shape, generator=draw) for name, shape in shapes.items()
    }


def nemo_archive(
    path: Path,
    *,
    mode: str = "w",
    keys: object = None,
    weights: bytes | None = None,
    artifacts: dict[str, bytes] | None = None,
) -> Path:
    """`keys`: those to change, or what stands in model_config.yaml instead: a text, or anything else than keys."""
    said = {**SIZES, "target": TARGET, "nemo_version": "1.8.2", **(keys if isinstance(keys, dict) else {})}
    content = keys if isinstance(keys, str) else yaml.safe_dump(keys if isinstance(keys, list) else said)
    if weights is None:
        stream = io.BytesIO()
        torch.save(nemo_state(), stream)
        weights = stream.getvalue()
    members = {"model_config.yaml": content.encode(), **(artifacts or {}), "model_weights.ckpt": weights}
    with tarfile.open(path, mode) as archive:
        for name, each in members.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(each)
            archive.addfile(entry, io.BytesIO(each))
    return path
