"""Hugging Face folders in the forms that are found in the wild, from a tiny model of `transformers`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Folder:
    """`names`: "full" as transformers writes, "bare" without the prefix of the body, as GPT-2's own files; `buffers`: masks or
    frequencies that older versions stored; `config`: "new", or "old" with rotary settings at the top and `torch_dtype`."""

    form: str = "safetensors"
    sharded: bool = False
    names: str = "full"
    buffers: bool = False
    config: str = "new"
    zipped: bool = True


def write_folder(folder: Path, model: PreTrainedModel, layout: Folder) -> Path:
    """Writes the folder of that form and returns it."""
    if (layout.form, layout.names, layout.buffers) == ("safetensors", "full", False):
        model.save_pretrained(folder, max_shard_size="20KB" if layout.sharded else "5GB")
    else:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        write_tensors(folder, state_dict(model, layout), layout)
    if layout.config == "old":
        write_old_config(folder / "config.json")
    return folder


def state_dict(model: PreTrainedModel, layout: Folder) -> dict[str, torch.Tensor]:
    """The tensors under the names of that form, the head's copy of the table among them where pickles keep it."""
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if layout.form == "safetensors" and model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]  # it refuses memory that two names share
    prefix = f"{model.base_model_prefix}."
    if layout.names == "bare":
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        tensors.pop("lm_head.weight", None)
        prefix = ""
    if layout.buffers:
        for number in range(model.config.num_hidden_layers):
            if model.config.model_type == "gpt2":
                size = model.config.n_positions
                mask = torch.tril(torch.ones(size, size)).view(1, 1, size, size)
                tensors[f"{prefix}h.{number}.attn.bias"] = mask
                tensors[f"{prefix}h.{number}.attn.masked_bias"] = torch.tensor(-1e4)
            else:
                name = f"{prefix}layers.{number}.self_attn.rotary_emb.inv_freq"
                tensors[name] = torch.full((4,), 7.0)
    return tensors


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor], layout: Folder) -> None:
    """One file, or one of every seven tensors and an index."""
    stem, suffix = ("model", "safetensors") if layout.form == "safetensors" else ("pytorch_model", "bin")
    names = list(tensors)
    shards = [names[i : i + 7] for i in range(0, len(names), 7)] if layout.sharded else [names]
    where = {}
    for number, shard in enumerate(shards, 1):
        part = f"-{number:05d}-of-{len(shards):05d}" if layout.sharded else ""
        file = f"{stem}{part}.{suffix}"
        content = {name: tensors[name] for name in shard}
        if suffix == "bin":
            torch.save(content, folder / file, _use_new_zipfile_serialization=layout.zipped)
        else:
            content = {name: tensor.contiguous().clone() for name, tensor in content.items()}
            save_file(content, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    if layout.sharded:
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def write_old_config(path: Path) -> None:
    """The same settings as versions before 5 wrote them."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters", None)
    config["torch_dtype"] = config.pop("dtype", "float64")
    if rope is not None and config["model_type"] == "gpt_neox":
        config |= {"rotary_pct": rope["partial_rotary_factor"], "rotary_emb_base": rope["rope_theta"]}
    elif rope is not None:
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        if rope["rope_type"] == "linear":
            rope["type"] = rope.pop("rope_type")
    path.write_text(json.dumps(config))
