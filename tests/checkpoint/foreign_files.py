"""Models of ours written as other programs do, by the tables under test: what is right is the golden tests' to say."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn

from megalith.checkpoint.exported import foreigns
from megalith.checkpoint.formats.foreign import heads_of
from megalith.checkpoint.formats.huggingface_export import write_config
from megalith.checkpoint.formats.huggingface_tables import TABLES
from megalith.checkpoint.formats.megatron_stages import divide
from megalith.checkpoint.formats.megatron_tables import CORE, legacy
from megalith.checkpoint.tensor_files import write_tensors
from megalith.models.config import ModelConfig
from megalith.models.family import class_of

GPT2_LIKE = {
    "vocab_size": 29,
    "make_vocab_size_divisible_by": 8,
    "num_layers": 4,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "hidden_dropout": 0.0,
}
LLAMA_LIKE = GPT2_LIKE | {
    "position_embedding_type": "rope",
    "normalization": "rmsnorm",
    "activation": "swiglu",
    "bias": False,
    "ffn_hidden_size": 24,
    "num_query_groups": 2,
    "share_embeddings_and_output_weights": False,
}

BERT_LIKE = GPT2_LIKE | {"activation": "gelu_erf"}
POST_LN_LIKE = BERT_LIKE | {
    "transformer_block_type": "post_ln",
    "bert_binary_head": False,
    "num_tokentypes": 2,
}
SIDED_LIKE = GPT2_LIKE | {"encoder_num_layers": 2, "decoder_num_layers": 4, "output_bias": True}
T5_LIKE = SIDED_LIKE | {
    "position_embedding_type": "relative",
    "normalization": "rmsnorm",
    "activation": "relu",
    "bias": False,
    "attention_scale": 1.0,
    "output_bias": False,
    "scale_decoder_output": True,
}
BART_LIKE = SIDED_LIKE | {"transformer_block_type": "post_ln", "share_position_embeddings": False}


class Kept:
    """A tensor in memory with the face of one in a file; counts its reads."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name, self.tensor, self.reads = name, tensor, 0
        self.dtype, self.shape, self.nbytes = tensor.dtype, tuple(tensor.shape), tensor.nbytes

    def read(self) -> torch.Tensor:
        self.reads += 1
        return self.tensor.clone()

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.read()[start:stop]


def random_model(config: ModelConfig, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model of the config's family. Every number is random; the rows that pad the vocabulary are zero."""
    model = class_of(config)(config).to(dtype).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
            if name in ("token_embedding.weight", "head.weight", "output_bias.bias"):
                parameter[config.vocab_size :] = 0
    return model


def kept(model: nn.Module) -> dict[str, Kept]:
    """Its tensors as an exporter takes them."""
    return {name: Kept(name, parameter.detach()) for name, parameter in model.named_parameters()}


def hugging_face(folder: Path, model: nn.Module) -> Path:
    """A folder of transformers with one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = kept(model)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config = write_config(model.config, dtype=dtype, ids={"bos_token_id": 0, "eos_token_id": 0})
    (folder / "config.json").write_text(json.dumps(config))
    cuts = foreigns(
        TABLES[config["model_type"]], tensors, heads_of(model.config), vocabulary_rows=model.config.vocab_size
    )
    write_tensors(folder / "model.safetensors", {name: parts[0].read() for name, parts in cuts.items()})
    return folder


def megatron(
    root: Path,
    model: nn.Module,
    *,
    version: int | None = 3,
    core: bool = False,
    sizes: tuple[int, int] = (1, 1),
    args=None,
) -> Path:
    """A root with a tracker; `sizes`: tensor-parallel ranks and stages; `args` in place of those that say the model."""
    table = CORE if core else legacy(version or 0)
    ranks, stages = sizes
    tensors, rows = kept(model), -(-model.config.vocab_size // (8 * ranks)) * 8 * ranks
    cuts = foreigns(table, tensors, heads_of(model.config), tensor_parallel=ranks, vocabulary_rows=rows)
    for p, names in enumerate(divide(table, list(cuts), stages)):
        for t in range(ranks):
            folder = root / "iter_0000007" / (f"mp_rank_{t:02d}" + (f"_{p:03d}" if stages > 1 else ""))
            folder.mkdir(parents=True)
            flat = {local: cuts[name][t].read() for local, name in names.items()}
            content = {
                "iteration": 7,
                "model": flat if core else {"language_model": nested(flat), **heads_copy(flat)},
            }
            if version is not None:
                content["checkpoint_version"] = float(version)
            said = arguments(model.config, ranks, stages) if args is None else args
            if said:
                content["args"] = argparse.Namespace(**said)
            torch.save(content, folder / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("7")
    return root


def nested(flat: dict[str, torch.Tensor]) -> dict[str, object]:
    """Megatron-LM's tree: embedding and encoder are dictionaries, layers in them are flat."""
    tree: dict[str, object] = {}
    for name, tensor in flat.items():
        if name.startswith("language_model."):
            part, _, rest = name.removeprefix("language_model.").partition(".")
            tree.setdefault(part, {})[rest] = tensor
    return tree


def heads_copy(flat: dict[str, torch.Tensor]) -> dict[str, object]:
    """The table that the last stage has once more."""
    copy = flat.get("word_embeddings_for_head.weight")
    return {} if copy is None else {"word_embeddings_for_head": {"weight": copy}}


def arguments(config: ModelConfig, ranks: int, stages: int) -> dict[str, object]:
    """Megatron's arguments of a model."""
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "ffn_hidden_size": config.ffn_size,
        "group_query_attention": config.num_query_groups is not None,
        "num_query_groups": config.num_query_groups or 1,
        "max_position_embeddings": config.max_position_embeddings,
        "layernorm_epsilon": config.layernorm_epsilon,
        "position_embedding_type": config.position_embedding_type,
        "swiglu": config.activation == "swiglu",
        "bias_gelu_fusion": config.activation == "gelu_tanh",
        "untie_embeddings_and_output_weights": not config.share_embeddings_and_output_weights,
        "tensor_model_parallel_size": ranks,
        "pipeline_model_parallel_size": stages,
        "consumed_train_samples": 56,
    }
