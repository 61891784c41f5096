"""The saved thing: kilobytes beside a base model, as a folder that is whole or not there.

    NAME/adapter.json          version, method, tags, what it was made for, SHA-256 of
    NAME/adapter.safetensors   the tensors

Knows our two files, and who reads the other forms that an adapter may have. Knows no process: one of them writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megalith import __version__
from megalith.adapt import peft
from megalith.adapt.adapter import DAMAGED, WITH_TAGS, Adapter, Base, check_base, checked, joined
from megalith.adapt.method import Tag
from megalith.adapt.nemo import read_nemo
from megalith.adapt.peft_lora import read_peft_lora
from megalith.checkpoint.files import sync_folder, write_file
from megalith.checkpoint.formats.nemo import locate as locate_archive
from megalith.checkpoint.header import HeaderError
from megalith.checkpoint.open import CHECKPOINTS
from megalith.checkpoint.tensor_files import open_tensors, write_tensors
from megalith.errors import CheckpointError, UnsupportedError
from megalith.models.config import ModelConfig
from megalith.models.encdec import EncoderDecoder
from megalith.models.stack import LanguageModel
from megalith.nn.prompt import Prompts, SoftPrompt

__all__ = ["Adapter", "Base", "Tag", "check_base", "install", "joined", "open_adapter", "read", "save"]

FORMAT_VERSION = 1
JSON, TENSORS = "adapter.json", "adapter.safetensors"
RUN = "adapter"
"""The folder of a tuning run that holds its last artefact."""
MAX_JSON = 1 << 26
"""Bytes of adapter.json that are read at most."""


def save(adapter: Adapter, folder: str | Path) -> Path:
    """Writes an adapter to `folder`, which appears whole; one that is an adapter already is replaced.

    Errors: `CheckpointError` where it cannot be written, where another thing lies, and for what is no adapter.
    """
    target = Path(folder).expanduser().absolute()
    checked(adapter)
    if (target.exists() or target.is_symlink()) and not (target / JSON).is_file():
        raise CheckpointError(
            "something else lies there",
            where=str(target),
            fix="name a new folder: only adapters are replaced",
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
            made = Path(scratch, "new")
            made.mkdir()
            _write(adapter, made)
            if target.exists():
                os.rename(target, Path(scratch, "old"))
            os.rename(made, target)
            sync_folder(target.parent)
    except OSError as error:
        raise CheckpointError(
            f"it cannot be written ({error.strerror or error})",
            where=str(error.filename or target),
            fix="free disk space, or name a folder that can be written",
        ) from error
    return target


def _write(adapter: Adapter, folder: Path) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.tensors.items()}
    record = write_tensors(folder / TENSORS, tensors)
    content = {
        "format_version": FORMAT_VERSION,
        "method": adapter.method,
        "family": adapter.family,
        "tags": [
            {"name": tag.name, "length": tag.length, "positions": tag.positions} for tag in adapter.tags
        ],
        "base": {"fingerprint": adapter.base.fingerprint, "name": adapter.base.name},
        "tokenizer": adapter.base.tokenizer,
        "settings": dict(adapter.settings),
        "tasks": {tag: dict(task) for tag, task in adapter.tasks.items()},
        "sha256": record.sha256,
        "megalith": __version__,
    }
    write_file(folder / JSON, [(json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()])
    sync_folder(folder)


def read(folder: Path) -> Adapter:
    """An adapter of ours. Errors: one `CheckpointError` that says what is damaged, missing or not known."""
    content = _json(folder / JSON)
    try:
        adapter = _understood(content, folder)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(
            f"{JSON} lacks what every adapter says", where=str(folder), fix=DAMAGED
        ) from None
    return checked(adapter)


def _json(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_JSON + 1)
        content = json.loads(text[:MAX_JSON])
    except OSError as error:
        what = f"{path.name} cannot be read ({error.strerror or error})"
        raise CheckpointError(what, where=str(path.parent), fix=DAMAGED) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path.name} is not JSON ({error})", where=str(path.parent), fix=DAMAGED
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} is not a JSON object", where=str(path.parent), fix=DAMAGED)
    return content


def _understood(content: Mapping[str, Any], folder: Path) -> Adapter:
    version = content["format_version"]
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"it is of version {version!r}, this Megalith reads up to {FORMAT_VERSION}",
            where=str(folder),
            fix="use the newer Megalith that wrote it",
        )
    base = Base(str(content["base"]["fingerprint"]), str(content["base"]["name"]), str(content["tokenizer"]))
    tags = tuple(Tag(str(tag["name"]), int(tag["length"]), bool(tag["positions"])) for tag in content["tags"])
    tensors = _tensors(folder / TENSORS, str(content["sha256"]))
    settings = dict(content["settings"])
    tasks = {str(tag): _task(task) for tag, task in content.get("tasks", {}).items()}
    method, family = str(content["method"]), str(content["family"])
    return Adapter(method, family, tensors, tags, settings, base, str(folder), tasks)


def _task(said: Mapping[str, Any]) -> dict[str, Any]:
    """Errors: `ValueError` or `TypeError` where numbers are none."""
    lists = ("before", "behind", "start", "virtual_token_splits")
    return {key: [int(number) for number in value] if key in lists else value for key, value in said.items()}


def _tensors(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    """Kilobytes, read at once. Errors: `CheckpointError` where they are not those that were written."""
    try:
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            what = f"{path.name} is damaged: it is not what was saved"
            raise CheckpointError(what, where=str(path.parent), fix=DAMAGED)
        return {lazy.name: lazy.read() for lazy in open_tensors(path)}
    except OSError as error:
        what = f"{path.name} cannot be read ({error.strerror or error})"
        raise CheckpointError(what, where=str(path.parent), fix=DAMAGED) from None
    except HeaderError as error:
        raise CheckpointError(f"{path.name}: {error}", where=str(path.parent), fix=DAMAGED) from None


def open_adapter(path: str | Path, config: ModelConfig | None = None) -> Adapter:
    """The adapter that a path leads to: a folder of ours, a tuning run's, which has its last one in it, PEFT's, or a `.nemo` with
    soft prompts.

    `config`: of the base model, whose parts PEFT's LoRA names. Errors: `CheckpointError` for damage, and for what is no adapter.
    """
    given = Path(path).expanduser()
    archive = locate_archive(given) if given.exists() else None
    if archive is not None:
        return read_nemo(archive)
    folder = given.parent if given.is_file() else given
    for place in (folder, folder / RUN):
        if (place / JSON).is_file():
            return read(place)
    if (folder / peft.CONFIG).is_file():
        return _of_peft(folder, config)
    if (folder / CHECKPOINTS).is_dir():
        raise CheckpointError(
            "there is no adapter in it: it is the folder of a run, which writes one when it has tuned to its end",
            where=str(given),
            fix="start its command again, which goes on; or give another folder",
        )
    held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) if folder.is_dir() else ""
    what = (
        f"there is no adapter in it; it holds {held or 'nothing'}"
        if given.exists()
        else "there is no such file or folder"
    )
    raise CheckpointError(
        what,
        where=str(given),
        fix=f"give a folder with {JSON}, one of PEFT's, the folder of a tuning run, or a .nemo with soft prompts",
    )


def _of_peft(folder: Path, config: ModelConfig | None) -> Adapter:
    if peft.read_config(folder).get("peft_type") != "LORA":
        return peft.read_peft(folder)
    if config is None:
        raise CheckpointError(
            "PEFT's LoRA can be read beside its base model only",
            where=str(folder),
            fix="name the model, too: --checkpoint",
        )
    return read_peft_lora(folder, config)


def install(model: LanguageModel, adapter: Adapter | None) -> None:
    """Gives a model that reads these prompts in place of those that it has; None: none at all. A stage that embeds no text gets none.

    Weights of the model stay as they are, so another adapter may follow. Errors: `CheckpointError` for tables of another width, and
    for an adapter without tags: LoRA is merged when a model is loaded.
    """
    if adapter is None:
        model.prompts = None
        return
    if adapter.method not in WITH_TAGS:
        raise CheckpointError(
            "LoRA is merged into the weights when a model is loaded",
            where=adapter.path,
            fix="load the model with it",
        )
    if not model.accepts_prompts:
        raise UnsupportedError(
            f"{type(model).__name__} has no place for virtual tokens",
            where=adapter.path,
            fix="give a GPT, a T5 or a BART",
        )
    width = model.config.hidden_size
    tables = [adapter.table(number) for number in range(len(adapter.tags))]
    wide = {tokens.shape[1] for tokens, _ in tables}
    if wide != {width}:
        raise CheckpointError(
            f"its virtual tokens are {', '.join(map(str, wide))} wide, the model {width}",
            where=adapter.path,
            fix="give the model that it was tuned on",
        )
    begins = model.first and (not isinstance(model, EncoderDecoder) or model.encoder is not None)
    model.prompts = (
        Prompts(model.config.vocab_size, [_table(model, *table) for table in tables]) if begins else None
    )
    if model.prompts is not None:
        model.prompts.eval().requires_grad_(False)


def _table(model: LanguageModel, tokens: torch.Tensor, positions: torch.Tensor | None) -> SoftPrompt:
    like = model.token_embedding.weight
    table = SoftPrompt(*tokens.shape, own_positions=positions is not None)
    table.tokens = nn.Parameter(tokens.to(like.device, like.dtype))
    if positions is not None:
        table.positions = nn.Parameter(positions.to(like.device, like.dtype))
    return table
