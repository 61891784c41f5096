"""Prompt tuning in PEFT's layout, both ways: a folder for each tag, with one matrix that has the positions in it.

    there   x = prompt + the model's position of its place        here   x = tokens + positions
    out     prompt = tokens + positions − the model's positions 0 … P−1
    in      tokens = prompt, and the model's positions are added where the tokens stand: the same sum

A table without positions of its own, and any of a model without learned positions, is the same matrix on both sides.
Layout: PEFT's adapter_config.json (peft_type PROMPT_TUNING) and adapter_model.safetensors with `prompt_embeddings`.
Knows PEFT's files; never imports it.

Legend: P virtual tokens, D width
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megalith.adapt.adapter import DAMAGED, SOFT_PROMPT, Adapter, Base, checked, settings_of
from megalith.adapt.method import Tag
from megalith.checkpoint.files import write_file
from megalith.checkpoint.header import HeaderError
from megalith.checkpoint.pickles.reader import open_pickle
from megalith.checkpoint.tensor_files import open_tensors, write_tensors
from megalith.errors import CheckpointError
from megalith.models.config import ModelConfig
from megalith.models.encdec_config import EncoderDecoderConfig

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MATRIX = "prompt_embeddings"
FAMILIES = {"CAUSAL_LM": "gpt", "SEQ_2_SEQ_LM": ""}
"""task_type → family; of an encoder-decoder it does not say which."""


def read_peft(folder: Path) -> Adapter:
    """One tag, called as the folder is. Errors: `CheckpointError` for damage, and by name for another kind than prompt tuning."""
    said = read_config(folder)
    kind = said.get("peft_type")
    if kind != "PROMPT_TUNING":
        raise CheckpointError(
            f"its peft_type is {kind}", where=str(folder), fix="PROMPT_TUNING and LORA are read"
        )
    task, length = said.get("task_type"), said.get("num_virtual_tokens")
    if task not in FAMILIES or type(length) is not int:
        raise CheckpointError(
            f"its task_type is {task!r}, its num_virtual_tokens {length!r}",
            where=str(folder),
            fix=f"{' and '.join(FAMILIES)} are read",
        )
    matrix = read_tensors(folder).get(MATRIX)
    if matrix is None or matrix.ndim != 2 or len(matrix) < length:
        held = "nothing" if matrix is None else str(list(matrix.shape))
        raise CheckpointError(
            f"{MATRIX} is {held}, {length} virtual tokens are said", where=str(folder), fix=DAMAGED
        )
    # Of an encoder-decoder there may be as many rows again for the decoder, which PEFT's prompt tuning never looks at.
    tag = Tag(folder.resolve().name, length)
    base = Base(name=str(said.get("base_model_name_or_path") or ""))
    tensors = {"prompts.0.tokens": matrix[:length].contiguous()}
    return checked(
        Adapter(SOFT_PROMPT, FAMILIES[task], tensors, (tag,), settings_of([tag]), base, str(folder))
    )


def write_peft(
    adapter: Adapter, number: int, folder: Path, config: ModelConfig, positions: torch.Tensor | None
) -> None:
    """Writes tag `number` into an empty folder, for a model of this config whose learned positions begin with `positions` (≥ P, D).

    Computed in float64, kept in the artefact's dtype. Errors: `CheckpointError` for a tag whose virtual tokens do not all stand
    before the text.
    """
    tag = adapter.tags[number]
    if adapter.tasks.get(tag.name, {}).get("prompt_template"):
        raise CheckpointError(
            f"PEFT's virtual tokens stand before the text; {tag.name!r} has a template",
            where=adapter.path,
            fix="keep it as an artefact",
        )
    tokens, own = adapter.table(number)
    matrix = tokens.double()
    if own is not None:
        matrix = matrix + own.double()
        if positions is not None:
            matrix = matrix - positions[: tag.length].double()
    write_tensors(folder / TENSORS, {MATRIX: matrix.to(tokens.dtype).contiguous()})
    said = settings(config, tag.length, adapter.base.name)
    write_file(folder / CONFIG, [(json.dumps(said, indent=2) + "\n").encode()])


def settings(config: ModelConfig, length: int, base: str) -> dict[str, Any]:
    """adapter_config.json of a prompt of so many virtual tokens."""
    sided = isinstance(config, EncoderDecoderConfig)
    return {
        "peft_type": "PROMPT_TUNING",
        "task_type": "SEQ_2_SEQ_LM" if sided else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "num_virtual_tokens": length,
        "token_dim": config.hidden_size,
        "num_transformer_submodules": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.encoder_layers if sided else config.num_layers,
        "prompt_tuning_init": "RANDOM",
    }


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json. Errors: `CheckpointError`."""
    try:
        content = json.loads((folder / CONFIG).read_bytes())
    except OSError as error:
        what = f"{CONFIG} cannot be read ({error.strerror or error})"
        raise CheckpointError(what, where=str(folder), fix=DAMAGED) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{CONFIG} is not JSON ({error})", where=str(folder), fix=DAMAGED) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{CONFIG} is not a JSON object", where=str(folder), fix=DAMAGED)
    return content


def read_tensors(folder: Path) -> Mapping[str, torch.Tensor]:
    """What PEFT saved, by its names; nothing in a pickle is run. Errors: `CheckpointError`."""
    if not (folder / TENSORS).is_file() and (folder / PICKLE).is_file():
        content = open_pickle(folder / PICKLE).content
        return {str(name): lazy.read() for name, lazy in dict(content).items() if hasattr(lazy, "read")}
    try:
        return {lazy.name: lazy.read() for lazy in open_tensors(folder / TENSORS)}
    except OSError as error:
        what = f"{TENSORS} cannot be read ({error.strerror or error})"
        raise CheckpointError(what, where=str(folder), fix=DAMAGED) from None
    except HeaderError as error:
        raise CheckpointError(f"{TENSORS}: {error}", where=str(folder), fix=DAMAGED) from None
