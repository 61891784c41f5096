"""Folders of Hugging Face's transformers: config.json, weights in safetensors or pickled files, whole or in shards, a tokenizer.

Knows names of files. What config.json means is `huggingface_config`'s business, what tensors are called `huggingface_tables`'.
Pickled files are read without running them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megalith.checkpoint.formats.foreign import Foreign, with_heads
from megalith.checkpoint.formats.huggingface_config import read_config
from megalith.checkpoint.formats.huggingface_encoder_tables import LEFT_OUT
from megalith.checkpoint.formats.huggingface_families import FAMILIES
from megalith.checkpoint.formats.huggingface_tables import TABLES
from megalith.checkpoint.header import HeaderError
from megalith.checkpoint.lazy import Lazy
from megalith.checkpoint.mapped import canonical
from megalith.checkpoint.mapping import Table
from megalith.checkpoint.pickles.reader import open_pickle
from megalith.checkpoint.tensor_files import open_tensors
from megalith.errors import CheckpointError
from megalith.models.config import ModelConfig
from megalith.tokenizers.folders import VOCABULARIES

CONFIG = "config.json"
GENERATION = "generation_config.json"
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""In the order of preference."""
INCOMPLETE = "copy the folder again: a file is missing or was cut short"
MAX_JSON = 1 << 28


def locate(path: Path) -> Path | None:
    """The folder, or that of a file of it, when transformers wrote it; None for anything else."""
    folder = path.parent if path.name in (CONFIG, *WEIGHTS) else path
    is_theirs = (folder / CONFIG).is_file() and "model_type" in _peek(folder / CONFIG)
    return folder.resolve() if is_theirs else None


def open_folder(path: Path) -> Foreign:
    """Its model. Errors: one `CheckpointError` for damage, or for a config that ours cannot be like."""
    values = read_json(path / CONFIG)
    tensors = {name: (lazy,) for name, lazy in _weights(path) if not _adds_nothing(name, lazy)}
    kind, config, notices = read_config(values, where=str(path / CONFIG), stored=tensors)
    foreign = Foreign(
        kind="huggingface",
        path=path,
        family=FAMILIES[kind].ours,
        config=config,
        table=TABLES[kind],
        parts=tensors,
        tokenizer=find_tokenizer(path),
        state=_decoding(path, values, FAMILIES[kind].ours),
        provenance={
            "format": "huggingface",
            "model_type": kind,
            "architectures": values.get("architectures"),
            "transformers_version": values.get("transformers_version"),
            "sizes": CONFIG,
            "vocabulary": f"{config.vocab_size} by {CONFIG}",
        },
        notices=(*notices, *_left_out(TABLES[kind], tensors, config)),
    )
    return with_heads(foreign)


def _decoding(path: Path, values: Mapping[str, Any], family: str) -> dict[str, Any]:
    """What a decoder's rows begin with, and the tokens forced on their ends: {"decoding": …}, or nothing where nothing is said."""
    if family not in ("t5", "bart"):
        return {}
    usual = {"decoder_start_token_id": 2, "forced_eos_token_id": 2} if family == "bart" else {}
    said = {**usual, **values, **(read_json(path / GENERATION) if (path / GENERATION).is_file() else {})}
    start = said.get("decoder_start_token_id")
    if not isinstance(start, int):
        return {}
    first, last = said.get("forced_bos_token_id"), said.get("forced_eos_token_id")
    return {"decoding": {"start": [start], "first": first, "last": last}}


def _adds_nothing(name: str, lazy: Lazy) -> bool:
    """BART's bias of the logits, which its classes all have and its models seldom use: zero throughout."""
    return name == "final_logits_bias" and not bool(lazy.read().any())


def _left_out(table: Table, tensors: Mapping[str, Any], config: ModelConfig) -> tuple[str, ...]:
    """What to say of layers behind an encoder that ours does not have."""
    names = {canonical(table, name) for name in tensors}
    found = sorted({name.rpartition(".")[0] for name in names if re.match(LEFT_OUT, name)})
    found = [
        name
        for name in found
        if not (name.startswith("bert.pooler") and getattr(config, "bert_binary_head", False))
    ]
    return (
        (f"it has {', '.join(found)}, which our {table.name.split()[-1]} lacks: left out",) if found else ()
    )


def find_tokenizer(folder: Path) -> Path | None:
    """The folder, where it holds a tokenizer of its own."""
    pair = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    alone = any((folder / name).is_file() for name in ("tokenizer.json", *VOCABULARIES))
    return folder if pair or alone else None


def _weights(folder: Path) -> Iterator[tuple[str, Lazy]]:
    name = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if name is None:
        alone = sorted(folder.glob("*.safetensors"))
        if len(alone) != 1:
            here = ", ".join(file.name for file in alone) or "none of them"
            raise CheckpointError(
                f"there are no weights: {', '.join(WEIGHTS)} are looked for; it holds {here}",
                where=str(folder),
                fix=INCOMPLETE,
            )
        name = alone[0].name
    if not name.endswith(".index.json"):
        yield from _tensors(folder / name).items()
        return
    wanted = _index(folder / name)
    for file in sorted(set(wanted.values())):
        held = _tensors(folder / file)
        listed = {tensor for tensor, where in wanted.items() if where == file}
        if absent := sorted(listed - held.keys()):
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            raise CheckpointError(
                f"{file} does not hold {absent[0]}{more}, as {name} says", where=str(folder), fix=INCOMPLETE
            )
        yield from ((tensor, lazy) for tensor, lazy in held.items() if tensor in listed)


def _index(path: Path) -> Mapping[str, str]:
    wanted = read_json(path).get("weight_map")
    if not isinstance(wanted, dict) or not wanted:
        raise CheckpointError("it has no weight_map", where=str(path), fix=INCOMPLETE)
    for file in wanted.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"it names {file!r}, which is no file of its folder", where=str(path))
    missing = sorted({file for file in wanted.values() if not (path.parent / file).is_file()})
    if missing:
        raise CheckpointError(
            f"it names {', '.join(missing[:8])}: not there", where=str(path), fix=INCOMPLETE
        )
    return wanted


def _tensors(path: Path) -> dict[str, Lazy]:
    if path.suffix == ".safetensors":
        try:
            return {lazy.name: lazy for lazy in open_tensors(path)}
        except (HeaderError, OSError) as error:
            raise CheckpointError(str(error), where=str(path), fix=INCOMPLETE) from None
    content = open_pickle(path).content
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    odd = (
        [name for name, lazy in content.items() if not _is_lazy(lazy)] if isinstance(content, dict) else [""]
    )
    if odd or not content:
        what = f"{odd[0]!r} is no tensor" if odd and odd[0] else "it is no dictionary of tensors"
        raise CheckpointError(what, where=str(path), fix="give a state_dict that torch.save wrote")
    return {str(name): lazy for name, lazy in content.items()}


def _is_lazy(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("shape", "dtype", "read", "rows"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Errors: `CheckpointError` where it is not one."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError("too large")
        content = json.loads(path.read_bytes())
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})"
        raise CheckpointError(what, where=str(path), fix=INCOMPLETE) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not JSON ({error})", where=str(path), fix=INCOMPLETE) from None
    if not isinstance(content, dict):
        raise CheckpointError("is not a JSON object", where=str(path), fix=INCOMPLETE)
    return content


def _peek(path: Path) -> Mapping[str, Any]:
    """What the file says, or where it is damaged, that it is one of theirs: opening it tells what is wrong."""
    try:
        return read_json(path)
    except CheckpointError:
        return {"model_type": None}
